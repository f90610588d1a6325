"""A run's config and directory, from what was given and from what the machine and data allow."""

import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.config.fields import RunConfig, advice, differences, read_mapping
from finetune.data.splits import Splits, find_splits
from finetune.runs.run_dir import RunDir
from finetune.system.array_store import Cache, num_stored_bytes
from finetune.system.devices import refuse_torchrun
from finetune.system.errors import ConfigError
from finetune.system.files import absolute
from finetune.system.progress import StartProgress, no_progress

DEFAULT_CACHE_GB = 20.0


def prepare_run(
    fields: Mapping[str, Any], log: Callable[[str], None], run_id: str | None = None
) -> tuple[RunConfig, RunDir]:
    """The config and directory of a run with these fields; `run_id` is W&B's, if it has one.

    Besides those of `RunConfig`, `config` is a YAML file of fields, which the others override, and
    `resume` a run directory, whose config must not change except for a larger number of epochs.
    Raises `ConfigError` and `RunDirError`.
    """
    refuse_torchrun()
    given = {name: value for name, value in fields.items() if value not in (None, "None")}
    resume, file = given.pop("resume", None), given.pop("config", None)
    if file is not None:
        given = read_mapping(Path(file)) | given
    if resume:
        run_dir = RunDir(absolute(Path(resume)))
    else:
        config = RunConfig.from_fields(given)
        for line in advice(given, config):
            log(line)
        run_dir = RunDir(config.out / _checked(run_id or secrets.token_hex(4)))
        if not run_dir.config_path.exists():
            return config, run_dir
    recorded = run_dir.read_config(allow_unknown=False)
    changes = differences(recorded, given)
    epochs = recorded.epochs
    if changes.get("epochs", (0, 0))[1] > epochs:
        epochs = changes.pop("epochs")[1]
    if changes:
        listed = ", ".join(f"{k} is {old}, given {new}" for k, (old, new) in changes.items())
        raise ConfigError(
            f"{run_dir.path} has another config: {listed}; only epochs may increase, "
            "other values need a new run"
        )
    return recorded.model_copy(update={"epochs": epochs}), run_dir


def _checked(run_id: str) -> str:
    """A run's id if it can be the name of its directory."""
    if not re.fullmatch(r"[\w-][\w.-]*", run_id):
        raise ConfigError(f"W&B's run id: got {run_id!r}; letters, digits, - _ and . are allowed")
    return run_id


def resolve(
    config: RunConfig,
    log: Callable[[str], None] = print,
    progress: StartProgress = no_progress,
) -> tuple[RunConfig, Splits, Cache | None]:
    """Replace `auto` and the cache's size by what the machine and the data allow."""
    accelerator = _accelerator(config.accelerator)
    cache_gb = config.cache_gb
    if cache_gb is None:
        existing = next(p for p in (config.cache_dir, *config.cache_dir.parents) if p.exists())
        free_bytes = shutil.disk_usage(existing).free + num_stored_bytes(config.cache_dir)
        cache_gb = round(min(DEFAULT_CACHE_GB, free_bytes / 2e9), 1)
    cache = Cache(config.cache_dir, cache_gb * 1e9, log) if config.cache and cache_gb else None
    splits = find_splits(config, cache, progress)
    resolved = {
        "val_fraction": splits.val_fraction,
        "pixel_range": splits.pixel_range,
        "accelerator": accelerator,
        "precision": _precision(accelerator) if config.precision == "auto" else config.precision,
        "cache_gb": cache_gb,
    }
    return config.model_copy(update=resolved), splits, cache


def _accelerator(asked: str) -> str:
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if asked in ("auto", "gpu"):
        found = "cuda" if has_cuda else "mps" if has_mps else "cpu"
        if asked == "auto" or found != "cpu":
            return found
    elif asked == "cpu" or {"cuda": has_cuda, "mps": has_mps}[asked]:
        return asked
    raise ConfigError(f"accelerator: got {asked!r}, but torch finds none here; pass auto or cpu")


def _precision(accelerator: str) -> str:
    if accelerator != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
