"""Differences between settings that were validated on the same folds.

Legend: K folds, N pictures of all folds together.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from finetune.runs.run_dir import RunDir

CONFIDENCE = 0.95

Correct = np.ndarray[Any, np.dtype[np.bool_]]


class FoldDifference(NamedTuple):
    """The accuracy of one setting minus that of another, with its interval, and the p-value."""

    estimate: float
    low: float
    high: float
    p_value: float


def describe_folds(groups: Mapping[str, Sequence[Path]]) -> list[str]:
    """The most accurate group against each other, one line each.

    `groups` has the run directories of each group, one per fold, in the order of the folds. Raises
    `RunDirError`.
    """
    rights = {name: [_right(path) for path in paths] for name, paths in groups.items()}
    means = {name: float(np.concatenate(right).mean()) for name, right in rights.items()}
    best = max(means, key=means.__getitem__, default="")
    lines = []
    for name in sorted(means.keys() - {best}, key=means.__getitem__, reverse=True):
        found = fold_difference(rights[best], rights[name], len(means) - 1)
        verdict = "" if found.p_value < 1 - CONFIDENCE else ", no significant difference"
        lines.append(
            f"{best} is {100 * found.estimate:.1f} points better than {name} "
            f"({100 * found.low:.1f} to {100 * found.high:.1f}), p {found.p_value:.3f}{verdict}"
        )
    return lines


def _right(run_dir: Path) -> Correct:
    logits, labels, _ = RunDir(run_dir).read_predictions()
    right: Correct = logits.argmax(axis=1) == labels
    return right


def fold_difference(
    first: Sequence[Correct], second: Sequence[Correct], num_comparisons: int = 1
) -> FoldDifference:
    """From which pictures of each fold each of the two classifies correctly.

    The folds share training pictures, so their differences are not independent: the variance of the
    mean is that between folds times 1/K + 1/(K - 1), with K - 1 degrees of freedom (Nadeau and
    Bengio 2003, https://doi.org/10.1023/A:1024068626366). It is at least the variance of the
    pictures' paired differences, with one more picture for each side (Bonett and Price 2012,
    https://doi.org/10.3102/1076998611411915). Both are corrected for the number of comparisons by
    Bonferroni.
    """
    paired = [a.astype(float) - b for a, b in zip(first, second, strict=True)]
    num_folds, paired_N = len(paired), np.concatenate(paired)
    between = float(np.var([pairs.mean() for pairs in paired], ddof=1))
    adjusted = np.append(paired_N, [1.0, -1.0])
    of_pictures = float(adjusted.var()) / len(adjusted)
    error = math.sqrt(max(between * (1 / num_folds + 1 / (num_folds - 1)), of_pictures))
    estimate, freedom = float(paired_N.mean()), num_folds - 1
    half = error * float(stats.t.isf((1 - CONFIDENCE) / 2 / num_comparisons, freedom))
    p_value = min(1.0, num_comparisons * 2 * float(stats.t.sf(abs(estimate) / error, freedom)))
    return FoldDifference(estimate, max(-1.0, estimate - half), min(1.0, estimate + half), p_value)
