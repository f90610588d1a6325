"""Compares the groups: accuracies, differences with intervals, warnings, and a conclusion.

A group is a strategy, or a network with a strategy.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune.analysis import statistics
from finetune.analysis.by_strategy import (
    StrategySummary,
    full_name,
    summarize_strategies,
    varied_fields,
)
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.statistics import MIN_SEEDS, Corrected, Difference
from finetune.config.field_tables import shown
from finetune.system.text import listed

CONFIRM = "python -m finetune confirm RUNS_DIR"
MAX_PAIRS = 12
"""The most differences that are shown at once; of more only those from the most accurate group."""
_MAX_NAMED = 4
"""The most groups that the conclusion names as equal or worse."""
_CHANGES_NUMBERS = ("accelerator", "precision", "cache_format")
"""Fields of the environment that can change a run's accuracy."""


@dataclass(frozen=True)
class Comparison:
    """What the page and the terminal show."""

    summaries: tuple[StrategySummary, ...]
    """The most accurate group first."""
    differences: tuple[Difference, ...]
    about_strategies: bool
    """Whether `differences` are about groups, over seeds, or only about single models."""
    corrected: Corrected | None
    """None for a single candidate."""
    num_candidates: int
    warnings: tuple[str, ...]
    varied: Mapping[str, Sequence[Any]]
    """The searched fields that differ between the compared runs, with their values."""
    compared: tuple[RunRecord, ...]
    excluded: tuple[RunRecord, ...]
    """Runs that did not finish, or can't be compared with the others."""

    @property
    def winner(self) -> RunRecord | None:
        return self.summaries[0].best if self.summaries else None

    @property
    def about_networks(self) -> bool:
        """Whether the groups are networks with strategies."""
        return bool(self.summaries and self.summaries[0].group.model)

    @property
    def subject(self) -> str:
        """What is compared."""
        return "networks and strategies" if self.about_networks else "strategies"

    @property
    def group_title(self) -> str:
        """The head of a column of groups."""
        return "network, strategy" if self.about_networks else "strategy"

    @property
    def main_differences(self) -> tuple[Difference, ...]:
        """All differences, or those from the most accurate group if there are too many."""
        if len(self.differences) <= MAX_PAIRS:
            return self.differences
        return tuple(d for d in self.differences if d.first == str(self.summaries[0].group))

    @property
    def advice(self) -> str:
        """What a comparison of the groups still needs; empty if nothing."""
        if self.about_strategies or len(self.summaries) < 2:
            return ""
        each = "network with each strategy" if self.about_networks else "strategy"
        return (
            f"This compares these models, not the {self.subject}: with other seeds the order could "
            f"change. A comparison of {self.subject} needs at least {MIN_SEEDS} fresh seeds of "
            f"each {each}'s best setting: {CONFIRM}"
        )

    @property
    def headline(self) -> str:
        """The conclusion in one or two sentences."""
        if not self.summaries:
            return "No run that can be compared has finished yet."
        leader, *rivals = self.summaries
        best = f"{leader.best.name} at {percent(leader.best.accuracy)}"
        if not rivals:
            return f"Only {leader.group.in_words} has finished runs; its best model is {best}."
        differences = {d.second: d for d in self.differences if d.first == str(leader.group)}
        compared = [rival for rival in rivals if str(rival.group) in differences]
        similar = [rival for rival in compared if not differences[str(rival.group)].significant]
        worse = {s: differences[str(s.group)] for s in compared if s not in similar}
        if self.about_strategies:
            return _verdict(leader, worse, similar)
        highest = max(run.accuracy for run in self.compared)
        what = "model found" if leader.best.accuracy == highest else "setting's best model"
        text = f"The best {what} is {best}"
        if self.corrected:
            corrected = percent(self.corrected.accuracy)
            text += f" ({corrected} corrected for selection from {self.num_candidates} runs)"
        if not worse:
            others = "others'" if self.about_networks else "other strategies'"
            return f"{text}; no significant difference from the {others} best models."
        limitation = max([rival.limitation for rival in worse], key=len)
        text += f"; it beats the best model of {_names(worse)}{limitation}"
        if similar:
            text += f", with no significant difference from {_names(similar)}"
        return f"{text}."


def compare(runs: Sequence[RunRecord]) -> Comparison:
    """Compares groups if two or more have enough fresh seeds, else the best model of each.

    In the comparison the runs have their full names.
    """
    comparable, warnings = _comparable([run for run in runs if run.result is not None])
    varied = varied_fields(comparable)
    named = {run: _named_fully(run, varied) for run in runs}
    runs, comparable = [*named.values()], [named[run] for run in comparable]
    summaries = summarize_strategies(comparable, runs)
    confirmed = [summary for summary in summaries if summary.fresh]
    about_strategies = len(confirmed) > 1
    if about_strategies:
        if unconfirmed := [summary for summary in summaries if not summary.fresh]:
            warnings.append(
                f"{', '.join(str(s.group) for s in unconfirmed)}: fewer than {MIN_SEEDS} fresh "
                "seeds of one setting, so not part of the comparison"
            )
        summaries = [*confirmed, *unconfirmed]
        candidates = [(run, str(s.group)) for s in confirmed for run in s.chosen]
        groups = {str(s.group): np.stack([run.correct for run in s.chosen]) for s in confirmed}
        differences = statistics.group_differences(groups)
    else:
        if len(summaries) > 1:  # the mean of several seeds is not comparable with a best run
            summaries = summarize_strategies(comparable, runs, best_runs_only=True)
        candidates = [(run, "") for run in comparable]
        models = {str(summary.group): summary.best.correct for summary in summaries}
        differences = statistics.model_differences(models)
    compared = set(comparable)
    return Comparison(
        summaries=tuple(summaries),
        differences=tuple(differences),
        about_strategies=about_strategies,
        corrected=_corrected(candidates),
        num_candidates=len(candidates),
        warnings=tuple(warnings),
        varied=varied,
        compared=tuple(comparable),
        excluded=tuple(run for run in runs if run not in compared),
    )


