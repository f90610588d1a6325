"""Probabilities, confusion and confident mistakes from logits and labels."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


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
