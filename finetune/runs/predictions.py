"""What logits and labels say: probabilities, confident mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def softmax(logits: Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Probabilities of the last axis' logits, in float64."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
    shares: np.ndarray[Any, np.dtype[np.float64]] = exponentials / exponentials.sum(
        axis=-1, keepdims=True
    )
    return shares


def confident_mistakes(logits: Array, labels: Array, count: int) -> list[tuple[int, int, float]]:
    """(row, prediction, probability) of at most `count` wrong predictions, the surest first."""
    probabilities = softmax(logits)
    guesses, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(guesses != labels)
    worst = wrong[np.argsort(-sure[wrong], kind="stable")][:count]
    return [(int(i), int(guesses[i]), float(sure[i])) for i in worst]
