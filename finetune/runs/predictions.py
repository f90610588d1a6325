"""Probabilities, confusion, macro F1, accuracy per class, mistakes from logits and labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MAX_MATRIX_CLASSES = 100
"""The most classes whose confusion is shown as a matrix; of more, the most confused pairs are.
W&B's client writes the first 10,000 rows of a table to the run, so a larger matrix would be cut."""
MAX_PAIRS = 200
"""The most pairs that are shown instead of a matrix."""


def softmax(logits: Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Probabilities over the last axis, in float64."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def confident_mistakes(logits: Array, labels: Array, count: int) -> list[tuple[int, int, float]]:
    """(row, prediction, probability) of at most `count` wrong predictions, the most probable
    first."""
    probabilities = softmax(logits)
    guesses, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(guesses != labels)
    worst = wrong[np.argsort(-sure[wrong], kind="stable")][:count]
    return [(int(i), int(guesses[i]), float(sure[i])) for i in worst]


def confusion_counts(labels: Array, guesses: Array, num_classes: int) -> Array:
    """Predictions by true and predicted class, (num_classes, num_classes): rows are truths."""
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (labels, guesses), 1)
    return counts


def most_confused_pairs(counts: Array) -> list[tuple[int, int, int]]:
    """(label, prediction, count) of every kind of mistake in a confusion matrix, the most frequent
    first."""
    mistakes = counts.copy()
    np.fill_diagonal(mistakes, 0)
    labels, guesses = np.nonzero(mistakes)
    frequencies = mistakes[labels, guesses]
    order = np.argsort(-frequencies, kind="stable")
    columns = (labels[order], guesses[order], frequencies[order])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def macro_f1(counts: Array) -> float:
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN), from a confusion matrix.

    The classes are those that occur among the labels or the predictions, as in scikit-learn's
    `f1_score(average="macro")`; the mean is that of Opitz and Burst 2019, "averaged F1"
    (https://arxiv.org/abs/1911.03347).
    """
    sums = counts.sum(axis=0) + counts.sum(axis=1)  # 2 TP + FP + FN
    occurs = sums > 0
    return float((2 * counts.diagonal()[occurs] / sums[occurs]).mean())


def class_accuracies(counts: Array) -> list[float | None]:
    """The accuracy on each class's pictures; None for a class without pictures."""
    numbers = zip(counts.diagonal().tolist(), counts.sum(axis=1).tolist(), strict=True)
    return [num_correct / total if total else None for num_correct, total in numbers]


def mean_over_classes(accuracies: Sequence[float | None]) -> tuple[float | None, str]:
    """The mean of the classes that have pictures, and of which: `mean over 8 of 9 classes`."""
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    mean = sum(known) / len(known) if known else None
    return mean, f"mean over {len(known)} of {len(accuracies)} classes"
