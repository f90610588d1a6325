"""A run's predictions, and what they tell."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.runs.predictions import confident_mistakes

LOGITS = np.array([[5.0, 0.0], [0.0, 1.0], [9.0, 0.0], [0.0, 3.0]], dtype="float32")
LABELS = np.array([1, 0, 0, 0])


def test_the_most_confident_mistakes_come_first() -> None:
    found = confident_mistakes(LOGITS, LABELS, count=9)
    assert [(i, guess) for i, guess, _ in found] == [(0, 0), (3, 1), (1, 1)]
    assert found[0][2] == pytest.approx(1 / (1 + np.exp(-5)))
    assert confident_mistakes(LOGITS, LABELS, count=2) == found[:2]


def test_without_mistakes_there_are_none() -> None:
    assert confident_mistakes(LOGITS, LOGITS.argmax(axis=1), count=9) == []