def _named_fully(run: RunRecord, varied: Mapping[str, Sequence[Any]]) -> RunRecord:
    if not run.config:
        return run
    return replace(run, config={**run.config, "name": full_name(run, varied)})


def _corrected(candidates: Sequence[tuple[RunRecord, str]]) -> Corrected | None:
    if len(candidates) < 2:
        return None
    return statistics.selection_corrected(
        np.stack([run.correct for run, _ in candidates]),
        [group for _, group in candidates],
        num_resamples=500 if len(candidates) <= 100 else 200,
    )


def _comparable(finished: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """The largest set of runs on the same validation pictures, and warnings."""
    warnings = []
    if without := [run for run in finished if not run.correct.size]:
        warnings.append(f"{_named(without)}: no predictions.npz, so not compared")
    groups: dict[tuple[str, str, bytes], list[RunRecord]] = defaultdict(list)
    for run in finished:
        if run.correct.size:
            result = run.finished_result
            key = (result.dataset_fingerprint, result.split_fingerprint, run.labels.tobytes())
            groups[key].append(run)
    if not groups:
        return [], warnings
    largest = max(groups, key=lambda key: len(groups[key]))
    reasons = ("other data", "another split", "other validation pictures")  # as in a key
    for key, runs in groups.items():
        if key != largest:
            reason = next(why for why, a, b in zip(reasons, key, largest, strict=True) if a != b)
            warnings.append(f"{_named(runs)}: {reason}, so not compared")
    return groups[largest], warnings + _inequalities(groups[largest])


def _inequalities(runs: Sequence[RunRecord]) -> list[str]:
    """What differs between compared runs besides their settings and may change their accuracy."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        if fingerprint := run.finished_result.weights_fingerprint:
            counts[f"weights of {run.group.model}".removesuffix(" of ")][fingerprint] += 1
    for name in _CHANGES_NUMBERS:
        recorded = [run.config[name] for run in runs if name in run.config]
        counts[name] = Counter(shown(name, value) for value in recorded)
    return [
        f"the runs have different {name}: "
        + ", ".join(f"{value[:12]} ({num_runs(n)})" for value, n in found.most_common())
        for name, found in counts.items()
        if len(found) > 1
    ]


def num_runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _named(runs: Sequence[RunRecord]) -> str:
    names = ", ".join(run.run_id for run in runs[:3])
    return f"{num_runs(len(runs))} ({names}{', …' * (len(runs) > 3)})"


def _names(summaries: Iterable[StrategySummary]) -> str:
    return listed([summary.group.in_words for summary in summaries], at_most=_MAX_NAMED)


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.1f} %"


def points(difference: float) -> str:
    return f"{100 * difference:.1f}"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _verdict(
    leader: StrategySummary,
    worse: Mapping[StrategySummary, Difference],
    similar: Sequence[StrategySummary],
) -> str:
    if similar:
        seeds = min(len(summary.chosen) for summary in (leader, *worse, *similar))
        opening = f"{_tie([leader, *similar])} over {seeds} fresh seeds"
    else:
        won = "is best: " if leader.group.model else "wins with "
        mean = f"{percent(leader.accuracy)}, the mean of {len(leader.chosen)} fresh seeds"
        opening = f"{leader.group.in_words} {won}{mean}"
    losses = [
        f"{rival.group.in_words} is {points(abs(difference.estimate))} points "
        f"worse{rival.limitation}"
        for rival, difference in worse.items()
    ]
    if len(losses) > _MAX_NAMED:
        rest = {s: abs(d.estimate) for s, d in [*worse.items()][1:]}
        span = f"{points(min(rest.values()))} to {points(max(rest.values()))}"
        limitation = max([rival.limitation for rival in rest], key=len)
        losses[1:] = [f"the other {len(rest)} are {span} points worse{limitation}"]
    return f"{'; '.join([opening, *losses])}."


def _tie(best: Sequence[StrategySummary]) -> str:
    """Groups without a significant difference, and the network or the strategy that all have."""
    groups = [summary.group for summary in best]
    shared, names = "", [group.in_words for group in groups]
    if len({group.model for group in groups}) == 1 and groups[0].model:
        shared, names = groups[0].model, [group.strategy for group in groups]
    elif len({group.strategy for group in groups}) == 1:
        shared, names = groups[0].strategy, [group.model for group in groups]
    first, *others = [f"{n} ({percent(s.accuracy)})" for n, s in zip(names, best, strict=True)]
    tie = f"o significant difference between {first} and {listed(others, _MAX_NAMED)}"
    return f"{shared} is best, with n{tie}" if shared else f"N{tie}"
