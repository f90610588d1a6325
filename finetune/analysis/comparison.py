"""What can be said of strategies from what came of their runs.

Turns outcomes into a comparison: a summary a strategy, differences with their intervals, the
winner's accuracy freed of selection, marks and warnings, and the answer in a sentence. Draws
nothing.

    >>> print(compare(read_runs(Path("runs"))).headline)  # doctest: +SKIP
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from finetune.analysis.by_strategy import StrategySummary, accuracy_of, result_of, standings
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.statistics import (
    MIN_SEEDS,
    Corrected,
    Difference,
    group_differences,
    model_differences,
    selection_corrected,
)
from finetune.system.text import listed

CONFIRM = "python -m finetune confirm RUNS_DIR"


@dataclass(frozen=True)
class Comparison:
    """Everything that the page and the terminal show."""

    standings: tuple[StrategySummary, ...]
    """The most accurate strategy first."""
    differences: tuple[Difference, ...]
    about_strategies: bool
    """Whether `differences` judge strategies, over seeds; else only these models."""
    corrected: Corrected | None
    num_candidates: int
    warnings: tuple[str, ...]
    others: tuple[RunRecord, ...] = field(default=())
    """Runs that can't be compared with these, or did not end well."""

    @property
    def winner(self) -> RunRecord | None:
        return self.standings[0].best if self.standings else None

    def between(self, first: str, second: str) -> Difference | None:
        """The difference of two strategies, whichever way round it was taken."""
        return next((d for d in self.differences if {d.first, d.second} == {first, second}), None)

    @cached_property
    def headline(self) -> str:
        """The answer in a sentence or two."""
        return _headline(self)

    @cached_property
    def advice(self) -> str:
        """What would make the answer stand on firmer ground, or nothing."""
        if self.about_strategies or len(self.standings) < 2:
            return ""
        return (
            "This compares these models, not the strategies: another seed could turn the order. "
            f"A verdict on strategies needs at least {MIN_SEEDS} fresh seeds of each one's best "
            f"setting: {CONFIRM}"
        )


def compare(outcomes: Sequence[RunRecord]) -> Comparison:
    """What can be said of these runs together."""
    comparable, warnings = _comparable([one for one in outcomes if one.result is not None])
    stand = standings(comparable, outcomes)
    judged = [one for one in stand if one.fresh]
    about_strategies = len(judged) > 1
    if about_strategies:
        left_out = [one for one in stand if not one.fresh]
        if left_out:
            warnings.append(
                f"{', '.join(one.strategy for one in left_out)}: fewer than {MIN_SEEDS} fresh "
                "seeds of one setting, so no verdict includes it"
            )
        stand = [*judged, *left_out]
        differences = group_differences(
            {one.strategy: np.stack([_correct(run) for run in one.chosen]) for one in judged}
        )
        candidates = [(run, one.strategy) for one in judged for run in one.chosen]
    else:
        if len(stand) > 1:  # a mean of seeds and a best run can't be ranked together
            stand = sorted([one.best_alone for one in stand], key=lambda one: -one.accuracy)
        models = {one.strategy: _correct(one.best) for one in stand}
        enough = len(stand) > 1 and len(_correct(stand[0].best)) > 1
        differences = model_differences(models) if enough else []
        candidates = [(run, "") for run in comparable]
    corrected = None
    if candidates:
        corrected = selection_corrected(
            np.stack([_correct(run) for run, _ in candidates]),
            [group for _, group in candidates],
            num_resamples=500 if len(candidates) <= 100 else 200,
        )
    included = {id(one) for one in comparable}
    return Comparison(
        standings=tuple(stand),
        differences=tuple(differences),
        about_strategies=about_strategies,
        corrected=corrected,
        num_candidates=len(candidates),
        warnings=tuple(warnings),
        others=tuple(one for one in outcomes if id(one) not in included),
    )


def _correct(outcome: RunRecord) -> Any:
    assert outcome.correct is not None
    return outcome.correct


# which runs can be compared


