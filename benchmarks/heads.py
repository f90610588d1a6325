"""A grid of twelve freeze trials whose heads train together, beside the same trials one by one."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune.runs.run_dir import read_metrics
from finetune.sweep import trial_runner
from finetune.sweep.runner import run_sweep

RATES = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
DECAYS = (0.0, 0.001)
EPOCHS = 10


def heads_together(
    folder: Path, weights: Path, data_dir: Path, image_size: int, alternations: int
) -> dict[str, Any]:
    """Seconds of a whole sweep with filled caches, and the largest difference of a metric."""
    fixed = {
        "strategy": "freeze",
        "data_dir": str(data_dir),
        "weights": str(weights),
        "image_size": image_size,
        "val_fraction": 0,
        "patience": 0,
        "epochs": EPOCHS,
        "cache_dir": str(folder / "cache"),
    }
    parameters: dict[str, Any] = {name: {"value": value} for name, value in fixed.items()}
    parameters |= {"learning_rate": {"values": [*RATES]}, "weight_decay": {"values": [*DECAYS]}}
    metric = {"name": "best_val_acc", "goal": "maximize"}
    sweep = {"name": "heads", "method": "grid", "metric": metric, "parameters": parameters}

    def seconds(max_together: int) -> float:
        trial_runner.MAX_TOGETHER = max_together
        out = folder / f"together-{max_together}"
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        with Path(os.devnull).open("w") as nowhere:
            trials = run_sweep(sweep, out=out, workers=1, console=Console(file=nowhere))
        assert all(trial.state == "finished" for trial in trials)
        return time.perf_counter() - started

    all_together = trial_runner.MAX_TOGETHER
    seconds(all_together)  # fills the caches
    pairs = []
    for _ in range(alternations):
        pairs.append((seconds(1), seconds(all_together)))
        print(f"  one by one {pairs[-1][0]:.1f} s, together {pairs[-1][1]:.1f} s", flush=True)
    ratios = [alone / together for alone, together in pairs]
    return {
        "trials": len(RATES) * len(DECAYS),
        "one_by_one_seconds": statistics.median(alone for alone, _ in pairs),
        "together_seconds": statistics.median(together for _, together in pairs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "largest_difference": _difference(
            folder / "together-1", folder / f"together-{all_together}"
        ),
    }


def _difference(one: Path, other: Path) -> float:
    """The largest difference between the metrics of the same trials; run ids sort as the cells."""
    found = 0.0
    places = zip(
        sorted(one.glob("*/metrics.csv")), sorted(other.glob("*/metrics.csv")), strict=True
    )
    for ours, theirs in places:
        for row, same in zip(read_metrics(ours), read_metrics(theirs), strict=True):
            names = row.keys() - {"images_per_second"}
            found = max(found, *(abs(row[name] - same[name]) for name in names))
    return found
