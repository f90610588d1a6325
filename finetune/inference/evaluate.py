"""Accuracy, per-class figures and confusion of a run's best model on labelled pictures.

Every evaluation is recorded in the run directory, and a repeated call shows the record: a test set
that is used again and again to choose between models is no longer independent.

    python -m finetune evaluate runs/k3x9q2ab
"""

import json
import sys
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config.fields import RunConfig
from finetune.data.pictures import Indices, Pictures, find_pictures
from finetune.data.splits import find_test
from finetune.inference.predict import Predictor, load_predictor, predict_logits
from finetune.model.weights import fingerprint
from finetune.runs.predictions import (
    MAX_MATRIX_CLASSES,
    confusion_counts,
    macro_f1,
    mean_over_classes,
    most_confused_pairs,
)
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir
from finetune.system.array_store import digest
from finetune.system.errors import DataError
from finetune.system.progress import bar, no_progress
from finetune.system.text import listed, nearest, one_line

MAX_SHOWN_CLASSES = 12  # in a complete confusion matrix

Evaluation = dict[str, Any]


def evaluate(run_dir: Path, folder: Path | None = None, as_json: bool = False) -> int:
    """Evaluate on the run's test set or on `folder`/CLASS/*, or find the record, and print it."""
    record, is_new = evaluation(run_dir, folder)
    if not (is_new or as_json):
        print(f"recorded {record['recorded_at']}; the pictures are not evaluated again")
    print(json.dumps(record, ensure_ascii=False, indent=2) if as_json else describe(record))
    return 0


def evaluation(run_dir: Path, folder: Path | None = None) -> tuple[Evaluation, bool]:
    """The record of the run's test set or of `folder`/CLASS/*, and whether it is new.

    Raises `DataError` if there is no test set, for a class that the run doesn't know, or for a
    picture that can't be read unless the run skips such pictures.
    """
    run, predictor = RunDir(run_dir), load_predictor(run_dir)
    config = predictor.config
    pictures = find_pictures(folder) if folder else _test_set(run, config or run.read_config())
    labels = run_labels(pictures, predictor.class_names)
    about = {
        "folder": str(pictures.folder.absolute()),
        "pictures_fingerprint": digest(pictures.sizes),
        "model_fingerprint": fingerprint(predictor.model.state_dict()),
    }
    records = run.read_evaluations()
    for record in records:
        if about.items() <= record.items():
            return record, False
    skip_unreadable = config is not None and config.skip_unreadable
    record = about | measure(predictor, pictures, labels, skip_unreadable)
    run.write_evaluations([*records, record])
    return record, True


def _test_set(run: RunDir, config: RunConfig) -> Pictures:
    """Raises `DataError` if the run has none, or its data has been moved."""
    command = f"python -m finetune evaluate {run.path} FOLDER"
    try:
        split = RunResult.load(run.path).split_fingerprint if run.finished else ""
        pictures = find_test(config, split)
    except DataError as error:
        if config.data_dir.is_dir():
            raise DataError(f"{error}. Or pass a labelled folder: {command}") from None
        name = "val" if config.val_fraction else "test"
        raise DataError(
            f"{run.path}: its data was at {config.data_dir}, which does not exist. Pass the folder "
            f"of its test pictures, {name}/ of the data: {command}"
        ) from None
    if pictures is None:
        raise DataError(
            f"{run.path} has no test set: val/ validated, and there is no test/. Add test/CLASS/*, "
            "pass a labelled folder, or train with a val_fraction above 0, which keeps val/"
        )
    return pictures


def run_labels(pictures: Pictures, class_names: Sequence[str]) -> Indices:
    """The pictures' labels as indices of the run's classes, which may be more than the pictures'.

    Names are compared in Unicode's NFC: macOS writes decomposed ones. Raises `DataError` for a
    class that the run doesn't know.
    """
    index = {unicodedata.normalize("NFC", name): i for i, name in enumerate(class_names)}
    index |= {name: i for i, name in enumerate(class_names)}  # a run may have both forms
    found = [index.get(n, index.get(unicodedata.normalize("NFC", n))) for n in pictures.class_names]
    unknown = [n for n, i in zip(pictures.class_names, found, strict=True) if i is None]
    if unknown:
        raise DataError(
            f"{pictures.folder}: classes unknown to the run: "
            f"{listed([_with_nearest(name, class_names) for name in unknown])}. Its classes: "
            f"{listed(class_names)}. Rename or remove the folders of unknown classes"
        )
    return np.array(found, dtype=np.int64)[pictures.labels]


def _with_nearest(name: str, class_names: Sequence[str]) -> str:
    similar = nearest(name, class_names).removeprefix("; ")
    return f"{name} ({similar})" if similar else name


