"""Given values of a run's fields: read from a file, compared with a config, and commented."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.config.fields import RunConfig
from finetune.config.optimizers import ignored_fields
from finetune.config.strategies import STRATEGIES
from finetune.system.errors import ConfigError
from finetune.system.files import load_yaml


def read_mapping(path: Path) -> dict[str, Any]:
    """The fields in a YAML file. Raises `ConfigError`."""
    fields = load_yaml(path, "a config")
    if not isinstance(fields, dict):
        raise ConfigError(f"config: {path} must hold a mapping of fields, such as 'epochs: 10'")
    return {str(name): value for name, value in fields.items()}


def advice(given: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Notes on the given values: fields that have no effect, too few epochs."""
    lines = []
    ignoring = {
        f"strategy {config.strategy}": STRATEGIES[config.strategy].ignores,
    }
    if config.optimizer is not None:
        ignoring[f"optimizer {config.optimizer}"] = ignored_fields(config.optimizer)
    for what, ignored in ignoring.items():
        if names := sorted(name for name in ignored if given.get(name) is not None):
            lines.append(f"{', '.join(names)}: no effect with {what}; ignored")
    if config.fold and given.get("val_fraction") not in (None, "auto"):
        lines.append("val_fraction: no effect with fold; ignored")
    if late := config.plan.opened_too_late(config.num_epochs):
        starts = ", ".join(f"{part} at epoch {start}" for part, start in late.items())
        lines.append(
            f"epochs={config.epochs} is too few to unfreeze every part: {starts} would come "
            f"after the end; epochs={config.plan.all_open_epoch + 1} or more trains them"
        )
    return lines


def differences(ours: RunConfig, given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields of `given` whose value differs from `ours`, as (ours, given)."""
    asked = {k: v for k, v in given.items() if v is not None and v != "auto"}
    theirs = RunConfig.from_fields(ours.to_fields() | asked)
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in asked}
    return {name: (mine, other) for name, (mine, other) in pairs.items() if mine != other}
