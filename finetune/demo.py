"""The strategies compared on handwritten digits or on photographs: `python -m finetune demo`.

It needs no account. The digits need no download either: data, source weights, local sweep, table
and report. The photographs need ImageNet's weights.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.analysis.report.report import report
from finetune.config.backbones import find_backbone
from finetune.datasets.digits import write_digits
from finetune.sweep.runner import run_sweep
from finetune.sweep.table import final_table, open_console
from finetune.system.errors import ConfigError

SOURCE_DIGITS, TARGET_DIGITS = range(5), range(5, 10)

COMMON: dict[str, Any] = {"image_size": 48, "data_aug": "n", "val_fraction": 0}

SOURCE: dict[str, Any] = {
    **COMMON,
    "strategy": "scratch",
    "epochs": 4,
    "batch_size": 16,
    "learning_rate": 0.01,
    "lr_schedule": "cosine",
    "name": "source",
}

TARGET: dict[str, Any] = {**COMMON, "epochs": 40, "batch_size": 5, "patience": 0}
"""25 pictures make 5 steps per epoch, so a run has 200 steps."""

SWEEP: dict[str, Any] = {
    "program": "agent.py",
    "method": "grid",
    "metric": {"name": "best_val_acc", "goal": "maximize"},
    "parameters": {
        "strategy": {"values": ["freeze", "partial", "gradual", "scratch"]},
        "learning_rate": {"values": [0.003, 0.01]},
    },
}

PHOTOS = Path(__file__).parent / "datasets" / "clothing"
"""Ten classes of clothing, CC0: train/ with 20 of each, val/ with 6."""

PHOTOS_SWEEP: dict[str, Any] = {
    "method": "grid",
    "metric": {"name": "best_val_acc", "goal": "maximize"},
    "parameters": {
        "strategy": {"values": ["probe", "freeze", "partial", "gradual", "lp-ft", "scratch"]},
    },
}

PHOTOS_TARGET: dict[str, Any] = {
    "image_size": 128,
    "epochs": 8,
    "batch_size": 16,
    "learning_rate": 0.003,
    "lr_schedule": "cosine",
}

CAUTION = (
    "Both tasks have the same writers and scanner: this demonstrates the tool, not which strategy "
    "suits your data."
)


def demo(
    out: Path, seed: int = 42, photos: bool = False, weights: str | None = None, **fields: Any
) -> int:
    """Make data and weights, run the sweep, print its table, write the report.

    `photos`: photographs with the `weights` (default: imagenet) instead of digits. `fields`
    override those of all runs, such as `epochs=2`. Returns the exit code.
    """
    if photos:
        return demo_photos(out, {"seed": seed, "weights": weights or "imagenet", **fields})
    if weights:
        raise ConfigError("weights: the digits have their own; pass --photos too")
    started = time.perf_counter()
    console = open_console()
    source, target = out / "data" / "digits-0-4", out / "data" / "digits-5-9"
    write_digits(source, SOURCE_DIGITS, train_per_class=140, val_per_class=10, num_colours=3)
    write_digits(target, TARGET_DIGITS, train_per_class=5, val_per_class=30, num_colours=1)
    common = {"cache_dir": out / "cache", "seed": seed, **fields}
    source_weights = out / "digits-0-4.pth"
    if not source_weights.exists():
        console.print("Training the source network on digits 0-4, once ...")
        train_source(source_weights, SOURCE | common | {"data_dir": source, "out": out / "source"})
    console.print("Fine-tuning it on five pictures of each of the digits 5-9, in four ways ...")
    trials = run_sweep(
        SWEEP,
        name=f"demo-seed{seed}",
        out=out / "runs",
        workers=min(2, os.cpu_count() or 1),
        fields=TARGET | common | {"data_dir": target, "weights": source_weights},
        console=console,
    )
    console.print(final_table(trials, "best_val_acc"))
    best: dict[str, float] = {}
    for trial in trials:  # the best first
        best.setdefault(trial.strategy, trial.best_val_acc or 0.0)
    ranked = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in best.items())
    console.print(f"Best validation accuracy: {ranked}")
    report(out / "runs")
    console.print(CAUTION)
    console.print(f"Took {time.perf_counter() - started:.0f} s.")
    return 0 if all(trial.state == "finished" for trial in trials) else 1


def demo_photos(out: Path, fields: Mapping[str, Any]) -> int:
    """Sweep the strategies on photographs, test the best model, and let it predict."""
    from finetune.inference.evaluate import evaluate
    from finetune.inference.predict import predict

    started = time.perf_counter()
    console, runs_dir = open_console(), out / "photos"
    console.print(f"Six strategies on 200 photographs of ten kinds of clothing ({PHOTOS}) ...")
    trials = run_sweep(
        PHOTOS_SWEEP,
        name="photos",
        out=runs_dir,
        workers=min(2, os.cpu_count() or 1),
        fields={**PHOTOS_TARGET, "data_dir": PHOTOS, "cache_dir": out / "cache", **fields},
        console=console,
    )
    console.print(final_table(trials, "best_val_acc"))
    report(runs_dir)
    best = trials[0]
    if best.state == "finished":
        console.print(f"The best model, {best.strategy}, on the 60 photographs of val/:")
        evaluate(best.run_dir)
        predict(best.run_dir, sorted(PHOTOS.glob("val/*/00.jpg")), top=2)
    console.print(f"Took {time.perf_counter() - started:.0f} s.")
    return 0 if all(trial.state == "finished" for trial in trials) else 1


def train_source(weights: Path, fields: dict[str, Any]) -> None:
    """Train on the source task and save the network without its head."""
    from finetune.model.weights import write_checkpoint
    from finetune.training.train import train_and_finetune

    model: Any = train_and_finetune(**fields)
    *_, head = find_backbone(model.model_name).parts.values()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{head}.")}
    write_checkpoint(state, weights)
