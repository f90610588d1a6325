"""A W&B sweep's runs, fetched into a folder of run directories.

Turns ENTITY/PROJECT/SWEEP into what a local sweep would have left, checkpoints apart: the runs
have sent their metrics, predictions and results along (`finetune.tracking.RUN_FILES`). Knows
nothing about what is then done with them.

    >>> fetch_sweep("me/finetune/ab12cd34", Path("runs"))  # doctest: +SKIP
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from finetune.config.fields import RunConfig
from finetune.runs.run_dir import RunDir
from finetune.system.errors import ConfigError, FinetuneError
from finetune.system.progress import bar
from finetune.tracking.tracker import FOLDER, RUN_FILES

FETCHED = ".wandb"
"""Inside a folder of runs: hidden, because the same runs may lie beside it."""

_ENDED_BADLY = ("failed", "crashed", "killed", "preempted")


def fetch_sweep(address: str, runs_dir: Path) -> Path:
    """Fetch what is new of a sweep into `runs_dir`/.wandb/ENTITY-PROJECT-SWEEP and return that.

    Raises `ConfigError` for an address that isn't ENTITY/PROJECT/SWEEP, and `FinetuneError` when
    W&B can't be reached or has no such sweep.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+/[\w.-]+", address):
        raise ConfigError(f"--wandb: got {address!r}; ENTITY/PROJECT/SWEEP is needed")
    import wandb

    folder = runs_dir / FETCHED / address.replace("/", "-")
    try:
        sweep: Any = wandb.Api().sweep(address)  # type: ignore[no-untyped-call]
        runs = list(sweep.runs)
        done = bar(f"fetching runs of {address}", len(runs))
        for run in runs:
            _fetch_run(run, folder)
            done()
    except (wandb.errors.Error, ValueError) as error:
        raise FinetuneError(f"W&B: sweep {address}: {error}") from None
    except OSError as error:
        raise FinetuneError(f"{folder} can't be written: {error.strerror or error}") from None
    if not runs:
        raise FinetuneError(f"W&B: sweep {address} has no runs yet")
    return folder


def _fetch_run(run: Any, folder: Path) -> None:
    """One run's directory, whole or not at all; a finished one is fetched once."""
    if not re.fullmatch(r"[\w-][\w.-]*", run.id):
        raise ValueError(f"a run has the id {run.id!r}, which can't name a folder")
    place = folder / run.id
    if RunDir(place).finished:
        return
    beside = folder / f".{run.id}.part"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    beside.mkdir(parents=True)
    config = {k: v for k, v in run.config.items() if k in RunConfig.model_fields}
    (beside / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for file in run.files(names=[f"{FOLDER}/{name}" for name in RUN_FILES]):
        file.download(root=str(beside), replace=True).close()
        (beside / file.name).replace(beside / Path(file.name).name)
    if run.state in _ENDED_BADLY:
        summary = run.summary
        reason = summary.get("reason") or f"W&B says {run.state}, and the run left no word"
        RunDir(beside).write_failure(str(summary.get("state") or run.state), str(reason), None)
    beside.rename(place)
