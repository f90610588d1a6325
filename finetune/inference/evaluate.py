"""Accuracy, per-class figures and confusion of a run's best model on labelled pictures.

Every evaluation is recorded in the run directory, and a repeated call shows the record: a test set
that is used again and again to choose between models is no longer independent.

    python -m finetune evaluate runs/k3x9q2ab
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config.fields import RunConfig
from finetune.data.pictures import Pictures, find_pictures
from finetune.data.splits import find_splits
from finetune.inference.predict import Predictor, load_predictor, predict_logits
from finetune.model.weights import fingerprint
from finetune.runs.run_dir import RunDir
from finetune.system.array_store import digest
from finetune.system.errors import DataError
from finetune.system.progress import bar, no_progress
from finetune.system.text import listed, one_line

MAX_SHOWN_CLASSES = 12
"""Up to so many classes the terminal shows the whole confusion matrix, else its largest entries."""

Evaluation = dict[str, Any]


def evaluate(run_dir: Path, folder: Path | None = None, as_json: bool = False) -> int:
    """Evaluate on the run's test set, or on `folder`/CLASS/*, and print; or print the record.

    Raises `DataError` if there is no test set, if the folder's classes differ from the run's, or if
    a picture can't be read and the run's `skip_unreadable` is false.
    """
    run, predictor = RunDir(run_dir), load_predictor(run_dir)
    if folder is None:
        pictures = _find_test_set(run_dir, predictor.config or run.read_config())
    else:
        pictures = find_pictures(folder)
    check_classes(pictures, predictor.class_names)
    about = {
        "folder": str(pictures.folder.absolute()),
        "pictures_fingerprint": digest(pictures.sizes),
        "model_fingerprint": fingerprint(predictor.model.state_dict()),
    }
    records = run.read_evaluations()
    record = next((r for r in records if about.items() <= r.items()), None)
    if record is None:
        skip_unreadable = predictor.config is not None and predictor.config.skip_unreadable
        record = about | measure(predictor, pictures, skip_unreadable)
        run.write_evaluations([*records, record])
    elif not as_json:
        print(f"recorded {record['recorded_at']}; the pictures are not evaluated again")
    print(json.dumps(record, ensure_ascii=False, indent=2) if as_json else describe(record))
    return 0


def _find_test_set(run_dir: Path, config: RunConfig) -> Pictures:
    test = find_splits(config).test
    if test is None:
        raise DataError(
            f"{run_dir} has no test set: val/ validated, and there is no test/. Add test/CLASS/*, "
            "pass a labelled folder, or train with a val_fraction above 0, which keeps val/"
        )
    return test


def check_classes(pictures: Pictures, class_names: list[str]) -> None:
    """Raises `DataError` unless the pictures have the run's classes, all of them and no others."""
    found = pictures.class_names
    problems = {
        "missing": [name for name in class_names if name not in found],
        "unknown to the run": [name for name in found if name not in class_names],
    }
    if any(problems.values()):
        differences = [f"{what}: {listed(names)}" for what, names in problems.items() if names]
        raise DataError(
            f"{pictures.folder}: its classes are not the run's ({'; '.join(differences)}). "
            f"It needs one folder for each of: {listed(class_names)}"
        )


def measure(predictor: Predictor, pictures: Pictures, skip_unreadable: bool) -> Evaluation:
    """Accuracy, per-class figures and confusion (rows: labels; columns: predictions)."""
    paths = [pictures.path(i) for i in range(len(pictures))]
    outcomes = predict_logits(predictor, paths, bar if sys.stderr.isatty() else no_progress)
    unreadable = [str(outcome) for outcome in outcomes if isinstance(outcome, DataError)]
    if unreadable and not skip_unreadable:
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise DataError(f"{unreadable[0]}{more}; repair or remove it")
    names = predictor.class_names
    confusion = np.zeros((len(names), len(names)), dtype=int)
    for label, outcome in zip(pictures.labels, outcomes, strict=True):
        if not isinstance(outcome, DataError):
            confusion[label, outcome.argmax()] += 1
    num_correct, num_pictures = int(np.trace(confusion)), int(confusion.sum())
    if not num_pictures:
        raise DataError(f"{pictures.folder}: no picture can be read")
    return {
        "accuracy": num_correct / num_pictures,
        "accuracy_interval": list(wilson_interval(num_correct, num_pictures)),
        "num_pictures": num_pictures,
        "per_class": [_class_figures(name, confusion, i) for i, name in enumerate(names)],
        "class_names": names,
        "confusion": confusion.tolist(),
        "unreadable": unreadable,
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _class_figures(name: str, confusion: np.ndarray[Any, Any], i: int) -> dict[str, Any]:
    """A class's accuracy (its recall), precision and F1; None where there is nothing to count."""
    num_correct = int(confusion[i, i])
    num_labelled, num_predicted = int(confusion[i].sum()), int(confusion[:, i].sum())
    num_either = num_labelled + num_predicted
    return {
        "class": name,
        "num_pictures": num_labelled,
        "accuracy": num_correct / num_labelled if num_labelled else None,
        "precision": num_correct / num_predicted if num_predicted else None,
        "f1": 2 * num_correct / num_either if num_either else None,
    }


def wilson_interval(num_correct: int, num_pictures: int) -> tuple[float, float]:
    """95 % interval of a proportion, Wilson 1927 (https://doi.org/10.2307/2276774)."""
    z, n, share = 1.959964, num_pictures, num_correct / num_pictures
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def describe(evaluation: Evaluation) -> str:
    """An evaluation as text for the terminal."""
    low, high = evaluation["accuracy_interval"]
    lines = [
        f"accuracy {evaluation['accuracy']:.4f} on {evaluation['num_pictures']} pictures of "
        f"{one_line(evaluation['folder'])} (95 % interval {low:.4f} to {high:.4f})"
    ]
    if evaluation["unreadable"]:
        lines.append(f"without {len(evaluation['unreadable'])} unreadable pictures")
    names = [one_line(name) for name in evaluation["class_names"]]
    width = max(5, *map(len, names))
    lines += ["", f"{'class':{width}} pictures accuracy precision     f1"]
    for name, figures in zip(names, evaluation["per_class"], strict=True):
        accuracy, precision, f1 = (
            "-" if figures[key] is None else f"{figures[key]:.3f}"
            for key in ("accuracy", "precision", "f1")
        )
        count = figures["num_pictures"]
        lines.append(f"{name:{width}} {count:8} {accuracy:>8} {precision:>9} {f1:>6}")
    return "\n".join([*lines, "", *_confusion_lines(evaluation["confusion"], names, width)])


def _confusion_lines(confusion: list[list[int]], names: list[str], width: int) -> list[str]:
    if len(names) > MAX_SHOWN_CLASSES:
        mistakes = [
            (count, names[i], names[j])
            for i, row in enumerate(confusion)
            for j, count in enumerate(row)
            if i != j and count
        ]
        mistakes.sort(key=lambda mistake: -mistake[0])
        return [
            "most frequent mistakes (label -> prediction)",
            *(f"{count:5}  {label} -> {guess}" for count, label, guess in mistakes[:12]),
        ]
    cell = max(4, *(len(str(count)) + 1 for row in confusion for count in row))
    lines = ["confusion (rows: labels, columns: predictions)"]
    lines.append(" " * (width + 3) + "".join(f"{i:{cell}}" for i in range(len(names))))
    for i, (name, row) in enumerate(zip(names, confusion, strict=True)):
        lines.append(f"{name:{width}} {i:2}" + "".join(f"{count:{cell}}" for count in row))
    return lines
