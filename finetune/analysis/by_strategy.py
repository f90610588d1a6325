"""Each group's best setting, its accuracy, and reasons for which the accuracy may be too low.

A group is a strategy, or a network with a strategy.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import PurePath
from typing import Any

import numpy as np

from finetune.analysis.read_runs import RunRecord
from finetune.analysis.statistics import MIN_SEEDS
from finetune.config.field_tables import fields_with_role, in_order, shown, title
from finetune.config.fields import NAMED_FIELDS, RunConfig
from finetune.config.strategies import STRATEGIES
from finetune.runs.settings import Group, best_setting, setting_of
from finetune.system.errors import ConfigError

_IN_NAMES = (*NAMED_FIELDS, "unfreeze_from", "lr_schedule")

FITTED_TRAIN_ACC = 0.9
"""Training accuracy below which a strategy has not fitted the training pictures."""


def mean_accuracy(runs: Sequence[RunRecord]) -> float:
    return float(np.mean([run.accuracy for run in runs]))


def by_setting(runs: Iterable[RunRecord]) -> dict[str, list[RunRecord]]:
    """The runs of each setting, in the order in which the settings first occur."""
    groups: dict[str, list[RunRecord]] = defaultdict(list)
    for run in runs:
        groups[run.setting].append(run)
    return dict(groups)


def by_group(runs: Iterable[RunRecord]) -> dict[Group, list[RunRecord]]:
    """The runs of each group, in the order of the tables of networks and strategies."""
    groups: dict[Group, list[RunRecord]] = defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
    return {group: groups[group] for group in sorted(groups)}


def value_of(run: RunRecord, field: str) -> Any:
    """The value of a field; of a path only the last part, which does not depend on the machine."""
    value = run.config.get(field)
    return PurePath(value).name if isinstance(value, str) and "/" in value else value


def _default(run: RunRecord, field: str) -> Any:
    """What the field is if it is not given."""
    if field == "unfreeze_from":  # the network itself may not be known here
        entry = STRATEGIES[run.strategy]
        return entry.deepest(run.parts) if run.parts else value_of(run, field)
    return _defaults(run.strategy, run.config.get("lr_schedule"))[field]


@cache
def _defaults(strategy: str, lr_schedule: str | None) -> dict[str, Any]:
    """The fields of a run of which only these two are given: the other defaults depend on them."""
    return RunConfig.from_fields({"strategy": strategy, "lr_schedule": lr_schedule}).to_fields()


def varied_fields(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The searched fields that differ between runs, each with its values in order.

    The strategy is left out, and so is a field that differs only by the strategies' defaults, or
    weights that differ only because each network has its own. None, the value of a field that the
    strategy ignores, is not listed.
    """
    varied = {}
    for name in fields_with_role("searched"):
        chosen: dict[str, set[Any]] = defaultdict(set)
        values = set()
        for run in runs:
            if (value := value_of(run, name)) is not None:
                is_default = value == _default(run, name)
                compared_with = run.group.model if name == "weights" else ""
                chosen[compared_with].add("default" if is_default else value)
                values.add(value)
        if name != "strategy" and any(len(found) > 1 for found in chosen.values()):
            varied[name] = in_order(name, values)
    return varied


def full_name(run: RunRecord, varied: Iterable[str]) -> str:
    """The run's name, with its network if there are several, and with the values of the varied
    fields that a name doesn't have. A name from the settings has the varied ones alone."""
    others = {name: value_of(run, name) for name in varied if name not in NAMED_FIELDS}
    own = _short_name(run, varied)
    if f"from-{others.get('unfreeze_from')}" in own:
        del others["unfreeze_from"]
    values = [f"{title(name)} {shown(name, v)}" for name, v in others.items() if v is not None]
    needs_model = not own.startswith(run.group.model)
    return ", ".join([f"{run.group.model}-{own}" if needs_model else own, *values])


def _short_name(run: RunRecord, varied: Iterable[str]) -> str:
    varied = set(varied)
    try:
        config = RunConfig.from_fields({k: run.config[k] for k in _IN_NAMES if k in run.config})
    except ConfigError:  # such as a network that is registered elsewhere
        return run.name
    is_own = run.name != config.readable_name() or not varied
    return run.name if is_own else config.readable_name({"strategy", *varied})


