"""Compares the groups: accuracies, differences with intervals, warnings, and a conclusion.

A group is a strategy, or a network with a strategy.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune.analysis import conclusion, statistics
from finetune.analysis.by_strategy import (
    StrategySummary,
    full_name,
    groups_by_setting,
    setting_key,
    summarize_strategies,
    varied_fields,
)
from finetune.analysis.conclusion import num_runs
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.statistics import MIN_SEEDS, Corrected, Difference
from finetune.config.field_tables import shown, title
from finetune.runs.settings import Group

MAX_PAIRS = 12
"""The most differences that are shown at once; of more only those from the most accurate group."""
MAX_SETTINGS = 12
"""The most settings of a single strategy that are compared with each other."""
_CHANGES_NUMBERS = ("accelerator", "precision", "cache_format")
"""Fields of the environment that can change a run's accuracy."""


@dataclass(frozen=True, repr=False)
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
    pruned: tuple[RunRecord, ...]
    """Runs that early termination ended, on the same pictures as the compared ones."""
    excluded: tuple[RunRecord, ...]
    """Other runs that did not finish, or can't be compared with the others."""

    def __repr__(self) -> str:
        return f"Comparison({self.headline})"

    @property
    def winner(self) -> RunRecord | None:
        return self.summaries[0].best if self.summaries else None

    @property
    def about_networks(self) -> bool:
        """Whether the groups are networks with strategies."""
        return bool(self.summaries and self.summaries[0].group.model)

    @property
    def about_settings(self) -> bool:
        """Whether the groups are settings of a single strategy."""
        return bool(self.summaries and self.summaries[0].group.setting)

    @property
    def has_long_names(self) -> bool:
        """Whether the names of two groups may not fit on one line."""
        return self.about_networks or self.about_settings

    @property
    def subject(self) -> str:
        """What is compared."""
        if self.about_settings:
            return "settings"
        return "networks and strategies" if self.about_networks else "strategies"

    @property
    def group_title(self) -> str:
        """The head of a column of groups."""
        if self.about_settings and len(self.varied) > 1:
            return f"setting: {' / '.join(map(title, self.varied))}"
        if self.about_settings:
            return "setting"
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
        return conclusion.advice(self)

    @property
    def title(self) -> str:
        """The headline in one short sentence."""
        return conclusion.title(self)

    @property
    def headline(self) -> str:
        """The conclusion in one or two sentences."""
        return conclusion.headline(self)


def compare(runs: Sequence[RunRecord]) -> Comparison:
    """Compares groups if two or more have enough fresh seeds, else the best model of each.

    In the comparison the runs have their full names.
    """
    comparable, warnings = _comparable([run for run in runs if run.result is not None])
    pruned = [run for run in runs if comparable and _is_competitor(run, comparable[0])]
    varied = varied_fields([*comparable, *pruned])
    groups = groups_by_setting(comparable, runs, varied, MAX_SETTINGS)
    named = {run: _named_fully(run, varied, groups) for run in runs}
    runs, comparable, pruned = ([named[run] for run in some] for some in (runs, comparable, pruned))
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
        rights = {str(s.group): np.stack([run.correct for run in s.chosen]) for s in confirmed}
        differences = statistics.group_differences(rights)
    else:
        if len(summaries) > 1:  # the mean of several seeds is not comparable with a best run
            summaries = summarize_strategies(comparable, runs, best_runs_only=True)
        candidates = [(run, "") for run in (*comparable, *pruned)]
        models = {str(summary.group): summary.best.correct for summary in summaries}
        differences = statistics.model_differences(models)
    listed_runs = {*comparable, *pruned}
    return Comparison(
        summaries=tuple(summaries),
        differences=tuple(differences),
        about_strategies=about_strategies,
        corrected=_corrected(candidates),
        num_candidates=len(candidates),
        warnings=tuple(warnings),
        varied=varied,
        compared=tuple(comparable),
        pruned=tuple(pruned),
        excluded=tuple(run for run in runs if run not in listed_runs),
    )


def _is_competitor(run: RunRecord, compared: RunRecord) -> bool:
    """Whether a run was pruned, on the pictures of a compared one."""
    return run.state == "pruned" and np.array_equal(run.labels, compared.labels)


def _named_fully(
    run: RunRecord, varied: Mapping[str, Sequence[Any]], groups: Mapping[str, Group]
) -> RunRecord:
    if not run.config:
        return run
    config = {**run.config, "name": full_name(run, varied)}
    return replace(run, config=config, group=groups.get(setting_key(run, varied), run.group))


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
    if folds := [run for run in finished if run.config.get("fold")]:
        finished = [run for run in finished if run not in folds]
        warnings.append(
            f"{_named(folds)}: validated on folds, so not compared here; "
            "python -m finetune confirm RUNS_DIR --folds K compares them"
        )
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


def _named(runs: Sequence[RunRecord]) -> str:
    names = ", ".join(run.run_id for run in runs[:3])
    return f"{num_runs(len(runs))} ({names}{', …' * (len(runs) > 3)})"
