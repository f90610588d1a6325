"""Differences between accuracies with confidence intervals and corrected p-values.

    >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03], num_groups=3)]
    [0.03, 0.04, 0.03]

Legend: R runs, N pictures, B resamples, G groups; `correct_RN` is true where run R classified
picture N correctly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

CONFIDENCE = 0.95
MIN_SEEDS = 3
"""The fewest runs of a setting, each with its own seed, from which a spread is estimated."""

Correct = np.ndarray[Any, np.dtype[np.bool_]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Difference:
    """The accuracy of the first minus that of the second, as a fraction, with its interval.

    The interval is corrected for the number of pairs as its p-value is: it excludes 0 if and only
    if `p_holm` is below 0.05.
    """

    first: str
    second: str
    estimate: float
    low: float
    high: float
    p_holm: float
    p_mcnemar: float | None = None

    @property
    def significant(self) -> bool:
        return self.p_holm < 1 - CONFIDENCE


@dataclass(frozen=True)
class _Uncorrected:
    """A difference before its correction for the number of pairs."""

    first: str
    second: str
    estimate: float
    centre: float
    """Of the interval, which may lie between the estimate and 0."""
    error: float
    freedom: float = math.inf
    p_mcnemar: float | None = None

    @property
    def p_value(self) -> float:
        return float(2 * stats.t.sf(abs(self.centre) / self.error, self.freedom))

    def corrected(self, p_holm: float, num_pairs: int) -> Difference:
        """With the p-value `p_holm`, from a step that counts so many pairs."""
        factor = p_holm / self.p_value if 0 < p_holm < 1 else num_pairs
        tail = (1 - CONFIDENCE) / 2 / factor
        half = float(stats.t.isf(tail, self.freedom)) * self.error
        low, high = max(self.centre - half, -1.0), min(self.centre + half, 1.0)
        return Difference(self.first, self.second, self.estimate, low, high, p_holm, self.p_mcnemar)


def group_differences(groups: Mapping[str, Correct]) -> list[Difference]:
    """The difference of every pair of groups, for other seeds and other pictures.

    The variance is the pigeonhole bootstrap's (Owen 2007, https://arxiv.org/abs/0712.1111) in
    closed form, with the residual counted once instead of three times: the variance between seeds
    plus that of the paired differences between pictures, minus the residual that both contain, and
    at least the variance between seeds. The variances between seeds are `moderated`; the interval
    uses Student's quantile with Satterthwaite's degrees of freedom; p-values and intervals are
    corrected over all pairs (`holm`).
    """
    rights = [correct_RN.astype(np.float64) for correct_RN in groups.values()]
    num_runs = np.array([len(right_RN) for right_RN in rights])
    assert min(num_runs) >= MIN_SEEDS
    per_picture = [right_RN.mean(axis=0) for right_RN in rights]
    residuals = np.array([residual_variance(right_RN) for right_RN in rights])
    seeds = moderated(
        [float(right_RN.mean(axis=1).var(ddof=1)) for right_RN in rights],
        num_runs - 1,
        floor=1 / (12 * rights[0].shape[1] ** 2),  # of rounding to one picture
    )
    pairs = []
    for (i, a), (j, b) in combinations(enumerate(groups), 2):
        both = [i, j]
        paired_N = per_picture[i] - per_picture[j]
        pictures = float(paired_N.var(ddof=1)) / len(paired_N)
        between, residual = seeds.variances[both], residuals[both]
        # an estimate below its residual is not more certain than the residual
        of_seeds = np.maximum(between, residual) / num_runs[both]
        variance = pictures + max(float(((between - residual) / num_runs[both]).sum()), 0.0)
        variance = max(variance, float(of_seeds.sum()))
        freedom = variance**2 / seeds.uncertainty(both, of_seeds)
        estimate = float(rights[i].mean()) - float(rights[j].mean())
        pairs.append(_Uncorrected(a, b, estimate, estimate, math.sqrt(variance), freedom))
    return _with_holm(pairs, len(groups))


def residual_variance(right_RN: Floats) -> float:
    """The part of the variance between runs that is random per picture; the variance between
    pictures contains it too."""
    num_runs, num_pictures = right_RN.shape
    accuracies, per_picture = right_RN.mean(axis=1), right_RN.mean(axis=0)
    residuals = right_RN - accuracies[:, None] - per_picture + right_RN.mean()
    freedom = (num_runs - 1) * (num_pictures - 1)
    return float((residuals**2).sum() / freedom / num_pictures)


@dataclass(frozen=True)
class Moderated:
    """Variances of groups that borrow strength from each other."""

    variances: Floats
    freedoms: Floats
    """Degrees of freedom of each group alone."""
    shared: Floats
    """Share of the common value in each variance, 0 to 1."""

    def uncertainty(self, members: list[int], parts: Floats) -> float:
        """Half the variance of the sum of `parts`, which are proportional to these members.

        The common value has the degrees of freedom of all groups together, and its errors are the
        same in all parts; the rest of each part has its own degrees of freedom.
        """
        shared, total = self.shared[members], float(self.freedoms.sum())
        common, own = float((parts * shared).sum()), parts * (1 - shared)
        independent = float((own**2 / self.freedoms[members]).sum())
        return independent + (common**2 + 2 * common * float(own.sum())) / total


def moderated(variances: Sequence[float], freedoms: ArrayLike, floor: float) -> Moderated:
    """Variances shrunk towards a common one as far as they agree.

    Empirical Bayes: Smyth 2004, https://doi.org/10.2202/1544-6115.1027.
    """
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
    """The Newton iteration of Smyth 2004, which converges from below."""
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
    """The difference of every pair of single models, for other pictures but not for other seeds.

    The interval is Wald's with one more picture that only the first classifies correctly, and one
    that only the second does (Bonett and Price 2012, https://doi.org/10.3102/1076998611411915).
    """
    pairs = []
    for a, b in combinations(models, 2):
        paired_N = models[a].astype(np.float64) - models[b]
        adjusted = np.append(paired_N, [1.0, -1.0])
        error = math.sqrt(adjusted.var() / len(adjusted))
        pairs.append(
            _Uncorrected(
                *(a, b, float(paired_N.mean()), float(adjusted.mean()), error),
                p_mcnemar=mcnemar(models[a], models[b]),
            )
        )
    return _with_holm(pairs, len(models))


def _with_holm(pairs: Sequence[_Uncorrected], num_groups: int) -> list[Difference]:
    corrected = holm([pair.p_value for pair in pairs], num_groups)
    return [pair.corrected(p, len(pairs)) for pair, p in zip(pairs, corrected, strict=True)]


def mcnemar(first_N: Correct, second_N: Correct) -> float:
    """Exact two-sided p that two models err equally often (https://doi.org/10.1007/BF02295996)."""
    only_first = int((first_N & ~second_N).sum())
    num_different = int((first_N ^ second_N).sum())
    return float(stats.binomtest(only_first, num_different).pvalue) if num_different else 1.0


def holm(p_values: Sequence[float], num_groups: int) -> list[float]:
    """p-values of all pairs of groups, corrected for their number.

    Holm 1979 (https://www.jstor.org/stable/4615733), where each step counts only the pairs that
    can still be equal (Shaffer 1986, https://doi.org/10.1080/01621459.1986.10478341): if two of
    four groups differ, at most three pairs are equal.
    """
    possible = _numbers_of_equal_pairs(num_groups)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, so_far = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        left = max(number for number in possible if number <= len(p_values) - rank)
        so_far = max(so_far, min(1.0, p_values[index] * left))
        corrected[index] = so_far
    return corrected


def _numbers_of_equal_pairs(num_groups: int) -> set[int]:
    """The possible numbers of equal pairs, over all partitions of the groups into equal ones."""
    found = [{0}]
    for size in range(1, num_groups + 1):
        found.append(
            {math.comb(n, 2) + rest for n in range(1, size + 1) for rest in found[size - n]}
        )
    return found[num_groups]


@dataclass(frozen=True)
class Corrected:
    """The best accuracy of several, corrected for the selection, with its interval."""

    accuracy: float
    low: float
    high: float


def selection_corrected(
    correct_RN: Correct, groups: Sequence[str] | None = None, num_resamples: int = 500
) -> Corrected:
    """The accuracy of the best run, chosen on resampled pictures and scored on those left out.

    With groups, it is the best run of the group with the best mean. BBC-CV: Tsamardinos, Greasidou
    & Borboudakis 2018, https://doi.org/10.1007/s10994-018-5714-4.
    """
    rng = np.random.default_rng(0)
    right_NR = correct_RN.T.astype(np.float32)
    num_pictures, num_runs = right_NR.shape
    if num_pictures < 2:
        return Corrected(float(right_NR.max()), 0.0, 1.0)
    drawn = rng.integers(num_pictures, size=(num_resamples, num_pictures))
    drawn += np.arange(num_resamples)[:, None] * num_pictures
    counts_BN = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    left_out_BN = (counts_BN == 0).astype(np.float32)
    chosen_B = _best_run(counts_BN.astype(np.float32) @ right_NR, groups or [""] * num_runs)
    hits_B = (left_out_BN @ right_NR)[np.arange(num_resamples), chosen_B]
    left_out_B = left_out_BN.sum(axis=1)
    scores = (hits_B / np.maximum(left_out_B, 1))[left_out_B > 0]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores, (tail, 1 - tail))
    return Corrected(float(scores.mean()), float(low), float(high))


def _best_run(hits_BR: Any, groups: Sequence[str]) -> Any:
    """The best run of the group with the best mean in each resample, (B,)."""
    names, group_R = np.unique(np.asarray(groups), return_inverse=True)
    members_GR = group_R == np.arange(len(names))[:, None]
    means_BG = hits_BR @ (members_GR / members_GR.sum(axis=1, keepdims=True)).T
    return np.where(members_GR[means_BG.argmax(axis=1)], hits_BR, -1).argmax(axis=1)