def measure(
    predictor: Predictor, pictures: Pictures, labels: Indices, skip_unreadable: bool
) -> Evaluation:
    """Accuracy, macro F1, per-class figures and confusion (rows: labels; columns: predictions).

    `labels` and `predictions`: of the pictures in their order, as indices of the run's classes; the
    prediction for an unreadable one is None. Of more than `MAX_MATRIX_CLASSES` classes the matrix
    is left out: `per_class` and `most_confused_pairs` have its counts.
    """
    paths = pictures.paths
    outcomes = predict_logits(predictor, paths, bar if sys.stderr.isatty() else no_progress)
    unreadable = [str(outcome) for outcome in outcomes if isinstance(outcome, DataError)]
    if unreadable and not skip_unreadable:
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise DataError(f"{unreadable[0]}{more}; repair or remove it")
    guesses = {i: o.argmax() for i, o in enumerate(outcomes) if not isinstance(o, DataError)}
    if not guesses:
        raise DataError(f"{pictures.folder}: no picture can be read")
    names = predictor.class_names
    confusion = confusion_counts(
        labels[list(guesses)], np.array(list(guesses.values())), len(names)
    )
    num_pictures = confusion.sum(axis=1)
    num_correct = int(confusion.trace())
    return {
        "accuracy": num_correct / len(guesses),
        "accuracy_interval": list(wilson_interval(num_correct, len(guesses))),
        "macro_f1": macro_f1(confusion),
        "num_pictures": len(guesses),
        "per_class": [{"class": n, **_class_figures(confusion, i)} for i, n in enumerate(names)],
        "class_names": names,
        "classes_without_pictures": [n for n, k in zip(names, num_pictures, strict=True) if not k],
        "confusion": confusion.tolist() if len(names) <= MAX_MATRIX_CLASSES else [],
        "most_confused_pairs": most_confused_pairs(confusion),
        "predictions": [int(guesses[i]) if i in guesses else None for i in range(len(paths))],
        "unreadable": unreadable,
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _class_figures(confusion: np.ndarray[Any, Any], i: int) -> dict[str, Any]:
    """A class's accuracy (its recall), precision and F1; None where there is nothing to count."""
    num_correct = int(confusion[i, i])
    num_labelled, num_predicted = int(confusion[i].sum()), int(confusion[:, i].sum())
    return {
        "num_pictures": num_labelled,
        "accuracy": num_correct / num_labelled if num_labelled else None,
        "precision": num_correct / num_predicted if num_predicted else None,
        "f1": 2 * num_correct / total if (total := num_labelled + num_predicted) else None,
    }


def wilson_interval(num_correct: int, num_pictures: int) -> tuple[float, float]:
    """95 % interval of a proportion, Wilson 1927 (https://doi.org/10.2307/2276774)."""
    z, n, share = 1.959964, num_pictures, num_correct / num_pictures
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def describe(evaluation: Evaluation) -> str:
    low, high = evaluation["accuracy_interval"]
    lines = [
        f"accuracy {evaluation['accuracy']:.4f} on {evaluation['num_pictures']} pictures of "
        f"{one_line(evaluation['folder'])} (95 % interval {low:.4f} to {high:.4f})"
    ]
    if evaluation["unreadable"]:
        lines.append(f"without {len(evaluation['unreadable'])} unreadable pictures")
    if without := evaluation["classes_without_pictures"]:
        lines.append(f"no pictures of: {listed([one_line(name) for name in without])}")
    for label, key in (("accuracy", "accuracy"), ("macro F1", "f1")):
        mean, what = mean_over_classes([figures[key] for figures in evaluation["per_class"]])
        lines += [] if mean is None else [f"{label} {mean:.4f}, {what}"]
    names = [one_line(name) for name in evaluation["class_names"]]
    width = max(5, *map(len, names))
    lines += ["", f"{'class':{width}} pictures accuracy precision     f1"]
    for name, figures in zip(names, evaluation["per_class"], strict=True):
        columns = f"{name:{width}} {figures['num_pictures']:8}"
        for key, column_width in (("accuracy", 9), ("precision", 10), ("f1", 7)):
            share = "-" if figures[key] is None else f"{figures[key]:.3f}"
            columns += f"{share:>{column_width}}"
        lines.append(columns)
    return "\n".join([*lines, "", *_confusion_lines(evaluation, names, width)])


def _confusion_lines(evaluation: Evaluation, names: list[str], width: int) -> list[str]:
    confusion = evaluation["confusion"]
    if len(names) > MAX_SHOWN_CLASSES:
        # Earlier versions recorded a matrix of any size and no pairs.
        recorded = evaluation["most_confused_pairs"]
        pairs = most_confused_pairs(np.array(confusion)) if confusion else recorded
        shown = pairs[:MAX_SHOWN_CLASSES]
        head = f"most frequent mistakes (label -> prediction), {len(shown)} of {len(pairs)} pairs"
        return [head] + [
            f"{count:5}  {names[label]} -> {names[guess]}" for label, guess, count in shown
        ]
    cell = max(4, *(len(str(count)) + 1 for row in confusion for count in row))
    starts = [" " * (width + 3), *(f"{name:{width}} {i:2}" for i, name in enumerate(names))]
    return ["confusion (rows: labels, columns: predictions)"] + [
        start + "".join(f"{count:{cell}}" for count in row)
        for start, row in zip(starts, [range(len(names)), *confusion], strict=True)
    ]
