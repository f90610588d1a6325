"""Which runs repeat the same setting, and which setting of several is the best."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from finetune.config.field_tables import fields_with_role
from finetune.config.fields import RunConfig
from finetune.runs.result import RunResult
from finetune.system.errors import ConfigError

_SEARCHED = fields_with_role("searched")
_ACCURACY_DIGITS = 9
"""Sums of the same accuracies in another order may differ in their last bit."""


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
