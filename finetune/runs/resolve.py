"""What a run will be: its fields, a config file and a resume become one config and one directory.

Turns what was given into a `RunConfig` and a `RunDir`, and `auto` into what this machine and these
pictures make of it. Knows nothing about networks or training.

    >>> config, run_dir = prepare_run({"strategy": "partial", "epochs": 3}, print)  # doctest: +SKIP
"""

from __future__ import annotations

import os
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
from finetune.system.array_store import num_kept_bytes
from finetune.system.errors import ConfigError

DEFAULT_CACHE_GB = 20.0


def prepare_run(fields: Mapping[str, Any], say: Callable[[str], None]) -> tuple[RunConfig, RunDir]:
    """The config and the run directory that fields, a config file and a resume amount to."""
    given = {name: value for name, value in fields.items() if value not in (None, "None")}
    resume, file = given.pop("resume", None), given.pop("config", None)
    if file is not None:
        given = read_mapping(Path(file)) | given
    run_dir = RunDir(_absolute(resume)) if resume else None
    if run_dir is None:
        config = RunConfig.from_fields(given)
        for line in advice(given, config):
            say(line)
        run_dir = RunDir(config.out / _run_id())
        if not run_dir.config_path.exists():
            return config, run_dir
    before = run_dir.read_config()
    changed = differences(before, given)
    if changed.get("epochs", (0, 0))[1] > before.epochs:
        epochs = changed.pop("epochs")[1]
    else:
        epochs = before.epochs
    if changed:
        listed = ", ".join(f"{k} is {old}, given {new}" for k, (old, new) in changed.items())
        raise ConfigError(
            f"{run_dir.path} belongs to another config: {listed}; only a larger epochs may differ"
        )
    return before.model_copy(update={"epochs": epochs}), run_dir


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))


def _run_id() -> str:
    """W&B's id where W&B has chosen one; it names the run directory too."""
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    if not re.fullmatch(r"[\w-][\w.-]*", run_id):
        raise ConfigError(f"WANDB_RUN_ID: got {run_id!r}; letters, digits, - _ and . are allowed")
    return run_id


def resolve(config: RunConfig) -> tuple[RunConfig, Splits]:
    """Replace what only the machine and the data can tell: `auto` and the cache's size."""
    splits = find_splits(config)
    accelerator = _accelerator(config.accelerator)
    cache_gb = config.cache_gb
    if cache_gb is None:
        place = next(p for p in (config.cache_dir, *config.cache_dir.parents) if p.exists())
        room = shutil.disk_usage(place).free + num_kept_bytes(config.cache_dir)
        cache_gb = round(min(DEFAULT_CACHE_GB, room / 2e9), 1)
    resolved = {
        "val_fraction": splits.val_fraction,
        "accelerator": accelerator,
        "precision": _precision(accelerator) if config.precision == "auto" else config.precision,
        "cache_gb": cache_gb,
    }
    return config.model_copy(update=resolved), splits


def _accelerator(asked: str) -> str:
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if asked in ("auto", "gpu"):
        found = "cuda" if has_cuda else "mps" if has_mps else "cpu"
        if asked == "auto" or found != "cpu":
            return found
    elif asked == "cpu" or {"cuda": has_cuda, "mps": has_mps}[asked]:
        return asked
    raise ConfigError(f"accelerator: got {asked!r}, but torch sees none here; pass auto or cpu")


def _precision(accelerator: str) -> str:
    if accelerator != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
