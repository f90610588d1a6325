from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from finetune.analysis.statistics import (
    Correct,
    group_differences,
    holm,
    mcnemar,
    model_differences,
    moderated,
    selection_corrected,
)

NUM_PICTURES = 2000
NUM_SWEEPS = 300
SPREADS = (0.0, 0.005, 0.01)
NUMBERS_OF_RUNS = ((3, 3, 3, 3), (5, 5, 5, 5), (3, 4, 6, 10))


def simulated(
    chance: np.random.Generator,
    accuracies: Sequence[float],
    runs: Sequence[int],
    spread: float,
    num_pictures: int = NUM_PICTURES,
) -> dict[str, Correct]:
    """Runs whose accuracies vary around that of their strategy, on easy and hard pictures.

    The difficulty of a picture is mostly the same for all strategies.
    """
    common = chance.standard_normal(num_pictures)
    groups = {}
    for name, accuracy, num_runs in zip("abcd", accuracies, runs, strict=True):
        own = chance.standard_normal(num_pictures)
        noise = chance.standard_normal((num_runs, num_pictures))
        hardness = math.sqrt(0.7) * common + math.sqrt(0.05) * own + math.sqrt(0.25) * noise
        reached = accuracy + spread * chance.standard_normal((num_runs, 1))
        groups[name] = hardness < stats.norm.ppf(reached)
    return groups


def above(share: float, count: int) -> float:
    """The upper bound of the observed share of so many draws, exceeded once in a thousand cases."""
    return share + 3.1 * math.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize("runs", NUMBERS_OF_RUNS)
@pytest.mark.parametrize("spread", SPREADS)
def test_four_equal_strategies_raise_a_false_alarm_in_at_most_5_percent_of_sweeps(
    spread: float, runs: tuple[int, ...]
) -> None:
    chance = np.random.default_rng(1)
    sweeps = [
        group_differences(simulated(chance, [0.8] * 4, runs, spread)) for _ in range(NUM_SWEEPS)
    ]
    alarms = sum(any(pair.significant for pair in pairs) for pairs in sweeps)
    assert alarms / NUM_SWEEPS <= above(0.05, NUM_SWEEPS)
    covered = [pair.low <= 0 <= pair.high for pairs in sweeps for pair in pairs]
    # the six pairs of a sweep are not independent
    assert np.mean(covered) >= 1 - above(0.05, 2 * NUM_SWEEPS)


@pytest.mark.parametrize("spread", SPREADS)
def test_five_seeds_detect_three_points_in_80_percent_and_cover_them_in_95_percent(
    spread: float,
) -> None:
    chance = np.random.default_rng(2)
    found, covered = [], []
    for _ in range(NUM_SWEEPS):
        groups = simulated(chance, [0.83, 0.80, 0.80, 0.80], [5] * 4, spread)
        for pair in group_differences(groups)[:3]:
            found.append(pair.significant and pair.estimate > 0)
            covered.append(pair.low <= 0.03 <= pair.high)
    assert np.mean(found) >= 0.8
    assert np.mean(covered) >= 1 - above(0.05, NUM_SWEEPS)


def test_single_models_give_false_alarms_about_strategies_if_seeds_spread() -> None:
    """Why a comparison of strategies needs several seeds: one run each, a spread of 0.9 points."""
    chance = np.random.default_rng(3)
    alarms = 0
    for _ in range(NUM_SWEEPS):
        runs = simulated(chance, [0.8] * 4, [1] * 4, 0.009)
        models = {name: correct_RN[0] for name, correct_RN in runs.items()}
        alarms += any(pair.significant for pair in model_differences(models))
    assert alarms / NUM_SWEEPS > 0.3


def test_the_interval_is_the_pigeonhole_bootstraps_with_the_residual_counted_once() -> None:
    """Compared with resampling, with so many seeds that the small-sample correction is small."""
    chance = np.random.default_rng(4)
    groups = simulated(chance, [0.8, 0.78, 0.8, 0.8], [40] * 4, 0.01)
    a, b = groups["a"], groups["b"]
    draws = []
    for _ in range(1500):
        pictures = chance.integers(NUM_PICTURES, size=NUM_PICTURES)
        means = [one[chance.integers(40, size=40)][:, pictures].mean() for one in (a, b)]
        draws.append(means[0] - means[1])
    (pair,) = group_differences({"a": a, "b": b})
    assert pair.estimate == pytest.approx(a.mean() - b.mean())
    half = (pair.high - pair.low) / 2
    once = sum(one.var(axis=0, ddof=1).mean() / NUM_PICTURES / 40 for one in (a, b))
    assert half == pytest.approx(1.99 * math.sqrt(np.var(draws) - 2 * once), rel=0.06)


@pytest.mark.parametrize(("num_pictures", "lowest"), [(20, 0.92), (50, 0.93), (200, 0.94)])
def test_the_interval_of_two_models_covers_their_difference(
    num_pictures: int, lowest: float
) -> None:
    """Exact coverage, over all counts of pictures that only one of the models gets right."""
    counts = [
        (b, c)
        for b in range(min(num_pictures, 60) + 1)
        for c in range(min(num_pictures, 60) + 1 - b)
    ]
    intervals = np.array([_interval(b, c, num_pictures) for b, c in counts])
    b, c = np.array(counts).T
    covered = []
    for first, second in (
        (0.7, 0.7),
        (0.9, 0.9),
        (0.99, 0.99),
        (0.9, 0.8),
        (0.99, 0.9),
    ):
        for overlap in (0.0, 0.5):  # from independent errors to errors on the same pictures
            both = first * second + overlap * (min(first, second) - first * second)
            chances = [first - both, second - both, 1 - first - second + 2 * both]
            weight = stats.multinomial.pmf(
                np.stack([b, c, num_pictures - b - c], 1), num_pictures, chances
            )
            inside = (intervals[:, 0] <= first - second) & (first - second <= intervals[:, 1])
            covered.append(weight[inside].sum() / weight.sum())
    assert min(covered) >= lowest
    assert np.mean(covered) >= 0.95


