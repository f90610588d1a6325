"""A sweep's trials that train only the head are carried out together by one worker."""

from __future__ import annotations

import io
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.runs.result import RunResult
from finetune.runs.run_dir import read_metrics
from finetune.sweep import trial_runner
from finetune.sweep.runner import run_sweep
from finetune.sweep.worker import Job
from finetune.sweep.worker_pool import Worker, WorkerPool
from tests.sweep.test_runner import (
    Fields,
    base,
    check_complete,
    complete,
    content,
    start,
    workers_of,
)

__all__ = ["base"]

RATES = [0.001, 0.01, 0.1]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that workers are started with."""
    found, original = [], WorkerPool.start

    def observed(self: WorkerPool, job: Job) -> Worker:
        found.append(job)
        return original(self, job)

    monkeypatch.setattr(WorkerPool, "start", observed)
    return found


def run(given: Fields, folder: Path, **options: Any) -> dict[tuple[Any, ...], RunResult]:
    """The results by strategy, learning rate and seed."""
    console = Console(file=io.StringIO(), width=200)
    trials = run_sweep(given, out=folder / "runs", console=console, **options)
    assert {trial.state for trial in trials} == {"finished"}
    found = [RunResult.load(trial.run_dir) for trial in trials]
    return {(r.strategy, r.config["learning_rate"], r.seed): r for r in found}


@pytest.mark.slow
def test_heads_of_one_seed_share_a_worker_and_give_the_results_they_give_alone(
    base: Fields, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = content(base, strategy=["freeze", "partial"], learning_rate=RATES, seed=[1, 2])
    together = run(given, tmp_path / "together", workers=2)
    assert sorted(len(job.configs) for job in jobs) == [1] * 6 + [3, 3]
    for job in jobs:
        assert len({(config.strategy, config.seed) for config in job.configs}) == 1
    check_complete(tmp_path / "together", 12)
    monkeypatch.setattr(trial_runner, "MAX_TOGETHER", 1)
    alone = run(given, tmp_path / "alone", workers=2)
    assert together.keys() == alone.keys()
    for key, result in alone.items():
        assert together[key].best_val_loss == result.best_val_loss
        assert together[key].last_val_acc == result.last_val_acc
        assert together[key].train_seconds > 0


def test_at_most_so_many_share_a_worker(
    base: Fields, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_runner, "MAX_TOGETHER", 2)
    run(content(base, strategy=["freeze"], learning_rate=RATES), tmp_path)
    assert sorted(len(job.configs) for job in jobs) == [1, 2]


@pytest.mark.slow
def test_if_their_worker_is_killed_each_is_carried_out_alone(base: Fields, tmp_path: Path) -> None:
    given = content(base | {"epochs": 150}, strategy=["freeze"], learning_rate=RATES)
    process = start(tmp_path, given)
    logs = tmp_path / "runs"
    deadline = time.monotonic() + 60
    while not all("epoch  3" in path.read_text() for path in logs.glob("*/output.log")) or not any(
        logs.glob("*/output.log")
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (worker,) = workers_of(tmp_path)
    os.kill(worker, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("interrupted") == 3 and "3 finished" in output
    check_complete(tmp_path, 3)
    expected = tmp_path / "expected"
    expected.mkdir()
    complete(expected, given)
    losses = [
        {
            RunResult.load(path.parent).config["learning_rate"]: read_metrics(path)[-1]["val_loss"]
            for path in folder.glob("runs/*/metrics.csv")
        }
        for folder in (tmp_path, expected)
    ]
    assert losses[0] == losses[1]
