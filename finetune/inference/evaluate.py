"""A run's winner on pictures it has not seen: accuracy, per-class figures and confusion.

Turns a run directory and a labelled folder into an evaluation, which is recorded in the run
directory: a test set that is looked at again and again stops being one, so a second call shows
the record. Knows nothing about training.

    python -m finetune evaluate runs/k3x9q2ab
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.pictures import Pictures, find_pictures
from finetune.data.splits import find_splits
from finetune.inference.predict import BestModel, open_best_model, predict_logits
from finetune.model.weights import fingerprint
from finetune.runs.run_dir import RunDir
from finetune.system.array_store import digest
from finetune.system.errors import DataError
from finetune.system.progress import bar, no_progress
from finetune.system.text import one_line

SHOWN_CLASSES = 12
"""A terminal shows the whole confusion of up to so many classes, else its largest entries."""

Evaluation = dict[str, Any]


def evaluate(run_dir: Path, folder: Path | None = None, as_json: bool = False) -> int:
    """Evaluate on the test set, or on `folder`/CLASS/*, and print; or print what is recorded.

    Raises `DataError` where there is no test set, the folder's classes are not the run's, or a
    picture can't be read and the run was not to skip such pictures.
    """
    run = RunDir(run_dir)
    pictures = find_pictures(folder) if folder else _find_test(run)
    winner = open_best_model(run_dir)
    check_classes(pictures, winner.class_names)
    about = {
        "folder": str(pictures.folder.absolute()),
        "pictures_fingerprint": digest(pictures.sizes),
        "model_fingerprint": fingerprint(winner.model.state_dict()),
    }
    records = run.read_evaluations()
    known = next((r for r in records if about.items() <= r.items()), None)
    if known is None:
        skip = bool(run.config_path.exists() and run.read_config().skip_unreadable)
        known = about | measure(winner, pictures, skip)
        run.write_evaluations([*records, known])
    elif not as_json:
        print(f"recorded {known['recorded_at']}; the pictures are not looked at again")
    print(json.dumps(known, ensure_ascii=False, indent=2) if as_json else describe(known))
    return 0


def _find_test(run: RunDir) -> Pictures:
    splits = find_splits(run.read_config())
    if splits.test is None:
        raise DataError(
            f"{run.path} has no test set: val/ validated, and there is no test/. Add test/CLASS/*, "
            "pass a labelled folder, or train with a val_fraction above 0, which keeps val/"
        )
    return splits.test


def check_classes(pictures: Pictures, class_names: list[str]) -> None:
    """Raises `DataError` unless the folder holds the run's classes, all of them and no others."""
    found = list(pictures.class_names)
    missing = [name for name in class_names if name not in found]
    foreign = [name for name in found if name not in class_names]
    if missing or foreign:
        parts = [f"{what}: {_listed(names)}" for what, names in
                 (("missing", missing), ("unknown to the run", foreign)) if names]  # fmt: skip
        raise DataError(
            f"{pictures.folder}: its classes are not the run's ({'; '.join(parts)}). "
            f"A folder is needed for each of: {_listed(class_names)}"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def measure(winner: BestModel, pictures: Pictures, skip_unreadable: bool) -> Evaluation:
    """Accuracy, per-class figures and confusion (rows: truth; columns: prediction)."""
    paths = [pictures.path(i) for i in range(len(pictures))]
    logits = predict_logits(winner, paths, bar if sys.stderr.isatty() else no_progress)
    unreadable = [str(one) for one in logits if isinstance(one, DataError)]
    if unreadable and not skip_unreadable:
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise DataError(f"{unreadable[0]}{more}; repair or remove it")
    guessed = {i: int(one.argmax()) for i, one in enumerate(logits) if isinstance(one, np.ndarray)}
    if not guessed:
        raise DataError(f"{pictures.folder}: no picture can be read")
    names = winner.class_names
    confusion = np.zeros((len(names), len(names)), dtype=int)
    for i, guess in guessed.items():
        confusion[pictures.labels[i], guess] += 1
    correct = int(np.trace(confusion))
    return {
        "accuracy": correct / len(guessed),
        "accuracy_interval": list(wilson_interval(correct, len(guessed))),
        "num_pictures": len(guessed),
        "per_class": [_class_figures(name, confusion, i) for i, name in enumerate(names)],
        "class_names": names,
        "confusion": confusion.tolist(),
        "unreadable": unreadable,
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _class_figures(name: str, confusion: np.ndarray[Any, Any], i: int) -> dict[str, Any]:
    """Accuracy on a class's own pictures (its recall), precision where it was named at all, F1."""
    hits, truths, named = (
        int(n) for n in (confusion[i, i], confusion[i].sum(), confusion[:, i].sum())
    )
    return {
        "class": name,
        "num_pictures": truths,
        "accuracy": hits / truths if truths else None,
        "precision": hits / named if named else None,
        "f1": 2 * hits / (truths + named) if truths + named else None,
    }


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, Wilson 1927 (https://doi.org/10.2307/2276774)."""
    z, share = 1.959964, correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * (share * (1 - share) / total + z * z / (4 * total**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def describe(evaluation: Evaluation) -> str:
    """An evaluation as a terminal shows it."""
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
    lines += [
        f"{one_line(one['class']):{width}} {one['num_pictures']:8} {_share(one['accuracy']):>8} "
        f"{_share(one['precision']):>9} {_share(one['f1']):>6}"
        for one in evaluation["per_class"]
    ]
    return "\n".join([*lines, "", *_confusion_lines(evaluation["confusion"], names, width)])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _confusion_lines(confusion: list[list[int]], names: list[str], width: int) -> list[str]:
    if len(names) <= SHOWN_CLASSES:
        cell = max(4, *(len(str(n)) + 1 for row in confusion for n in row))
        head = "".join(f"{i:{cell}}" for i in range(len(names)))
        return [
            "confusion (rows: truth, columns: prediction)",
            " " * (width + 3) + head,
            *(
                f"{name:{width}} {i:2}" + "".join(f"{n:{cell}}" for n in row)
                for i, (name, row) in enumerate(zip(names, confusion, strict=True))
            ),
        ]
    mixed = [
        (n, names[i], names[j])
        for i, row in enumerate(confusion)
        for j, n in enumerate(row)
        if i != j and n
    ]
    mixed.sort(key=lambda entry: -entry[0])
    return ["most often taken for another", *(f"{n:5}  {a} -> {b}" for n, a, b in mixed[:12])]
