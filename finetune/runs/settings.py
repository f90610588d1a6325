"""Which runs are compared as one group, which repeat a setting, and which setting is the best."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from finetune.config.backbones import DEFAULT_MODEL
from finetune.config.field_tables import fields_with_role, in_order
from finetune.config.fields import RunConfig
from finetune.runs.result import RunResult
from finetune.system.errors import ConfigError

_SEARCHED = fields_with_role("searched")
HEAD_FIELDS = {
    *("learning_rate", "lr_schedule", "momentum", "weight_decay", "label_smoothing"),
    *("patience", "name"),
}
"""The fields in which runs may differ that train their heads together."""
_ACCURACY_DIGITS = 9
"""Sums of the same accuracies in another order may differ in their last bit."""


@dataclass(frozen=True, order=True)
class Group:
    """What runs are compared by: their strategy, and their network if there are several networks.

    Settings of a single strategy are groups too. Groups sort as the tables of networks and
    strategies list them.
    """

    model_number: int = 0
    """The place of the network among those that the runs have."""
    strategy_number: int = 0
    model: str = ""
    """Empty if all runs have the same network."""
    strategy: str = ""
    setting_number: int = 0
    setting: str = ""
    """The values of what varies, if the groups are settings."""

    def __str__(self) -> str:
        return self.setting or f"{self.model} {self.strategy}".strip()

    @property
    def label(self) -> str:
        """What its colour means."""
        return self.setting or self.strategy

    @property
    def in_words(self) -> str:
        """As a sentence names it, such as `resnet50 with partial`."""
        if self.setting:
            return self.setting
        return f"{self.model} with {self.strategy}" if self.model else self.strategy


UNGROUPED = Group()
"""Of a run whose config can't be read."""


def groups_of(configs: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The group of each of the runs with these configs."""
    pairs = [(str(c.get("model") or DEFAULT_MODEL), str(c.get("strategy"))) for c in configs]
    models = in_order("model", {model for model, _ in pairs})
    strategies = in_order("strategy", {strategy for _, strategy in pairs})
    return [
        Group(models.index(m), strategies.index(s), m if len(models) > 1 else "", s)
        for m, s in pairs
    ]


def setting_of(config: Mapping[str, Any], weights_fingerprint: str | None = None) -> str:
    """A key that two runs share if their searched fields are the same.

    Seed, names, paths and device don't matter. A weights fingerprint replaces the path of the
    weights. A field that an older version didn't have takes its default; unknown ones don't count.
    """
    fields = {name: config[name] for name in _SEARCHED if name in config}
    try:
        complete = RunConfig.from_fields(fields).to_fields()
    except ConfigError:  # such as a value that only a newer version allows
        complete = fields
    searched = {name: complete.get(name) for name in _SEARCHED}
    if weights_fingerprint is not None:
        searched["weights"] = weights_fingerprint
    return json.dumps(searched, sort_keys=True, default=str)


def head_group(config: RunConfig) -> str | None:
    """A key that runs share which can train their heads together; None if this one can't.

    Such a run trains nothing but the head, by steps, from the start, and leaves no last.ckpt.
    """
    if config.solves_head or config.keep_last or not config.cache:
        return None
    if dict(config.plan.start_epochs) != {config.plan.parts[-1]: 0}:
        return None
    shared = {k: v for k, v in config.to_fields().items() if k not in HEAD_FIELDS}
    return json.dumps(shared, sort_keys=True, default=str)


def results_by_group(results: Sequence[RunResult]) -> dict[Group, list[RunResult]]:
    """The results of each group, in the order of the groups."""
    groups = groups_of([{**result.config, "strategy": result.strategy} for result in results])
    found: dict[Group, list[RunResult]] = {group: [] for group in sorted(set(groups))}
    for result, group in zip(results, groups, strict=True):
        found[group].append(result)
    return found


def results_by_setting(results: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    """The results of each setting, in the order in which the settings first occur."""
    groups: dict[str, list[RunResult]] = defaultdict(list)
    for result in results:
        groups[setting_of(result.config, result.weights_fingerprint)].append(result)
    return dict(groups)


def best_setting(groups: Mapping[str, Sequence[RunResult]]) -> str:
    """The key of the best setting among the results of each.

    The highest mean `best_val_acc` wins; among equals the lowest mean `best_val_loss`, then the
    fewest trainable parameters, then the shortest training, then the first key in order.
    """

    def rank(setting: str) -> tuple[float | str, ...]:
        results = groups[setting]
        return (
            -round(fmean(result.best_val_acc for result in results), _ACCURACY_DIGITS),
            fmean(result.best_val_loss for result in results),
            fmean(result.trainable_parameters for result in results),
            fmean(result.train_seconds for result in results),
            setting,
        )

    return min(groups, key=rank)
