"""Intervals of single accuracies."""

import math

from scipy import stats

from finetune.analysis.statistics import CONFIDENCE, MIN_SEEDS, Correct, residual_variance


def wilson(share: float, count: float, quantile: float) -> tuple[float, float]:
    """The interval of a proportion, Wilson 1927 (https://doi.org/10.2307/2276774)."""
    z2 = quantile**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_interval(correct_RN: Correct) -> tuple[float, float]:
    """The interval of the mean accuracy of runs: for other pictures, and for other seeds if there
    are at least `MIN_SEEDS` runs.

    Wilson's, with as many pictures as give the variance that is found, and Student's quantile.
    """
    right_RN = correct_RN.astype(float)
    num_runs, num_pictures = right_RN.shape
    share, tail = float(right_RN.mean()), (1 - CONFIDENCE) / 2
    if num_runs < MIN_SEEDS or num_pictures < 2 or share in (0.0, 1.0):
        return wilson(share, num_pictures, float(stats.norm.isf(tail)))
    pictures = float(right_RN.mean(axis=0).var(ddof=1)) / num_pictures
    between = float(right_RN.mean(axis=1).var(ddof=1))
    residual = residual_variance(right_RN)
    of_seeds = max(between, residual) / num_runs
    variance = max(pictures + (between - residual) / num_runs, pictures, of_seeds)
    freedom = (num_runs - 1) * (variance / of_seeds) ** 2 if of_seeds else math.inf
    return wilson(share, share * (1 - share) / variance, float(stats.t.isf(tail, freedom)))
