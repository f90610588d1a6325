"""A run's result in a few lines, as they are printed at its end."""

from collections.abc import Sequence

from finetune.runs.predictions import (
    Array,
    class_accuracies,
    confusion_counts,
    most_confused_pairs,
)
from finetune.runs.result import RunResult

_MAX_CLASSES = 6
_MAX_PAIRS = 3


def summary(result: RunResult, logits: Array, labels: Array) -> list[str]:
    """The best epoch, what always naming the largest class would reach, the recall of each class
    (of many classes the lowest), and the most confused pairs."""
    stopped = " (stopped early)" if result.stopped_early else ""
    f1 = result.best_val_macro_f1
    score = "" if f1 is None else f", macro F1 {f1:.4f},"
    best = f"best val_acc {result.best_val_acc:.4f}{score} in epoch {result.best_epoch}"
    lines = [f"{best} of 0 to {result.epochs_run - 1}{stopped}"]
    names, num_classes = result.class_names, logits.shape[1]
    if not len(labels) or len(names) != num_classes:
        return lines
    counts = confusion_counts(labels, logits.argmax(axis=1), num_classes)
    totals = counts.sum(axis=1)
    largest, share = names[totals.argmax()], totals.max() / totals.sum()
    lines.append(f"to compare: always predicting {largest}, the largest class, gives {share:.4f}")
    return lines + _recalls(names, class_accuracies(counts)) + _confused(names, counts)


def _recalls(names: Sequence[str], recalls: Sequence[float | None]) -> list[str]:
    known = [
        (recall, name) for name, recall in zip(names, recalls, strict=True) if recall is not None
    ]
    what = "recall"
    if len(known) > _MAX_CLASSES:
        known, what = sorted(known)[:_MAX_CLASSES], f"lowest recall of {len(known)} classes"
    return [f"{what}: {', '.join(f'{name} {recall:.2f}' for recall, name in known)}"]


def _confused(names: Sequence[str], counts: Array) -> list[str]:
    pairs = most_confused_pairs(counts)[:_MAX_PAIRS]
    said = [f"{names[label]} as {names[guess]} {count}" for label, guess, count in pairs]
    return [f"most confused: {', '.join(said)}"] if said else []
