"""How each strategy stands: its chosen setting, what that reached, and what to keep in mind.

Turns outcomes into a standing for each strategy. Knows nothing about which strategy is better.

    >>> [one.strategy for one in standings(comparable, outcomes)]  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune.analysis.read_runs import RunRecord
from finetune.analysis.statistics import MIN_SEEDS
from finetune.runs.result import RunResult

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


def result_of(outcome: RunRecord) -> RunResult:
    assert outcome.result is not None
    return outcome.result


def accuracy_of(outcome: RunRecord) -> float:
    return result_of(outcome).best_val_acc


def mean_accuracy(outcomes: Sequence[RunRecord]) -> float:
    return float(np.mean([accuracy_of(one) for one in outcomes]))


def by_setting(outcomes: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """The runs of each setting together."""
    groups: dict[str, list[RunRecord]] = defaultdict(list)
    for one in outcomes:
        groups[setting_of(one.config)].append(one)
    return list(groups.values())


@dataclass(frozen=True)
class StrategySummary:
    """One strategy: its chosen setting, how that did, and what to keep in mind."""

    strategy: str
    outcomes: tuple[RunRecord, ...]
    """All its runs, however they ended; without those on other pictures."""
    chosen: tuple[RunRecord, ...]
    """Finished runs of the chosen setting that the verdict rests on, fresh seeds where there are
    some."""
    fresh: bool
    """Whether `chosen` are at least three seeds that played no part in choosing the setting."""
    marks: tuple[str, ...] = ()

    @property
    def best(self) -> RunRecord:
        return max(self.chosen, key=accuracy_of)

    @property
    def accuracy(self) -> float:
        """Mean best validation accuracy of the chosen setting's runs."""
        return mean_accuracy(self.chosen)

    @property
    def num_diverged(self) -> int:
        return sum(one.diverged for one in self.outcomes)

    @property
    def epochs(self) -> int:
        return int(self.best.config["epochs"])

    @property
    def within(self) -> str:
        """What a statement on its being behind is limited to: nothing, where it was given its
        due."""
        return f" within {self.epochs} epochs" if self.marks else ""

    @property
    def best_alone(self) -> StrategySummary:
        """The same strategy judged by its best run, whatever its seed."""
        finished = [one for one in self.outcomes if one.result is not None]
        alone = replace(self, chosen=(max(finished, key=accuracy_of),), fresh=False)
        return replace(alone, marks=_marks(alone))


def standings(
    comparable: Sequence[RunRecord], outcomes: Sequence[RunRecord]
) -> list[StrategySummary]:
    """A standing for each strategy with comparable runs, the most accurate first."""
    kept = {id(one) for one in comparable}
    found = []
    for strategy in dict.fromkeys(one.strategy for one in comparable):
        everything = [
            one
            for one in outcomes
            if one.strategy == strategy and (one.result is None or id(one) in kept)
        ]
        chosen, fresh = _chosen([one for one in everything if one.result is not None])
        one = StrategySummary(strategy, tuple(everything), chosen, fresh)
        found.append(replace(one, marks=_marks(one)))
    return sorted(found, key=lambda one: -one.accuracy)


def _chosen(mine: Sequence[RunRecord]) -> tuple[tuple[RunRecord, ...], bool]:
    """The runs with fresh seeds of the setting that others chose; else the best run alone.

    Fresh are runs that can't have helped to choose their setting: no other setting of the strategy
    was run with their seed, nor in their sweep. Between several settings with enough of them, the
    other runs decide, as they did when the seeds were still to come.
    """
    fresh: dict[str, dict[int, RunRecord]] = defaultdict(dict)
    for one in _fresh(mine):
        fresh[setting_of(one.config)].setdefault(result_of(one).seed, one)
    confirmed = {s: tuple(runs.values()) for s, runs in fresh.items() if len(runs) >= MIN_SEEDS}
    if len(confirmed) > 1:
        tried = _tried(mine)
        confirmed = {s: runs for s, runs in confirmed.items() if s in tried}
        confirmed = dict(sorted(confirmed.items(), key=lambda item: -tried[item[0]])[:1])
    for runs in confirmed.values():
        return runs, True
    return (max(mine, key=accuracy_of),), False


def _fresh(mine: Sequence[RunRecord]) -> list[RunRecord]:
    settings: dict[tuple[str, object], set[str]] = defaultdict(set)
    for one in mine:
        for company in _company(one):
            settings[company].add(setting_of(one.config))
    return [one for one in mine if all(len(settings[company]) == 1 for company in _company(one))]


def _company(one: RunRecord) -> list[tuple[str, object]]:
    group = one.config.get("group")
    return [("seed", result_of(one).seed), *([("sweep", group)] if group else [])]


def _tried(mine: Sequence[RunRecord]) -> dict[str, float]:
    """Setting -> mean accuracy of its runs that took part in the choice."""
    fresh = {id(one) for one in _fresh(mine)}
    choosing = by_setting([one for one in mine if id(one) not in fresh])
    return {setting_of(runs[0].config): mean_accuracy(runs) for runs in choosing}


def _marks(standing: StrategySummary) -> tuple[str, ...]:
    """Why a strategy may not have been given its due."""
    marks = []
    chosen, mine = standing.chosen, [one for one in standing.outcomes if one.result is not None]
    setting = setting_of(chosen[0].config)
    told = [one for one in standing.outcomes if one.result or one.diverged or one.state == "pruned"]
    tried = sorted(
        {float(one.config["learning_rate"]) for one in told if "learning_rate" in one.config}
    )
    rate = float(chosen[0].config["learning_rate"])
    if len(tried) > 1 and rate in (tried[0], tried[-1]):
        side = "smallest" if rate == tried[0] else "largest"
        marks.append(f"its best learning rate, {rate:g}, is the {side} that was tried")
    results = [result_of(one) for one in chosen]
    improving = [one for one in results if one.best_epoch == one.epochs_run - 1]
    if 2 * len(improving) > len(results):
        marks.append("still improving at its last epoch")
    reached = [max((row["train_acc"] for row in one.rows), default=1.0) for one in chosen]
    if np.mean(reached) < FITTED_TRAIN_ACC:
        marks.append(f"training accuracy stayed at {np.mean(reached):.0%}")
    diverged = sum(one.diverged and setting_of(one.config) == setting for one in standing.outcomes)
    if diverged:
        marks.append(f"{diverged} more of its setting diverged, and count in no mean")
    means = _tried(mine) if standing.fresh else {}
    if setting in means and max(means.values()) > means[setting]:
        marks.append("another setting did better in the search, and has no fresh seeds")
    return tuple(marks)