def _interval(only_first: int, only_second: int, num_pictures: int) -> tuple[float, float]:
    first, second = np.zeros((2, num_pictures), bool)
    first[:only_first] = second[only_first : only_first + only_second] = True
    (pair,) = model_differences({"a": first, "b": second})
    return pair.low, pair.high


def test_two_models_that_are_right_on_the_same_pictures_may_differ_on_others() -> None:
    same = np.arange(49) > 1
    (pair,) = model_differences({"a": same, "b": same})
    assert pair.estimate == 0 and not pair.significant
    assert pair.high == -pair.low > 0.03


def test_the_interval_excludes_zero_exactly_where_the_difference_is_significant() -> None:
    chance = np.random.default_rng(9)
    found = []
    for _ in range(40):
        groups = simulated(chance, [0.86, 0.83, 0.8, 0.8], [3, 3, 4, 5], 0.01)
        models = {name: runs[0] for name, runs in groups.items()}
        for pair in [*group_differences(groups), *model_differences(models)]:
            assert pair.significant == (not pair.low <= 0 <= pair.high)
            found.append(pair.significant)
    assert 0.1 < np.mean(found) < 0.9


def test_few_pictures_and_seeds_give_no_absurd_intervals() -> None:
    chance = np.random.default_rng(1)
    widths, covered = [], []
    for _ in range(100):
        groups = simulated(chance, [0.95] * 4, [3] * 4, 0.01, num_pictures=49)
        for pair in group_differences(groups):
            widths.append(pair.high - pair.low)
            covered.append(pair.low <= 0 <= pair.high)
    assert max(widths) < 0.5
    assert np.mean(covered) >= 0.95


def test_equal_runs_have_no_difference() -> None:
    same = np.tile(np.arange(50) % 5 > 0, (3, 1))
    (pair,) = group_differences({"a": same, "b": same})
    assert (pair.estimate, pair.significant) == (0, False)


def test_equal_variances_are_pooled_and_unequal_ones_are_not() -> None:
    alike = moderated([1.0, 1.1, 0.9, 1.0], [4] * 4, floor=0)
    np.testing.assert_allclose(alike.variances, 1.0)
    assert alike.shared.tolist() == [1] * 4
    unlike = moderated([1e-4, 1e-2, 1.0, 100.0], [4] * 4, floor=0)
    assert all(b > 20 * a for a, b in pairwise(unlike.variances))
    assert unlike.shared.max() < 0.3


def test_holm_counts_the_pairs_that_can_still_be_equal() -> None:
    assert holm([0.01, 0.04, 0.03], 3) == pytest.approx([0.03, 0.04, 0.03])
    assert holm([0.6, 0.5, 0.9], 3) == [1.0, 1.0, 1.0]
    assert holm([0.02], 2) == [0.02]
    assert holm([], 1) == []
    equal = [0.001] * 6
    assert holm(equal, 4) == pytest.approx([0.006] * 6)
    falling = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]
    counted = [corrected / p for corrected, p in zip(holm(falling, 4), falling, strict=True)]
    assert counted == pytest.approx([6, 3, 3, 3, 2, 1])  # Shaffer 1986, for four groups


def test_equal_strategies_give_no_false_alarms_next_to_a_better_one() -> None:
    """Where Shaffer's step counts fewer pairs than Holm's."""
    chance = np.random.default_rng(8)
    alarms = 0
    for _ in range(NUM_SWEEPS):
        groups = simulated(chance, [0.9, 0.8, 0.8, 0.8], [5] * 4, 0.01)
        alarms += any(pair.significant for pair in group_differences(groups)[3:])
    assert alarms / NUM_SWEEPS <= above(0.05, NUM_SWEEPS)


def test_mcnemar_counts_only_pictures_on_which_two_models_differ() -> None:
    first = np.array([True] * 8 + [False] * 2 + [True] * 90)
    second = np.array([False] * 8 + [True] * 2 + [True] * 90)
    assert mcnemar(first, second) == pytest.approx(stats.binomtest(8, 10).pvalue)
    assert mcnemar(first, first) == 1


def test_the_accuracy_of_the_best_of_forty_equal_runs_is_corrected() -> None:
    chance = np.random.default_rng(5)
    raw, corrected = [], []
    for _ in range(20):
        correct_RN = chance.random((40, 400)) < 0.7
        raw.append(correct_RN.mean(axis=1).max())
        corrected.append(selection_corrected(correct_RN, num_resamples=200).accuracy)
    assert np.mean(raw) > 0.735
    assert np.mean(corrected) == pytest.approx(0.7, abs=0.01)


def test_the_accuracy_of_a_single_run_is_not_corrected() -> None:
    correct_RN = np.random.default_rng(6).random((1, 1000)) < 0.8
    corrected = selection_corrected(correct_RN)
    assert corrected.accuracy == pytest.approx(correct_RN.mean(), abs=0.005)
    assert corrected.low < correct_RN.mean() < corrected.high
