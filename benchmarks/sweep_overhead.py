"""What the local sweep costs: seconds a trial besides its epochs, and milliseconds to schedule one.

python -m benchmarks.sweep_overhead --json sweep_overhead.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
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


def trial_overhead_seconds(place: Path, wandb_mode: str, num_trials: int) -> list[float]:
    """Each trial's wall time, as its parent sees it, less its epochs."""
    os.environ["WANDB_MODE"] = wandb_mode
    values = {
        "strategy": "partial",
        "data_dir": str(place / "digits"),
        "weights": str(place / "weights.pth"),
        "val_fraction": 0,
        "image_size": 32,
        "epochs": 2,
        "batch_size": 10,
        "cache_dir": str(place / "cache"),
    }
    parameters = {name: {"value": value} for name, value in values.items()}
    parameters["seed"] = {"values": list(range(num_trials))}
    sweep = {"name": wandb_mode, "method": "grid", "metric": METRIC, "parameters": parameters}
    with Path(os.devnull).open("w") as nowhere:
        outcomes = run_sweep(sweep, out=place / wandb_mode, console=Console(file=nowhere))
    pairs = [(o, RunResult.load(o.run_dir)) for o in outcomes]
    pairs.sort(key=lambda pair: pair[1].seed)
    return [(o.seconds or 0) - r.train_seconds for o, r in pairs]


def scheduling_ms(place: Path, method: str, num_trials: int) -> float:
    """Milliseconds to claim, report and finish one of many trivial trials, enqueuing included."""
    seeds = {"values": list(range(num_trials))} if method == "grid" else {"min": 0, "max": 10**6}
    parameters = {"seed": seeds, "momentum": {"value": 0.5}}
    sweep = read_sweep(
        {"name": method, "method": method, "metric": METRIC, "parameters": parameters}
    )
    started = time.perf_counter()
    trial_queue = TrialQueue.open(sweep, f"sqlite:///{place / method}.db", num_trials)
    done = 0
    while claim := trial_queue.claim():
        trial_queue.report(claim, 1, 0.5, judge=True)
        trial_queue.finish(claim, "finished", 0.5, {"best_epoch": 0})
        done += 1
    assert done == num_trials and trial_queue.settled()
    return (time.perf_counter() - started) * 1e3 / num_trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--scheduled", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_digits(place / "digits", range(5, 10), 4, 3)
        torch.save(build(5, 0).state_dict(), place / "weights.pth")
        for mode in ("offline", "disabled"):  # the fork server is started once, with wandb in it
            overheads = trial_overhead_seconds(place, mode, given.trials)
            figures[f"trial_overhead_seconds/{mode}"] = median(overheads[1:])
        for method in ("grid", "random", "bayes"):
            figures[f"scheduling_ms/{method}"] = scheduling_ms(place, method, given.scheduled)
    for what, figure in figures.items():
        print(f"{what:35} {figure:8.3f}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
