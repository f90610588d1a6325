"""A run's config and directory, from what was given and from what the machine and data allow."""

import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.config.fields import RunConfig
from finetune.config.given_values import advice, differences, read_mapping
from finetune.config.strategies import STRATEGIES
from finetune.data.splits import Splits, find_splits
from finetune.runs.run_dir import RunDir
from finetune.system.array_store import Cache, num_stored_bytes
from finetune.system.cuda import check_architecture, cuda_fault
from finetune.system.devices import refuse_torchrun
from finetune.system.errors import ConfigError, DeviceError
from finetune.system.files import absolute, run_directory
from finetune.system.progress import StartProgress, no_progress

DEFAULT_CACHE_GB = 20.0

_PLACES = ("data_dir", "labels", "weights", "cache_dir", "out")
"""Fields that a resume may change if the pictures and weights there have the same fingerprints."""
_DEVICE = ("accelerator", "precision")


def prepare_run(
    fields: Mapping[str, Any], log: Callable[[str], None], run_id: str | None = None
) -> tuple[RunConfig, RunDir]:
    """The config and directory of a run with these fields; `run_id` is W&B's, if it has one.

    Besides those of `RunConfig`, `config` is a YAML file of fields, which the others override, and
    `resume` a run directory, whose config must not change except for a larger number of epochs,
    the device, and places.
    Raises `ConfigError` and `RunDirError`.
    """
    refuse_torchrun()
    given = with_file(fields)
    if resume := given.pop("resume", None):
        run_dir = RunDir(absolute(run_directory(resume)))
    else:
        config = RunConfig.from_fields(given)
        for line in advice(given, config):
            log(line)
        run_dir = RunDir(config.out / _checked(run_id or secrets.token_hex(4)))
        if not run_dir.config_path.exists():
            return config, run_dir
    return _resumed(run_dir, given, log), run_dir


def with_file(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The given fields that have a value, and those of the file `config`. Raises `ConfigError`."""
    given = {name: value for name, value in fields.items() if value not in (None, "None")}
    file = given.pop("config", None)
    return given if file is None else read_mapping(Path(file)) | given


def _resumed(run_dir: RunDir, given: Mapping[str, Any], log: Callable[[str], None]) -> RunConfig:
    """The config with which a run is continued; other pictures or weights are found later."""
    recorded = run_dir.read_config(allow_unknown=False)
    changed = {name: given[name] for name in (*_PLACES, *_DEVICE) if name in given}
    # The directory may have been moved: its place is where it is now.
    changed["out"] = str(run_dir.path.parent)
    if "accelerator" in changed:
        changed.setdefault("precision", "auto")
    changes = differences(recorded, {k: v for k, v in given.items() if k not in changed})
    if changes.get("epochs", (0, 0))[1] > recorded.num_epochs:
        changed["epochs"] = changes.pop("epochs")[1]
    if changes:
        listed = ", ".join(f"{k} is {old}, given {new}" for k, (old, new) in changes.items())
        raise ConfigError(
            f"{run_dir.path} has another config: {listed}; only epochs may increase, and "
            f"{', '.join((*_PLACES, *_DEVICE))} may differ; other values need a new run"
        )
    config = RunConfig.from_fields(recorded.to_fields() | changed)
    return _on_device(config, recorded, log) if changed.keys() & {*_DEVICE} else config


def _on_device(config: RunConfig, recorded: RunConfig, log: Callable[[str], None]) -> RunConfig:
    """Replace `auto` by the recorded precision, or on another device by that device's."""
    accelerator = _accelerator(config.accelerator)
    is_same = accelerator == recorded.accelerator
    precision: str = config.precision
    if precision == "auto":
        precision = recorded.precision if is_same else _precision(accelerator)
    if (accelerator, precision) != (recorded.accelerator, recorded.precision):
        log(
            f"resuming on {accelerator} in {precision}; the epochs so far were computed on "
            f"{recorded.accelerator} in {recorded.precision}, so the result is not, to the bit, "
            "that of an uninterrupted run"
        )
    return config.model_copy(update={"accelerator": accelerator, "precision": precision})


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
        "unfreeze_from": _unfreeze_from(config),
        "val_fraction": splits.val_fraction,
        "pixel_range": splits.pixel_range,
        "accelerator": accelerator,
        "precision": _precision(accelerator) if config.precision == "auto" else config.precision,
        "cache_gb": cache_gb,
    }
    return config.model_copy(update=resolved), splits, cache


def default_device() -> tuple[str, str]:
    """The accelerator and the precision that `auto` means on this machine."""
    accelerator = _accelerator("auto")
    return accelerator, _precision(accelerator)


def _unfreeze_from(config: RunConfig) -> str | None:
    """The part's name, which for `timm:NAME` only timm can tell. Raises `ConfigError`."""
    entry, parts = STRATEGIES[config.strategy], config.backbone.part_names
    if "unfreeze_from" in entry.ignores:
        return None
    return config.unfreeze_from or entry.deepest(parts)


def _accelerator(asked: str) -> str:
    """Raises `ConfigError`, and `DeviceError` if a GPU was assigned that can't be used."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    assigned = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if assigned and assigned != "-1" and asked in ("auto", "gpu", "cuda"):
        if not has_cuda:
            words = f"CUDA_VISIBLE_DEVICES is {assigned}, but CUDA can't be used: {cuda_fault()}"
            raise DeviceError(f"{words}. To compute without it, pass --accelerator cpu")
        asked = "cuda"
    if asked in ("auto", "gpu"):
        found = "cuda" if has_cuda else "mps" if has_mps else "cpu"
        if asked == "gpu" and found == "cpu":
            raise _unavailable(asked)
        asked = found
    elif asked != "cpu" and not {"cuda": has_cuda, "mps": has_mps}[asked]:
        raise _unavailable(asked)
    if asked == "cuda":
        check_architecture()
    return asked


def _unavailable(asked: str) -> ConfigError:
    reason = f" ({cuda_fault()})" if asked != "mps" else ""
    return ConfigError(
        f"accelerator: got {asked!r}, but torch finds none here{reason}; pass auto or cpu"
    )


def _precision(accelerator: str) -> str:
    if accelerator != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
