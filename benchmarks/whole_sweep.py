"""A whole sweep, from nothing to its winner: the local sweep beside the plain way.

Turns one folder of pictures into the seconds that four strategies x two learning rates x ten epochs
take. The plain way runs in this process, so that it pays for its imports once; the local sweep is
the command that users type, its imports and caches included.

    python -m benchmarks --only sweep
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import plain
from finetune.runs.result import RunResult

STRATEGIES = ("freeze", "partial", "gradual", "scratch")
LEARNING_RATES = (0.001, 0.01)
EPOCHS = 10
EARLY_TERMINATE = {"type": "hyperband", "min_iter": 4, "eta": 3}
"""The earliest that a sweep with gradual may judge: its last part opens at epoch 3."""


def whole_sweep(place: Path, weights: Path, data_dir: Path, image_size: int) -> dict[str, Any]:
    """Seconds and winners of the same eight runs, ours three times: all, without scratch, and with
    early termination."""
    plain_seconds: dict[str, float] = {}
    plain_accuracies: dict[str, float] = {}
    for strategy in STRATEGIES:
        for rate in LEARNING_RATES:
            name = f"{strategy}-lr{rate}"
            run = plain.train(data_dir, weights, strategy, EPOCHS, image_size, learning_rate=rate)
            plain_seconds[name] = run.seconds
            plain_accuracies[name] = max(run.val_accuracies)
            print(f"  plain {name}: {run.seconds:.0f} s, {max(run.val_accuracies):.3f}", flush=True)
    common = {"data_dir": str(data_dir), "weights": str(weights), "image_size": image_size}

    def ours(name: str, strategies: tuple[str, ...], **more: Any) -> tuple[float, float]:
        taken = _local_sweep(place / name, common, strategies, **more)
        print(f"  ours {name}: {taken[0]:.0f} s, {taken[1]:.3f}", flush=True)
        return taken

    all_seconds, winner = ours("all", STRATEGIES)
    transfer_seconds, _ = ours("without-scratch", STRATEGIES[:-1])
    terminated_seconds, terminated_winner = ours(
        "early-termination", STRATEGIES, early_terminate=EARLY_TERMINATE
    )
    theirs = sum(plain_seconds.values())
    without_scratch = sum(s for name, s in plain_seconds.items() if "scratch" not in name)
    return {
        "plain_seconds": plain_seconds,
        "plain_winner_val_acc": max(plain_accuracies.values()),
        "seconds": all_seconds,
        "winner_val_acc": winner,
        "ratio": theirs / all_seconds,
        "without_scratch_seconds": transfer_seconds,
        "without_scratch_ratio": without_scratch / transfer_seconds,
        "early_termination_seconds": terminated_seconds,
        "early_termination_winner_val_acc": terminated_winner,
        "early_termination_ratio": theirs / terminated_seconds,
    }


def _local_sweep(
    place: Path, common: dict[str, Any], strategies: tuple[str, ...], **more: Any
) -> tuple[float, float]:
    """(seconds from typing the command to its end, the winner's accuracy), caches cold."""
    fixed = common | {"val_fraction": 0, "patience": 0, "epochs": EPOCHS}
    fixed |= {"cache_dir": str(place / "cache"), "out": str(place / "runs")}
    # The grid's order is the file's, here sweep.yaml's: the cheap strategies first.
    parameters: dict[str, Any] = {
        "strategy": {"values": list(strategies)},
        "learning_rate": {"values": list(LEARNING_RATES)},
    }
    parameters |= {name: {"value": value} for name, value in fixed.items()}
    metric = {"name": "best_val_acc", "goal": "maximize"}
    sweep = {
        "program": "agent.py",
        "method": "grid",
        "metric": metric,
        "parameters": parameters,
    } | more
    place.mkdir(parents=True)
    (place / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "finetune", "sweep", place / "sweep.yaml", "--workers", "1"],
        check=True,
        env=os.environ | {"WANDB_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - started
    results = [RunResult.load(path.parent) for path in (place / "runs").glob("*/result.json")]
    return seconds, max(result.best_val_acc for result in results)