def setting_key(run: RunRecord, varied: Iterable[str]) -> str:
    """The values of the varied fields, by which the settings of a single strategy are named; of a
    single field with its name."""
    values = [(title(name), shown(name, value_of(run, name))) for name in varied]
    if len(values) == 1:
        return " ".join(values[0])
    return " / ".join(value for _, value in values)


def groups_by_setting(
    comparable: Sequence[RunRecord],
    runs: Iterable[RunRecord],
    varied: Iterable[str],
    at_most: int,
) -> dict[str, Group]:
    """Of a single strategy's settings a group each, by their `setting_key`.

    Empty if `runs` are of several strategies or networks, or have a single setting or more than
    `at_most`; if some settings have fresh seeds, which the others lack; or if they have several
    seeds, but too few to compare them.
    """
    counts = Counter(setting_key(run, varied) for run in comparable)
    is_single = len({run.group for run in runs if run.config}) == 1
    is_even = set(counts.values()) == {1} or min(counts.values(), default=0) >= MIN_SEEDS
    if not (is_single and is_even and 1 < len(counts) <= at_most):
        return {}
    if _confirmed_settings(comparable):
        return {}
    group = comparable[0].group
    return {key: replace(group, setting_number=i, setting=key) for i, key in enumerate(counts)}


@dataclass(frozen=True, eq=False)
class StrategySummary:
    """One group: the runs of its best setting, and what limits a statement about it."""

    group: Group
    runs: tuple[RunRecord, ...]
    """All its runs, also those that did not finish; without finished runs on other pictures."""
    chosen: tuple[RunRecord, ...]
    """The runs of the best setting that are compared: those with fresh seeds if there are enough,
    else the best one."""
    fresh: bool
    """Whether `chosen` are runs with at least `MIN_SEEDS` seeds that were not used to choose the
    setting."""
    caveats: tuple[str, ...] = ()
    """Reasons for which the group may not have had a fair chance."""

    @property
    def strategy(self) -> str:
        return self.group.strategy

    @property
    def best(self) -> RunRecord:
        return max(self.chosen, key=lambda run: run.accuracy)

    @property
    def accuracy(self) -> float:
        """Mean best validation accuracy of the chosen runs."""
        return mean_accuracy(self.chosen)

    @property
    def macro_f1(self) -> float:
        """Mean macro F1 of the chosen runs at their best epochs."""
        return float(np.mean([run.macro_f1 for run in self.chosen]))

    @property
    def train_seconds(self) -> float:
        """Mean training time of the chosen runs."""
        return float(np.mean([run.finished_result.train_seconds for run in self.chosen]))

    @property
    def trainable_parameters(self) -> int:
        return max(run.finished_result.trainable_parameters for run in self.chosen)

    @property
    def num_diverged(self) -> int:
        return sum(run.diverged for run in self.runs)

    @property
    def limitation(self) -> str:
        """What a statement that this group is worse is limited to, if it has caveats."""
        epochs = self.best.config.get("epochs")
        return f" within {epochs} epochs" if self.caveats and epochs else ""


def summarize_strategies(
    comparable: Sequence[RunRecord], runs: Sequence[RunRecord], best_runs_only: bool = False
) -> list[StrategySummary]:
    """A summary of each group with comparable runs, the most accurate first.

    With `best_runs_only`, fresh seeds don't count.
    """
    compared = set(comparable)
    kept = by_group(run for run in runs if run.result is None or run in compared)
    summaries = [_summary(g, tuple(kept[g]), best_runs_only) for g in by_group(comparable)]
    summaries.sort(key=_rank)
    for leader in summaries[:1]:
        if leader.group.setting:  # the others' rates belong to other settings
            caveats = (*_caveats_on_rate(leader, runs), *leader.caveats)
            summaries[0] = replace(leader, caveats=caveats)
    return summaries


