"""Fetches the runs of a W&B sweep into a folder of run directories, without their checkpoints."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from finetune.config.fields import RunConfig
from finetune.runs.run_dir import RunDir
from finetune.system.errors import ConfigError, FinetuneError
from finetune.system.progress import bar
from finetune.system.text import one_line
from finetune.tracking.tracker import FOLDER, RUN_FILES

FETCHED = ".wandb"  # hidden, because the same runs may also be in the folder of runs itself
_FAILED = ("failed", "crashed", "killed", "preempted")  # W&B's states


def fetch_sweep(address: str, runs_dir: Path) -> Path:
    """Fetch the new runs of a sweep into `runs_dir`/.wandb/ENTITY-PROJECT-SWEEP; returns that.

    Raises `ConfigError` if the address isn't ENTITY/PROJECT/SWEEP, and `FinetuneError` if W&B
    can't be reached or has no such sweep.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+/[\w.-]+", address):
        raise ConfigError(f"--wandb: got {address!r}; must be ENTITY/PROJECT/SWEEP")
    import wandb

    folder = runs_dir / FETCHED / address.replace("/", "-")
    try:
        with client_errors(f"sweep {address}"):
            sweep: Any = wandb.Api().sweep(address)  # type: ignore[no-untyped-call]
            runs = list(sweep.runs)
            advance = bar(f"fetching runs of {address}", len(runs))
            for run in runs:
                _fetch_run(run, folder)
                advance()
    except OSError as error:
        raise FinetuneError(f"{folder} can't be written: {error.strerror or error}") from None
    if not runs:
        raise FinetuneError(f"W&B: sweep {address} has no runs yet")
    return folder


@contextmanager
def client_errors(what: str) -> Iterator[None]:
    """Turn what W&B's client raises into a `FinetuneError`: its errors have no common class."""
    try:
        yield
    except (FinetuneError, OSError):
        raise
    except Exception as error:
        raise FinetuneError(f"W&B: {what}: {one_line(error)}") from None


def _fetch_run(run: Any, folder: Path) -> None:
    """Fetch one run's directory, complete or not at all, unless it is there and finished."""
    if not re.fullmatch(r"[\w-][\w.-]*", run.id):
        raise ValueError(f"a run has the id {run.id!r}, which can't be the name of a folder")
    target, partial = folder / run.id, folder / f".{run.id}.part"
    if RunDir(target).finished:
        return
    for outdated in (partial, target):
        shutil.rmtree(outdated, ignore_errors=True)
    partial.mkdir(parents=True)
    config = {k: v for k, v in run.config.items() if k in RunConfig.model_fields}
    (partial / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for file in run.files(names=[f"{FOLDER}/{name}" for name in RUN_FILES]):
        file.download(root=str(partial), replace=True).close()
        (partial / file.name).replace(partial / Path(file.name).name)
    if run.state in _FAILED:
        summary = run.summary
        reason = summary.get("reason") or f"W&B says {run.state}; the run gave no reason"
        RunDir(partial).write_failure(str(summary.get("state") or run.state), str(reason), None)
    partial.rename(target)