def _comparable(finished: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """The largest set of runs over the same pictures, and why the others are left out."""
    warnings = []
    without = [one for one in finished if one.correct is None]
    if without:
        warnings.append(f"{_runs(without)}: no predictions.npz, so left out of the comparison")
    groups: dict[tuple[str, str, bytes], list[RunRecord]] = defaultdict(list)
    for one in finished:
        if one.labels is not None:
            result = result_of(one)
            key = (result.dataset_fingerprint, result.split_fingerprint, one.labels.tobytes())
            groups[key].append(one)
    if not groups:
        return [], warnings
    largest = max(groups, key=lambda key: len(groups[key]))
    for key, members in groups.items():
        if key != largest:
            what = [
                label
                for label, ours, theirs in zip(
                    ("other data", "another split", "other validation pictures"),
                    largest,
                    key,
                    strict=True,
                )
                if ours != theirs
            ]
            warnings.append(f"{_runs(members)}: {what[0]}, so left out of the comparison")
    sources = Counter(result_of(one).weights_fingerprint for one in groups[largest])
    del sources[None]
    if len(sources) > 1:
        counts = ", ".join(f"{name[:8]} ({n} runs)" for name, n in sources.most_common() if name)
        warnings.append(f"the runs started from different weights: {counts}")
    return groups[largest], warnings


def _runs(outcomes: Sequence[RunRecord]) -> str:
    names = ", ".join(one.run_id for one in outcomes[:3])
    return f"{len(outcomes)} run{'s' * (len(outcomes) > 1)} ({names}{', …' * (len(outcomes) > 3)})"


# the answer in words


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.1f} %"


def points(difference: float) -> str:
    return f"{100 * difference:.1f}"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _headline(comparison: Comparison) -> str:
    if not comparison.standings:
        return "No run has ended well yet, so there is nothing to compare."
    leader = comparison.standings[0]
    best = leader.best
    if len(comparison.standings) == 1:
        return (
            f"Only {leader.strategy} has runs that ended well; its best, {best.name}, reaches "
            f"{percent(accuracy_of(best))}."
        )
    told: list[StrategySummary] = []
    untold: list[StrategySummary] = []
    for rival in comparison.standings[1:]:
        if difference := comparison.between(leader.strategy, rival.strategy):
            (told if difference.significant else untold).append(rival)
    if comparison.about_strategies:
        return _verdict(leader, told, untold, comparison)
    opening = f"The best model found is {best.name} at {percent(accuracy_of(best))}"
    if comparison.corrected and comparison.num_candidates > 1:
        opening += (
            f" ({percent(comparison.corrected.accuracy)} once corrected for being the best of "
            f"{comparison.num_candidates})"
        )
    if not told:
        return f"{opening}, but its lead over the other strategies' best can't be told from luck."
    within = max([one.within for one in told], key=len)
    closing = f"; it beats the best of {listed([one.strategy for one in told])}{within}"
    if untold:
        closing += f", and can't be told from luck against {listed([o.strategy for o in untold])}"
    return f"{opening}{closing}."


def _verdict(
    leader: StrategySummary,
    told: Sequence[StrategySummary],
    untold: Sequence[StrategySummary],
    comparison: Comparison,
) -> str:
    seeds = min(len(one.chosen) for one in (leader, *told, *untold))
    if untold:
        named = [f"{one.strategy} ({percent(one.accuracy)})" for one in (leader, *untold)]
        opening = f"{listed(named)} can't be told apart"
        between = "difference" if len(untold) == 1 else "differences"
        rest = f"over {seeds} fresh seeds, the {between} may be luck"
    else:
        opening = f"{leader.strategy} wins with {percent(leader.accuracy)}"
        rest = f"the mean of {len(leader.chosen)} fresh seeds"
    parts = []
    for rival in told:
        difference = comparison.between(leader.strategy, rival.strategy)
        assert difference is not None
        parts.append(
            f"{rival.strategy} is {points(abs(difference.estimate))} points worse{rival.within}"
        )
    return f"{opening}: {'; '.join([rest, *parts])}."
