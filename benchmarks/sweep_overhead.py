"""Overhead of the local sweep: seconds per trial, and milliseconds to schedule one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from finetune.datasets.digits import write_digits
from finetune.model.network import build
from finetune.runs.result import RunResult
from finetune.sweep.runner import run_sweep
from finetune.sweep.sweep_file import read_sweep
from finetune.sweep.trial_queue import TrialQueue

METRIC = {"name": "best_val_acc", "goal": "maximize"}


def trial_overhead_seconds(folder: Path, wandb_mode: str, num_trials: int) -> list[float]:
    """Wall time of each trial in the parent process, minus its epochs."""
    os.environ["WANDB_MODE"] = wandb_mode
    values = {
        "strategy": "partial",
        "data_dir": str(folder / "digits"),
        "weights": str(folder / "weights.pth"),
        "val_fraction": 0,
        "image_size": 32,
        "epochs": 2,
        "batch_size": 10,
        "cache_dir": str(folder / "cache"),
    }
    parameters = {name: {"value": value} for name, value in values.items()}
    parameters["seed"] = {"values": list(range(num_trials))}
    sweep = {"name": wandb_mode, "method": "grid", "metric": METRIC, "parameters": parameters}
    with Path(os.devnull).open("w") as nowhere:
        trials = run_sweep(sweep, out=folder / wandb_mode, console=Console(file=nowhere))
    pairs = [(trial, RunResult.load(trial.run_dir)) for trial in trials]
    pairs.sort(key=lambda pair: pair[1].seed)
    return [(trial.seconds or 0) - result.train_seconds for trial, result in pairs]


def scheduling_ms(folder: Path, method: str, num_trials: int) -> float:
    """Milliseconds per trial to enqueue, claim, report and finish it without training."""
    seeds = {"values": list(range(num_trials))} if method == "grid" else {"min": 0, "max": 10**6}
    parameters = {"seed": seeds, "momentum": {"value": 0.5}}
    sweep = read_sweep(
        {"name": method, "method": method, "metric": METRIC, "parameters": parameters}
    )
    started = time.perf_counter()
    trial_queue = TrialQueue(sweep, f"sqlite:///{folder / method}.db", num_trials)
    done = 0
    while claim := trial_queue.claim():
        trial_queue.report(claim, 1, 0.5, judge=True)
        trial_queue.finish(claim, "finished", 0.5, {"best_epoch": 0})
        done += 1
    assert done == num_trials and trial_queue.is_complete()
    return (time.perf_counter() - started) * 1e3 / num_trials


def sweep_overhead(folder: Path, num_trials: int, num_scheduled: int = 1000) -> dict[str, float]:
    """Seconds per trial besides its epochs, and milliseconds to schedule one."""
    write_digits(folder / "digits", range(5, 10), 4, 3)
    torch.save(build("resnet18", 5, 64, 0).network.state_dict(), folder / "weights.pth")
    figures: dict[str, float] = {}
    for mode in ("offline", "disabled"):  # offline first: the fork server then has wandb imported
        overheads = trial_overhead_seconds(folder, mode, num_trials)
        figures[f"trial_overhead_seconds/{mode}"] = median(overheads[1:])
    for method in ("grid", "random", "bayes"):
        figures[f"scheduling_ms/{method}"] = scheduling_ms(folder, method, num_scheduled)
    return figures
