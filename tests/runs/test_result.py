"""Predictions and failures of a run."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from sklearn.metrics import f1_score

from finetune.runs.predictions import (
    class_accuracies,
    confident_mistakes,
    confusion_counts,
    macro_f1,
    mean_over_classes,
    most_confused_pairs,
)
from finetune.runs.result import Failure, failure_of
from finetune.system.errors import ConfigError, Pruned, Stopped

LOGITS = np.array([[5.0, 0.0], [0.0, 1.0], [9.0, 0.0], [0.0, 3.0]], dtype="float32")
LABELS = np.array([1, 0, 0, 0])


def test_the_most_confident_mistakes_come_first() -> None:
    found = confident_mistakes(LOGITS, LABELS, count=9)
    assert [(i, guess) for i, guess, _ in found] == [(0, 0), (3, 1), (1, 1)]
    assert found[0][2] == pytest.approx(1 / (1 + np.exp(-5)))
    assert confident_mistakes(LOGITS, LABELS, count=2) == found[:2]


def test_without_mistakes_the_list_is_empty() -> None:
    assert confident_mistakes(LOGITS, LOGITS.argmax(axis=1), count=9) == []


def test_confusion_counts_have_truths_in_rows() -> None:
    guesses = LOGITS.argmax(axis=1)
    assert confusion_counts(LABELS, guesses, 3).tolist() == [[1, 2, 0], [1, 0, 0], [0, 0, 0]]


def test_the_most_confused_pairs_come_first() -> None:
    counts = np.array([[9, 1, 0], [2, 8, 3], [1, 0, 7]])
    assert most_confused_pairs(counts) == [(1, 2, 3), (1, 0, 2), (0, 1, 1), (2, 0, 1)]
    assert most_confused_pairs(np.diag([4, 4])) == []
    assert counts[0, 0] == 9


def test_a_class_without_pictures_has_no_accuracy_and_no_part_in_the_mean() -> None:
    accuracies = class_accuracies(np.array([[3, 1, 0], [0, 0, 0], [2, 0, 2]]))
    assert accuracies == [0.75, None, 0.5]
    assert mean_over_classes(accuracies) == (0.625, "mean over 2 of 3 classes")
    assert mean_over_classes([None]) == (None, "mean over 0 of 1 classes")


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[4, 0], [0, 4]], 1.0),
        ([[0, 4], [4, 0]], 0.0),
        ([[3, 1], [2, 2]], (6 / 9 + 4 / 7) / 2),
        ([[9, 0], [3, 0]], (18 / 21 + 0) / 2),  # a class that is never predicted
        ([[2, 2, 0], [0, 0, 0], [0, 0, 4]], (4 / 6 + 0 + 1) / 3),  # one that is only predicted
        ([[3, 1, 0], [2, 2, 0], [0, 0, 0]], (6 / 9 + 4 / 7) / 2),  # one that doesn't occur
    ],
)
def test_macro_f1_is_the_mean_over_the_classes_that_occur(
    counts: list[list[int]], expected: float
) -> None:
    assert macro_f1(np.array(counts)) == pytest.approx(expected, abs=1e-15)


def test_macro_f1_is_that_of_scikit_learn() -> None:
    chance = np.random.default_rng(3)
    for num_classes in (2, 5, 40):
        for num_pictures in (1, 7, 200):
            labels, guesses = chance.integers(0, num_classes, (2, num_pictures)) ** 2 // num_classes
            found = macro_f1(confusion_counts(labels, guesses, num_classes))
            assert found == pytest.approx(f1_score(labels, guesses, average="macro"), abs=1e-12)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Stopped(signal.SIGTERM), Failure("stopped", "stopped by SIGTERM", 143)),
        (Stopped(signal.SIGUSR1), Failure("preempted", "stopped by SIGUSR1", 128 + 10)),
        (KeyboardInterrupt(), Failure("stopped", "interrupted", 130)),
        (Pruned("others are better"), Failure("pruned", "others are better", 0)),
        (ConfigError("no such field"), Failure("failed", "no such field", 2)),
        (ValueError("x"), Failure("failed", "ValueError: x", 1)),
    ],
)
def test_every_end_of_a_run_has_its_state_and_exit_code(
    error: BaseException, expected: Failure
) -> None:
    assert failure_of(error) == expected
