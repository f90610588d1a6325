"""Runs that are killed repeatedly have the results of uninterrupted runs."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.config.strategies import STRATEGIES
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir, read_metrics

MANY_KILLS = 20

CLOCKS = {"run_id", "train_seconds", "cache_seconds", "images_per_second", "versions", "config",
          "git_commit", "prefix_timings"}  # fmt: skip


def carry_out(fields: dict[str, Any], place: Path) -> None:
    """In a child process: start the run, or resume it."""
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["WANDB_RUN_ID"] = place.name
    with (place.parent / f"{place.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from finetune.training.train import train_and_finetune

    torch.set_num_threads(1)
    train_and_finetune(**fields)


@pytest.fixture(scope="module")
def children() -> Iterator[Any]:
    """Children start quickly: the imports are already done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune.sweep.preload", "tests.robustness.test_interrupted"])
    yield context


def start(children: Any, fields: dict[str, Any], place: Path) -> BaseProcess:
    process: BaseProcess = children.Process(target=carry_out, args=(fields, place))
    process.start()
    return process


def outcome(place: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    rows = read_metrics(place / "metrics.csv")
    for row in rows:
        del row["images_per_second"]
    best = torch.load(place / "best.ckpt", weights_only=True)
    last = torch.load(place / "last.ckpt", weights_only=True)
    with np.load(place / "predictions.npz") as predictions:
        logits = predictions["logits"]
    return {
        "rows": rows,
        "best": {k: v.numpy().tobytes() for k, v in best["state_dict"].items()},
        "last": {k: v.numpy().tobytes() for k, v in last["state_dict"].items()},
        "logits": logits.tobytes(),
        "result": RunResult.load(place).model_dump(exclude=CLOCKS),
        "failed": (place / "failure.json").exists(),
        "left": sorted(p.name for p in place.iterdir() if p.name.endswith(".tmp")),
    }


def killed_while(process: BaseProcess, place: Path, when: str, rng: random.Random) -> bool:
    """Kill at the moment that `when` names; returns False if the run ended before."""

    def wait(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline and not until():
            time.sleep(0.0005)

    if when == "at random":
        process.join(rng.uniform(0.1, 1.5))
    else:
        file = "last.ckpt" if when == "about an unfreezing" else when.removeprefix("within ")
        aside = place / f".{file}.{process.pid}.tmp"
        for _ in range(rng.randrange(3)):  # these writes may finish
            wait(aside.exists)
            wait(lambda: not aside.exists())
        wait(aside.exists)
        if when == "about an unfreezing":  # it follows an epoch's last.ckpt directly
            wait(lambda: not aside.exists())
        process.join(rng.uniform(0, 0.04))
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


KILLED = [
    *((strategy, "at random") for strategy in STRATEGIES),
    ("gradual", "within last.ckpt"),
    ("gradual", "within best.ckpt"),
    ("gradual", "about an unfreezing"),
]


@pytest.mark.real_network  # the small one writes its files too quickly to be killed meanwhile
@pytest.mark.parametrize(
    ("strategy", "when", "num_kills"),
    [
        *(pytest.param(*killed, 1, marks=pytest.mark.slow) for killed in KILLED[-5:]),
        *(pytest.param(*killed, MANY_KILLS, marks=pytest.mark.long) for killed in KILLED),
    ],
)
def test_a_run_killed_repeatedly_has_the_result_of_an_uninterrupted_run(
    strategy: str, when: str, num_kills: int, children: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    fields = fields | {
        "strategy": strategy,
        "lr_schedule": "cosine",
        "data_aug": "y",
        "keep_last": True,
    }
    runs = tmp_path / "runs"
    runs.mkdir()
    reference = start(children, fields, runs / "reference")
    reference.join()
    assert reference.exitcode == 0, (runs / "reference.log").read_text()
    expected = outcome(runs / "reference")

    rng = random.Random(f"{strategy} {when}")
    place, done = runs / "killed", 0
    while True:
        process = start(children, fields, place)
        if done < num_kills and killed_while(process, place, when, rng):
            done += 1
            continue
        process.join()
        assert RunDir(place).finished, (runs / "killed.log").read_text()
        assert outcome(place) == expected
        if done == num_kills:
            break
        shutil.rmtree(place)
