"""A complete sweep with empty caches: the local sweep beside the plain pipeline.

Four strategies x two learning rates x ten epochs. The plain pipeline runs in this process and so
imports once; the local sweep is the command that users type, imports included.
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
EARLY_TERMINATE = {"type": "hyperband", "min_iter": 1, "eta": 3}
"""Each strategy is first judged after one epoch in which all that it trains is training."""


def complete_sweep(folder: Path, weights: Path, data_dir: Path, image_size: int) -> dict[str, Any]:
    """Seconds and best accuracies of the same eight runs.

    This project runs them three times: all, without scratch, and all with early termination.
    """
    plain_seconds: dict[str, float] = {}
    plain_accuracies: dict[str, float] = {}
    for strategy in STRATEGIES:
        for rate in LEARNING_RATES:
            name = f"{strategy}-lr{rate}"
            run = plain.train(
                "resnet18", data_dir, weights, strategy, EPOCHS, image_size, learning_rate=rate
            )
            plain_seconds[name] = run.seconds
            plain_accuracies[name] = max(run.val_accuracies)
            print(f"  plain {name}: {run.seconds:.0f} s, {max(run.val_accuracies):.3f}", flush=True)
    common = {"data_dir": str(data_dir), "weights": str(weights), "image_size": image_size}

    def ours(name: str, strategies: tuple[str, ...], **more: Any) -> tuple[float, float]:
        taken = _local_sweep(folder / name, common, strategies, **more)
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
    folder: Path, common: dict[str, Any], strategies: tuple[str, ...], **more: Any
) -> tuple[float, float]:
    """(wall time of the command in seconds, the best accuracy), with empty caches."""
    fixed = common | {"val_fraction": 0, "patience": 0, "epochs": EPOCHS}
    fixed |= {"cache_dir": str(folder / "cache"), "out": str(folder / "runs")}
    # A grid's order is the file's. As in sweep.yaml, the cheap strategies come first.
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
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "finetune", "sweep", folder / "sweep.yaml", "--workers", "1"],
        check=True,
        env=os.environ | {"WANDB_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - started
    results = [RunResult.load(path.parent) for path in (folder / "runs").glob("*/result.json")]
    return seconds, max(result.best_val_acc for result in results)
