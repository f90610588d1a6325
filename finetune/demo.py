"""The main job on handwritten digits: nothing to sign up for, nothing to download.

Turns an empty folder into two small tasks, source weights, a local sweep over the four strategies,
its table and its report. Knows nothing that the rooms it calls know.

    python -m finetune demo
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from finetune.analysis.report.report import report
from finetune.datasets.digits import write_digits
from finetune.sweep.runner import run_sweep
from finetune.sweep.table import final_table, open_console
from finetune.sweep.trials import TrialResult

SOURCE_DIGITS, TARGET_DIGITS = range(5), range(5, 10)

SOURCE: dict[str, Any] = {
    "strategy": "scratch",
    "epochs": 4,
    "batch_size": 16,
    "learning_rate": 0.01,
    "lr_schedule": "cosine",
    "name": "source",
}

TARGET: dict[str, Any] = {
    "epochs": 40,
    "batch_size": 5,
    "patience": 0,
}
"""25 pictures make 5 steps an epoch, so a run takes 200."""

COMMON: dict[str, Any] = {"image_size": 48, "data_aug": "n", "val_fraction": 0}

LEARNING_RATES = (0.003, 0.01)

HONEST_LINE = (
    "The same writers and scanner made both tasks: this shows the tool at work, "
    "not which strategy suits your data."
)


def demo(out: Path, seed: int = 42) -> int:
    """Make data and weights, sweep, print the table, write the report; the exit code."""
    started = time.perf_counter()
    console = open_console()
    source, target = out / "data" / "digits-0-4", out / "data" / "digits-5-9"
    write_digits(source, SOURCE_DIGITS, train_per_class=140, val_per_class=10, num_colours=3)
    write_digits(target, TARGET_DIGITS, train_per_class=5, val_per_class=30, num_colours=1)
    places = {"cache_dir": out / "cache", "seed": seed}
    weights = out / "resnet18-digits-0-4.pth"
    if not weights.exists():
        console.print("Training the source network on digits 0-4, once ...")
        _train_source(weights, {"data_dir": source, "out": out / "source", **places})
    console.print("Fine-tuning it on five pictures each of digits 5-9, four ways ...")
    outcomes = run_sweep(
        _sweep(f"demo-seed{seed}"),
        out=out / "runs",
        workers=min(2, os.cpu_count() or 1, len(LEARNING_RATES)),
        fields=COMMON | TARGET | places | {"data_dir": target, "weights": weights},
        console=console,
    )
    console.print(final_table(outcomes, "best_val_acc"))
    _conclude(outcomes, console.print)
    report(out / "runs")
    console.print(HONEST_LINE)
    console.print(f"Took {time.perf_counter() - started:.0f} s.")
    return 0 if all(outcome.state == "finished" for outcome in outcomes) else 1


def _sweep(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "program": "agent.py",
        "method": "grid",
        "metric": {"name": "best_val_acc", "goal": "maximize"},
        "parameters": {
            "strategy": {"values": ["freeze", "partial", "gradual", "scratch"]},
            "learning_rate": {"values": list(LEARNING_RATES)},
        },
    }


def _train_source(weights: Path, fields: dict[str, Any]) -> None:
    """Train on the source task and keep everything but its head."""
    from finetune.model.weights import write_checkpoint
    from finetune.training.train import train_and_finetune

    model = train_and_finetune(**(COMMON | SOURCE | fields))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    write_checkpoint(state, weights)


def _conclude(outcomes: list[TrialResult], say: Any) -> None:
    best: dict[str, float] = {}
    for outcome in outcomes:
        accuracy = outcome.best_val_acc or 0.0
        best[outcome.strategy] = max(accuracy, best.get(outcome.strategy, 0.0))
    ranked = sorted(best.items(), key=lambda item: -item[1])
    say("Best validation accuracy: " + ", ".join(f"{name} {acc:.3f}" for name, acc in ranked))
