"""A long local sweep: memory, handles and files at its end are those after its first trials."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.runs.result import RunResult
from tests.sweep.test_runner import METRIC, base, children, environment

__all__ = ["base"]

SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "40"))
"""SOAK_SECONDS=3600 is the long version."""

NUM_FIRST = 6
"""Number of trials after which all permanent memory is allocated."""

NUM_SEEN = 9
"""The least number of samples, three for each third."""


@dataclass(frozen=True)
class Held:
    """Memory, handles and files of the sweep's process and its fork server."""

    num_trials: int
    memory_mb: tuple[float, float]
    num_handles: tuple[int, int]
    num_processes: int
    temporary: int
    cached: int
    beside: int
    """Files in `out` besides run directories and the storage."""


def anonymous_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("Anonymous:"))


def num_files(folder: Path) -> int:
    """The files below that exist long enough to be listed: os.walk skips a folder that vanishes."""
    return sum(len(files) for _, _, files in os.walk(folder))


def num_entries(folder: Path) -> int:
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


def look(process: subprocess.Popen[bytes], server: int, folder: Path, num_trials: int) -> Held:
    pair = (process.pid, server)
    return Held(
        num_trials,
        tuple(map(anonymous_mb, pair)),  # type: ignore[arg-type]
        tuple(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pair),  # type: ignore[arg-type]
        sum(len(children(pid)) for pid in pair),
        num_entries(folder / "tmp"),
        num_files(folder / "cache"),
        sum(not path.is_dir() for path in (folder / "runs").iterdir()),
    )


def requeue(run_dir: Path) -> None:
    """Remove checkpoints of finished runs: those of an hour would fill the disk."""
    for name in ("best.ckpt", "last.ckpt"):
        (run_dir / name).unlink(missing_ok=True)


@pytest.mark.long
def test_memory_and_files_do_not_grow_during_a_long_sweep(base: Any, tmp_path: Path) -> None:
    parameters = {name: {"value": value} for name, value in (base | {"epochs": 1}).items()}
    parameters |= {"strategy": {"value": "freeze"}, "learning_rate": {"min": 1e-4, "max": 1e-2}}
    given = {"name": "soak", "program": "agent.py", "method": "random", "metric": METRIC}
    given["parameters"] = parameters
    (tmp_path / "soak.yaml").write_text(yaml.safe_dump(given))
    (tmp_path / "tmp").mkdir()
    # Offline, W&B keeps here what `wandb sync` sends later; this grows by design.
    wandb_dirs = {f"WANDB_{name}_DIR": str(tmp_path / "wandb") for name in ("CACHE", "CONFIG", "DATA")}  # noqa: E501  # fmt: skip
    said = tmp_path / "said"
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", "sweep", "soak.yaml", "--max_runs", "100000"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=file,
            env=environment(WANDB_MODE="offline", TMPDIR=str(tmp_path / "tmp"), **wandb_dirs),
        )  # fmt: skip
    try:
        seen, finished = watch(process, tmp_path, said)
        process.terminate()
        assert process.wait(timeout=120) == -15, said.read_text()
    finally:
        process.kill()
        process.wait()
    print(*(seen[i] for i in (0, len(seen) // 2, -1)), sep="\n")
    check_steady(seen)
    # A process ended by a signal leaves the folder of multiprocessing's socket.
    assert {path.name[:5] for path in (tmp_path / "tmp").iterdir()} <= {"pymp-"}
    assert not list(tmp_path.glob("runs/*/.*.tmp")) and not list(tmp_path.glob("cache/.*"))
    for run_dir in finished:
        assert RunResult.load(run_dir).epochs_run == 1


def watch(
    process: subprocess.Popen[bytes], folder: Path, said: Path
) -> tuple[list[Held], set[Path]]:
    """Samples after each trial for SOAK_SECONDS, and the directories of finished trials."""
    seen: list[Held] = []
    finished: set[Path] = set()
    latest = ends = time.monotonic() + 600 + SOAK_SECONDS
    while time.monotonic() < (ends if len(seen) >= NUM_SEEN else latest):
        assert process.poll() is None, said.read_text()
        new = {path.parent for path in folder.glob("runs/*/result.json")} - finished
        finished |= new
        for run_dir in new:
            requeue(run_dir)
        if new and len(finished) >= NUM_FIRST:
            if not seen:
                ends = time.monotonic() + SOAK_SECONDS
            # The fork server is the child that has had workers; the other one tracks resources.
            server = max(children(process.pid), key=anonymous_mb)
            seen.append(look(process, server, folder, len(finished)))
        time.sleep(0.05)
    return seen, finished


def check_steady(seen: list[Held]) -> None:
    """The minimum in the last third is at most the maximum in the first, except for memory."""
    assert len(seen) >= NUM_SEEN, f"only {len(seen)} were sampled in time"
    third = len(seen) // 3
    first, last = seen[:third], seen[-third:]
    num_between = last[0].num_trials - first[-1].num_trials
    for i, per_trial in ((0, 0.05), (1, 0.01)):
        grown = min(h.memory_mb[i] for h in last) - max(h.memory_mb[i] for h in first)
        assert grown <= 2 + per_trial * num_between, (i, grown, seen[0], seen[-1])
        handles = [[h.num_handles[i] for h in part] for part in (first, last)]
        assert min(handles[1]) <= max(handles[0]), (i, handles, seen[0], seen[-1])
    for name in ("num_processes", "temporary", "cached", "beside"):
        before, after = ([getattr(h, name) for h in part] for part in (first, last))
        assert min(after) <= max(before), (name, before, after)