def _rank(summary: StrategySummary) -> tuple[float, float]:
    """The most accurate first; of equal ones that with the lower loss."""
    losses = [run.finished_result.best_val_loss for run in summary.chosen]
    return -summary.accuracy, float(np.mean(losses))


def _summary(group: Group, runs: tuple[RunRecord, ...], best_run_only: bool) -> StrategySummary:
    """If several settings are confirmed, the best one in the search is chosen."""
    finished = [run for run in runs if run.result is not None]
    confirmed = _confirmed_settings(finished)
    fresh = {(run.setting, run.finished_result.seed) for runs in confirmed.values() for run in runs}
    # the runs that can have helped to choose a setting
    searched = by_setting(r for r in finished if (r.setting, r.finished_result.seed) not in fresh)
    candidates = [s for s in confirmed if s in searched or len(confirmed) == 1]
    if candidates and not best_run_only:
        setting = _best({s: searched.get(s, confirmed[s]) for s in candidates})
        summary = StrategySummary(group, runs, confirmed[setting], fresh=True)
    else:
        settings = by_setting(finished)
        setting = _best(searched or settings)
        best = max(settings[setting], key=lambda run: run.accuracy)
        summary = StrategySummary(group, runs, (best,), fresh=False)
    caveats = _caveats(summary)
    if summary.fresh and setting in searched and _best(searched) != setting:
        caveats.append("another setting was better in the search but has no fresh seeds")
    return replace(summary, caveats=tuple(caveats))


def _best(groups: Mapping[str, Sequence[RunRecord]]) -> str:
    return best_setting({s: [run.finished_result for run in runs] for s, runs in groups.items()})


def _confirmed_settings(finished: Sequence[RunRecord]) -> dict[str, tuple[RunRecord, ...]]:
    """The settings with enough fresh seeds, each with one run per seed.

    A run is fresh if it can't have helped to choose its setting: no other setting of the group was
    run with its seed, nor in its sweep.
    """
    settings: dict[tuple[str, object], set[str]] = defaultdict(set)
    for run in finished:
        for origin in _origins(run):
            settings[origin].add(run.setting)
    fresh: dict[str, dict[int, RunRecord]] = defaultdict(dict)
    for run in finished:
        if all(len(settings[origin]) == 1 for origin in _origins(run)):
            fresh[run.setting].setdefault(run.finished_result.seed, run)
    return {s: tuple(runs.values()) for s, runs in fresh.items() if len(runs) >= MIN_SEEDS}


def _origins(run: RunRecord) -> list[tuple[str, object]]:
    group = run.config.get("group")
    return [("seed", run.finished_result.seed), *([("sweep", group)] if group else [])]


def _caveats_on_rate(summary: StrategySummary, runs: Iterable[RunRecord]) -> list[str]:
    tried = [run for run in runs if run.result or run.diverged or run.state == "pruned"]
    rates = {rate for run in tried if (rate := run.config.get("learning_rate")) is not None}
    rate = summary.chosen[0].config.get("learning_rate")
    if len(rates) < 2 or rate not in (min(rates), max(rates)):
        return []
    side = "smallest" if rate == min(rates) else "largest"
    return [f"its best learning rate, {rate:g}, is the {side} that was tried"]


def _caveats(summary: StrategySummary) -> list[str]:
    caveats, chosen = _caveats_on_rate(summary, summary.runs), summary.chosen
    results = [run.finished_result for run in chosen if run.config.get("epochs") is not None]
    improving = [result for result in results if result.best_epoch == result.epochs_run - 1]
    if 2 * len(improving) > len(results) > 0:
        caveats.append("still improving at its last epoch")
    reached = np.mean([max(run.metric("train_acc").values(), default=1.0) for run in chosen])
    if reached < FITTED_TRAIN_ACC:
        caveats.append(f"training accuracy stayed at {reached:.0%}")
    # diverged runs have no weights fingerprint, so that settings are compared without it
    settings = {setting_of(run.config) for run in chosen}
    diverged = [r for r in summary.runs if r.diverged and setting_of(r.config) in settings]
    if diverged:
        caveats.append(f"{len(diverged)} more of this setting diverged and are not in the mean")
    return caveats
