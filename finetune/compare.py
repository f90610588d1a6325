"""What can be said of strategies from what came of their runs.

Turns outcomes into a comparison: a summary a strategy, differences with their intervals, the
winner's accuracy freed of selection, marks and warnings, and the answer in a sentence. Draws
nothing.

    >>> print(compare(read_outcomes(Path("runs"))).headline)  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from finetune.intervals import (
    MIN_SEEDS,
    Corrected,
    Difference,
    group_differences,
    model_differences,
    selection_corrected,
)
from finetune.outcomes import Outcome
from finetune.result import RunResult

FITTED_TRAIN_ACC = 0.9
"""Training accuracy below which a strategy has not fitted what it was shown."""

_NOT_A_SETTING = frozenset(
    (
        *("seed", "name", "group", "out", "project", "entity"),
        *("cache", "cache_dir", "cache_gb", "data_dir"),
    )
)


def setting_of(config: Mapping[str, Any]) -> str:
    """What two runs share that differ in seed, name and place alone."""
    kept = {key: value for key, value in config.items() if key not in _NOT_A_SETTING}
    return json.dumps(kept, sort_keys=True, default=str)


@dataclass(frozen=True)
class Standing:
    """One strategy: its chosen setting, how that did, and what to keep in mind."""

    strategy: str
    outcomes: tuple[Outcome, ...]
    """All its runs, however they ended."""
    chosen: tuple[Outcome, ...]
    """Finished runs of the chosen setting that the verdict rests on, fresh seeds where there are
    some."""
    fresh: bool
    """Whether `chosen` are at least three seeds that played no part in choosing the setting."""
    marks: tuple[str, ...]

    @property
    def best(self) -> Outcome:
        return max(self.chosen, key=_accuracy)

    @property
    def accuracy(self) -> float:
        """Mean best validation accuracy of the chosen setting's runs."""
        return float(np.mean([_accuracy(one) for one in self.chosen]))

    @property
    def num_diverged(self) -> int:
        return sum(one.diverged for one in self.outcomes)

    @property
    def epochs(self) -> int:
        return int(self.best.config["epochs"])

    @property
    def behind(self) -> str:
        """How its being behind is put: never `worse` where it may not have been given its due."""
        return f"worse within {self.epochs} epochs" if self.marks else "worse"


@dataclass(frozen=True)
class Comparison:
    """Everything that the page and the terminal show."""

    standings: tuple[Standing, ...]
    """The most accurate strategy first."""
    differences: tuple[Difference, ...]
    about_strategies: bool
    """Whether `differences` judge strategies, over seeds; else only these models."""
    corrected: Corrected | None
    num_candidates: int
    warnings: tuple[str, ...]
    others: tuple[Outcome, ...] = field(default=())
    """Runs that can't be compared with these, or did not end well."""

    @property
    def winner(self) -> Outcome | None:
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
            "setting: python -m finetune confirm RUNS_DIR"
        )


def compare(outcomes: Sequence[Outcome]) -> Comparison:
    """What can be said of these runs together."""
    comparable, warnings = _comparable([one for one in outcomes if one.result is not None])
    standings = _standings(comparable, outcomes)
    judged = [one for one in standings if one.fresh]
    about_strategies = len(judged) > 1
    differences: list[Difference] = []
    if about_strategies:
        left_out = [one.strategy for one in standings if not one.fresh]
        if left_out:
            warnings.append(
                f"{', '.join(left_out)}: fewer than {MIN_SEEDS} fresh seeds of one setting, so no "
                "verdict includes it"
            )
            standings = [*judged, *(one for one in standings if not one.fresh)]
        differences = group_differences(
            {one.strategy: np.stack([_correct(run) for run in one.chosen]) for one in judged}
        )
    elif len(standings) > 1:
        differences = model_differences({one.strategy: _correct(one.best) for one in standings})
    corrected = None
    if comparable:
        resamples = 500 if len(comparable) <= 100 else 200
        corrected = selection_corrected(np.stack([_correct(one) for one in comparable]), resamples)
    included = {id(one) for one in comparable}
    return Comparison(
        standings=tuple(standings),
        differences=tuple(differences),
        about_strategies=about_strategies,
        corrected=corrected,
        num_candidates=len(comparable),
        warnings=tuple(warnings),
        others=tuple(one for one in outcomes if id(one) not in included),
    )


def _accuracy(outcome: Outcome) -> float:
    return _result(outcome).best_val_acc


def _result(outcome: Outcome) -> RunResult:
    assert outcome.result is not None
    return outcome.result


def _correct(outcome: Outcome) -> Any:
    assert outcome.correct is not None
    return outcome.correct


# which runs can be compared


def _comparable(finished: Sequence[Outcome]) -> tuple[list[Outcome], list[str]]:
    """The largest set of runs over the same pictures, and why the others are left out."""
    warnings = []
    without = [one for one in finished if one.correct is None]
    if without:
        warnings.append(f"{_runs(without)}: no predictions.npz, so left out of the comparison")
    groups: dict[tuple[str, str, bytes], list[Outcome]] = defaultdict(list)
    for one in finished:
        if one.labels is not None:
            result = _result(one)
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
    sources = Counter(_result(one).weights_fingerprint for one in groups[largest])
    del sources[None]
    if len(sources) > 1:
        counts = ", ".join(f"{name[:8]} ({n} runs)" for name, n in sources.most_common() if name)
        warnings.append(f"the runs started from different weights: {counts}")
    return groups[largest], warnings


