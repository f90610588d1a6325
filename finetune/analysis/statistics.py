"""Which pictures runs got right -> differences of accuracy with their uncertainty.

Turns matrices of right and wrong into paired intervals, corrected p-values and accuracies free of
selection. Knows nothing about strategies, files or pages.

    >>> correct = np.random.default_rng(0).random((2, 5, 1000)) < 0.8
    >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03], num_groups=3)]
    [0.03, 0.04, 0.03]

Legend: R runs of one group, N pictures, B resamples; `correct_RN` says who got which picture right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from scipy import special, stats

CONFIDENCE = 0.95
MIN_SEEDS = 3
"""Runs of one setting with seeds of their own below which a spread can't be told."""

Correct = np.ndarray[Any, np.dtype[np.bool_]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Difference:
    """How much more accurate the first is than the second: a fraction, its interval, its p."""

    first: str
    second: str
    estimate: float
    low: float
    high: float
    p_value: float
    p_holm: float = math.nan
    p_mcnemar: float | None = None

    @property
    def significant(self) -> bool:
        return self.p_holm < 1 - CONFIDENCE


@dataclass(frozen=True)
class _Spread:
    """What one group's runs tell of its mean accuracy."""

    mean: float
    per_picture: Floats
    num_runs: int
    run_variance: float
    """Of one run's accuracy, between seeds."""
    residual_variance: float
    """The part of it that is chance in single pictures: the pictures' variance holds it too."""

    @classmethod
    def of(cls, correct_RN: Correct) -> _Spread:
        right = correct_RN.astype(np.float64)
        num_runs, num_pictures = right.shape
        accuracies, per_picture = right.mean(axis=1), right.mean(axis=0)
        residuals = right - accuracies[:, None] - per_picture + right.mean()
        freedom = (num_runs - 1) * (num_pictures - 1)
        return cls(
            mean=float(right.mean()),
            per_picture=per_picture,
            num_runs=num_runs,
            run_variance=float(accuracies.var(ddof=1)),
            residual_variance=float((residuals**2).sum() / freedom) / num_pictures,
        )


def group_differences(groups: Mapping[str, Correct]) -> list[Difference]:
    """Every pair of groups of runs with fresh seeds, judged beyond these seeds and pictures.

    The variance is that of resampling seeds and pictures alike (the pigeonhole bootstrap, Owen
    2007, https://arxiv.org/abs/0712.1111), in closed form and with the residual, which resampling
    counts three times, counted once: between seeds plus between pictures of the paired
    differences, less the residual that both hold. Between-seed variances of few runs
    are poor, so they lend each other strength as far as they agree (Smyth 2004,
    https://doi.org/10.2202/1544-6115.1027); Student's quantile at Satterthwaite's degrees of
    freedom pays for what is still uncertain. p-values are corrected over all pairs (`holm`).
    """
    assert all(len(correct_RN) >= MIN_SEEDS for correct_RN in groups.values())
    spreads = {name: _Spread.of(correct_RN) for name, correct_RN in groups.items()}
    seeds = moderated(
        [spread.run_variance for spread in spreads.values()],
        [spread.num_runs - 1 for spread in spreads.values()],
        floor=1 / (12 * next(iter(groups.values())).shape[1] ** 2),  # of rounding to a picture
    )
    place = {name: i for i, name in enumerate(spreads)}
    pairs = [
        _group_difference(a, b, spreads, seeds, [place[a], place[b]])
        for a, b in combinations(spreads, 2)
    ]
    return _with_holm(pairs, len(groups))


def _group_difference(
    first: str, second: str, spreads: Mapping[str, _Spread], seeds: Moderated, both: list[int]
) -> Difference:
    one, other = spreads[first], spreads[second]
    paired_N = one.per_picture - other.per_picture
    pictures = float(paired_N.var(ddof=1)) / len(paired_N)
    runs = np.array([one.num_runs, other.num_runs])
    residuals = np.array([one.residual_variance, other.residual_variance])
    between = seeds.variances[both]
    variance = pictures + max(float(((between - residuals) / runs).sum()), 0.0)
    # a variance between seeds that came out below its residual is no surer for that
    uncertain = seeds.uncertainty(both, np.maximum(between, residuals) / runs)
    freedom = variance**2 / uncertain if uncertain else math.inf
    return _judged(first, second, one.mean - other.mean, variance, freedom)


def _judged(
    first: str, second: str, estimate: float, variance: float, freedom: float
) -> Difference:
    error = math.sqrt(variance)
    if error == 0:
        return Difference(first, second, estimate, estimate, estimate, float(estimate == 0))
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    p_value = float(2 * stats.t.sf(abs(estimate) / error, freedom))
    low, high = estimate - quantile * error, estimate + quantile * error
    return Difference(first, second, estimate, low, high, p_value)


@dataclass(frozen=True)
class Moderated:
    """Variances that lend each other strength, and how far they do."""

    variances: Floats
    freedoms: Floats
    """Degrees of freedom that each had by itself."""
    shared: Floats
    """Share of each one that is the common value, 0 to 1."""

    def uncertainty(self, members: list[int], parts: Floats) -> float:
        """Half the variance of the sum of `parts`, which are proportional to these members.

        What is common to them is uncertain with all groups' degrees of freedom together, and in
        the same direction; the rest of each with its own.
        """
        shared, total = self.shared[members], float(self.freedoms.sum())
        common, own = float((parts * shared).sum()), parts * (1 - shared)
        apart = float((own**2 / self.freedoms[members]).sum())
        return apart + (common**2 + 2 * common * float(own.sum())) / total


def moderated(variances: Sequence[float], freedoms: Sequence[int], floor: float) -> Moderated:
    """Variances shrunk towards a common one as far as they agree (Smyth 2004, empirical Bayes)."""
    found = np.maximum(np.asarray(variances, dtype=float), floor)
    own = np.asarray(freedoms, dtype=float)
    if len(found) == 1:
        return Moderated(found, own, np.zeros_like(found))
    logs = np.log(found) - special.digamma(own / 2) + np.log(own / 2)
    excess = float(logs.var(ddof=1) - special.polygamma(1, own / 2).mean())
    if excess <= 0:
        pooled = float((found * own).sum() / own.sum())
        return Moderated(np.full_like(found, pooled), own, np.ones_like(own))
    prior_freedom = 2 * _trigamma_inverse(excess)
    half = prior_freedom / 2
    prior = math.exp(float(logs.mean()) + float(special.digamma(half)) - math.log(half))
    shared = prior_freedom / (prior_freedom + own)
    return Moderated(shared * prior + (1 - shared) * found, own, shared)


def _trigamma_inverse(value: float) -> float:
    """Smyth 2004's Newton iteration, which converges from below."""
    if value > 1e7:
        return float(value**-0.5)
    if value < 1e-6:
        return 1 / value
    y = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(special.polygamma(1, y))
        step = trigamma * (1 - trigamma / value) / float(special.polygamma(2, y))
        y += step
        if abs(step / y) < 1e-10:
            break
    return y


def model_differences(models: Mapping[str, Correct]) -> list[Difference]:
    """Every pair of single models, judged beyond these pictures: nothing is said of other seeds."""
    pairs = []
    for a, b in combinations(models, 2):
        paired_N = models[a].astype(np.float64) - models[b]
        variance = float(paired_N.var(ddof=1)) / len(paired_N)
        pair = _judged(a, b, float(paired_N.mean()), variance, len(paired_N) - 1)
        pairs.append(replace(pair, p_mcnemar=mcnemar(models[a], models[b])))
    return _with_holm(pairs, len(models))


def _with_holm(pairs: Sequence[Difference], num_groups: int) -> list[Difference]:
    corrected = holm([pair.p_value for pair in pairs], num_groups)
    return [replace(pair, p_holm=p) for pair, p in zip(pairs, corrected, strict=True)]


def mcnemar(first_N: Correct, second_N: Correct) -> float:
    """Exact two-sided p that two models err equally often (https://doi.org/10.1007/BF02295996)."""
    only_first = int((first_N & ~second_N).sum())
    only_second = int((second_N & ~first_N).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def holm(p_values: Sequence[float], num_groups: int) -> list[float]:
    """p-values of all pairs of groups, corrected for their number.

    Holm 1979 (https://www.jstor.org/stable/4615733), each step counting only as many pairs as can
    still be equal (Shaffer 1986, https://doi.org/10.1080/01621459.1986.10478341): of four groups,
    once two of them differ, at most three pairs are.
    """
    possible = _numbers_of_equal_pairs(num_groups)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    so_far = 0.0
    for rank, index in enumerate(order):
        left = max(number for number in possible if number <= len(p_values) - rank)
        so_far = max(so_far, min(1.0, p_values[index] * left))
        corrected[index] = so_far
    return corrected


def _numbers_of_equal_pairs(num_groups: int) -> set[int]:
    """How many pairs can be equal at once: groups fall into sets of equals, in any way."""
    found = [{0}]
    for size in range(1, num_groups + 1):
        found.append(
            {math.comb(n, 2) + rest for n in range(1, size + 1) for rest in found[size - n]}
        )
    return found[num_groups]


@dataclass(frozen=True)
class Corrected:
    """An accuracy freed of having been the best of many, and its interval."""

    accuracy: float
    low: float
    high: float


def selection_corrected(
    correct_RN: Correct,
    groups: Sequence[str] | None = None,
    num_resamples: int = 500,
    seed: int = 0,
) -> Corrected:
    """The winner's accuracy, chosen on resampled pictures and scored on those left out.

    The winner is the best run; where runs have groups, the best run of the group with the best
    mean. BBC-CV: Tsamardinos, Greasidou & Borboudakis 2018,
    https://doi.org/10.1007/s10994-018-5714-4.
    """
    chance = np.random.default_rng(seed)
    right_NR = correct_RN.T.astype(np.float32)
    num_pictures, num_runs = right_NR.shape
    if num_pictures < 2:
        only = float(right_NR.max())
        return Corrected(only, 0.0, 1.0)
    drawn = chance.integers(num_pictures, size=(num_resamples, num_pictures))
    drawn += np.arange(num_resamples)[:, None] * num_pictures
    counts_BN = np.bincount(drawn.ravel(), minlength=num_resamples * num_pictures)
    counts_BN = counts_BN.reshape(num_resamples, num_pictures)
    left_out_BN = (counts_BN == 0).astype(np.float32)
    chosen_B = _winner(counts_BN.astype(np.float32) @ right_NR, groups or [""] * num_runs)
    hits_BR = left_out_BN @ right_NR
    left_out_B = left_out_BN.sum(axis=1)
    usable = left_out_B > 0
    scores = (hits_BR[np.arange(num_resamples), chosen_B] / np.maximum(left_out_B, 1))[usable]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores, (tail, 1 - tail))
    return Corrected(float(scores.mean()), float(low), float(high))


def _winner(hits_BR: Any, groups: Sequence[str]) -> Any:
    """Of each resample, the best run of the group with the best mean, (B,)."""
    names, group_R = np.unique(np.asarray(groups), return_inverse=True)
    members_GR = group_R == np.arange(len(names))[:, None]
    means_BG = hits_BR @ (members_GR / members_GR.sum(axis=1, keepdims=True)).T
    return np.where(members_GR[means_BG.argmax(axis=1)], hits_BR, -1).argmax(axis=1)