def _runs(outcomes: Sequence[Outcome]) -> str:
    names = ", ".join(one.run_id for one in outcomes[:3])
    return f"{len(outcomes)} run{'s' * (len(outcomes) > 1)} ({names}{', …' * (len(outcomes) > 3)})"


# how each strategy stands


def _standings(comparable: Sequence[Outcome], outcomes: Sequence[Outcome]) -> list[Standing]:
    found = []
    for strategy in dict.fromkeys(one.strategy for one in comparable):
        mine = [one for one in comparable if one.strategy == strategy]
        everything = tuple(one for one in outcomes if one.strategy == strategy)
        chosen, fresh = _chosen(mine)
        found.append(
            Standing(strategy, everything, chosen, fresh, _marks(chosen, mine, everything))
        )
    return sorted(found, key=lambda one: -one.accuracy)


def _chosen(mine: Sequence[Outcome]) -> tuple[tuple[Outcome, ...], bool]:
    """The runs of the setting with the most fresh seeds; else the best run alone.

    A seed is fresh for a setting when no other setting of the strategy was run with it: then it
    can't have helped to choose that setting.
    """
    settings_of_seed: dict[int, set[str]] = defaultdict(set)
    for one in mine:
        settings_of_seed[_result(one).seed].add(setting_of(one.config))
    fresh: dict[str, dict[int, Outcome]] = defaultdict(dict)
    for one in mine:
        if len(settings_of_seed[_result(one).seed]) == 1:
            fresh[setting_of(one.config)].setdefault(_result(one).seed, one)
    confirmed = [tuple(runs.values()) for runs in fresh.values() if len(runs) >= MIN_SEEDS]
    if not confirmed:
        return (max(mine, key=_accuracy),), False
    return max(confirmed, key=lambda runs: (len(runs), np.mean([*map(_accuracy, runs)]))), True


def _marks(
    chosen: Sequence[Outcome], mine: Sequence[Outcome], everything: Sequence[Outcome]
) -> tuple[str, ...]:
    """Why a strategy may not have been given its due."""
    marks = []
    best = max(mine, key=_accuracy)
    tried = sorted({float(one.config["learning_rate"]) for one in everything})
    rate = float((chosen[0] if len(chosen) > 1 else best).config["learning_rate"])
    if len(tried) > 1 and rate in (tried[0], tried[-1]):
        side = "smallest" if rate == tried[0] else "largest"
        marks.append(f"its best learning rate, {rate:g}, is the {side} that was tried")
    results = [_result(one) for one in chosen]
    improving = [one for one in results if one.best_epoch == one.epochs_run - 1]
    if 2 * len(improving) > len(results):
        marks.append("still improving at its last epoch")
    reached = [max((row["train_acc"] for row in one.rows), default=1.0) for one in chosen]
    if np.mean(reached) < FITTED_TRAIN_ACC:
        marks.append(f"training accuracy stayed at {np.mean(reached):.0%}")
    return tuple(marks)


# the answer in words


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.1f} %"


def points(difference: float) -> str:
    return f"{100 * difference:.1f}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _headline(comparison: Comparison) -> str:
    if not comparison.standings:
        return "No run has ended well yet, so there is nothing to compare."
    leader = comparison.standings[0]
    best = leader.best
    if len(comparison.standings) == 1:
        return (
            f"Only {leader.strategy} has runs that ended well; its best, {best.name}, reaches "
            f"{percent(_accuracy(best))}."
        )
    told: list[Standing] = []
    untold: list[Standing] = []
    for rival in comparison.standings[1:]:
        if difference := comparison.between(leader.strategy, rival.strategy):
            (told if difference.told_from_luck else untold).append(rival)
    if comparison.about_strategies:
        return _verdict(leader, told, untold, comparison)
    opening = f"The best model found is {best.name} at {percent(_accuracy(best))}"
    if comparison.corrected and comparison.num_candidates > 1:
        opening += (
            f" ({percent(comparison.corrected.accuracy)} once corrected for being the best of "
            f"{comparison.num_candidates})"
        )
    if not told:
        return f"{opening}, but its lead over the other strategies' best can't be told from luck."
    closing = f"; it beats the best of {_listed([one.strategy for one in told])}"
    if untold:
        closing += f", and can't be told from luck against {_listed([o.strategy for o in untold])}"
    return f"{opening}{closing}."


def _verdict(
    leader: Standing, told: Sequence[Standing], untold: Sequence[Standing], comparison: Comparison
) -> str:
    seeds = min(len(one.chosen) for one in (leader, *told, *untold))
    if untold:
        named = [f"{one.strategy} ({percent(one.accuracy)})" for one in (leader, *untold)]
        opening = f"{_listed(named)} can't be told apart"
        rest = f"over {seeds} fresh seeds, the difference may be luck"
    else:
        opening = f"{leader.strategy} wins with {percent(leader.accuracy)}"
        rest = f"the mean of {len(leader.chosen)} fresh seeds"
    parts = []
    for rival in told:
        difference = comparison.between(leader.strategy, rival.strategy)
        assert difference is not None
        parts.append(
            f"{rival.strategy} is {points(abs(difference.estimate))} points {rival.behind}"
        )
    return f"{opening}: {'; '.join([rest, *parts])}."
