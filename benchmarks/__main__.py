"""Speed and memory of this project, beside an ordinary Lightning pipeline where that makes sense.

Prints tables and writes all figures as JSON.

    python -m benchmarks [--quick] [--only freeze sweep]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.transforms import v2

from benchmarks.commands import commands, commands_table
from benchmarks.complete_sweep import complete_sweep
from benchmarks.heads import heads_together
from benchmarks.memory import peak_bytes
from benchmarks.pipelines import Bench
from benchmarks.sweep_overhead import sweep_overhead
from finetune.config.backbones import IMAGENET_MEAN, IMAGENET_STD
from finetune.data.decode import Preprocessing, decode
from finetune.data.images import open_images
from finetune.data.pictures import find_pictures
from finetune.model.network import normalise
from finetune.system.array_store import Cache

EPOCHS = {"freeze": 2, "partial": 2, "gradual": 10, "scratch": 1}


@dataclass(frozen=True)
class Scale:
    """How much is measured. Sizes are (training pictures, validation pictures)."""

    small: tuple[int, int] = (160, 32)
    large: tuple[int, int] = (2000, 400)
    sweep: tuple[int, int] = (120, 40)
    gradual_epochs: int = 10
    alternations: int = 5
    num_trials: int = 8


QUICK = Scale((32, 32), (320, 64), (40, 20), 4, 1, 3)


def compare_strategy(strategy: str, bench: Bench, scale: Scale) -> dict[str, Any]:
    """Alternating runs of both pipelines with filled caches; peak memory from a run before."""
    sizes = scale.large if strategy == "freeze" else scale.small
    epochs = scale.gradual_epochs if strategy == "gradual" else EPOCHS[strategy]
    data_dir, plain_dir = bench.pictures(*sizes), bench.pictures(*scale.small)
    our_bytes = peak_bytes(bench.ours, strategy, data_dir, epochs)
    plain_bytes = peak_bytes(bench.plain, strategy, plain_dir, 1)
    pairs = []
    for _ in range(scale.alternations):
        theirs = bench.plain(strategy, plain_dir, epochs)
        ours = bench.ours(strategy, data_dir, epochs).images_per_second
        pairs.append((ours, theirs))
        print(f"  {strategy}: {ours:.1f}, plain {theirs:.1f} images/s", flush=True)
    figures: dict[str, Any] = {
        "pictures": sizes,
        "plain_pictures": scale.small,
        "epochs": epochs,
        "ours_images_per_second": statistics.median(ours for ours, _ in pairs),
        "plain_images_per_second": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
        "ratios": [ours / theirs for ours, theirs in pairs],
        "raw_loop_images_per_second": bench.raw(strategy, 6) if strategy != "freeze" else None,
        "ours_peak_bytes": our_bytes,
        "plain_peak_bytes": plain_bytes,
    }
    if strategy == "freeze":
        figures["first_run"] = first_freeze_run(bench, sizes, figures["plain_images_per_second"])
    return figures


def first_freeze_run(bench: Bench, sizes: tuple[int, int], plain_rate: float) -> dict[str, Any]:
    """Ten epochs with empty caches; the plain pipeline's time is computed from its rate."""
    started = time.perf_counter()
    result = bench.ours("freeze", bench.pictures(*sizes), 10, cache="cold")
    seconds = time.perf_counter() - started
    plain_seconds = 10 * sum(sizes) / plain_rate
    return {
        "seconds": seconds,
        "cache_seconds": result.cache_seconds,
        "plain_seconds_at_its_rate": plain_seconds,
        "ratio": plain_seconds / seconds,
    }


def image_store(bench: Bench, scale: Scale) -> dict[str, float]:
    """Building the store of decoded pictures, batches from it, and PSNR to Pillow's pictures."""
    pictures = find_pictures(bench.pictures(*scale.large) / "train")
    cache = Cache(bench.folder / "store", 1e11)
    started = time.perf_counter()
    images, _ = open_images(pictures, Preprocessing(bench.image_size), False, cache)
    build_seconds = time.perf_counter() - started
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)

    def images_per_second(use: Callable[[torch.Tensor], Any], num_batches: int = 60) -> float:
        started = time.perf_counter()
        for _ in range(num_batches):
            use(images.batch(rng.integers(0, len(pictures), 32)))
        return 32 * num_batches / (time.perf_counter() - started)

    gathered = images_per_second(lambda batch: None)
    normalised = images_per_second(
        lambda batch: normalise(
            batch,
            torch.from_numpy(rng.permutation(32) < 16),
            IMAGENET_MEAN,
            IMAGENET_STD,
        )
    )
    torch.set_num_threads(num_threads)
    resize = v2.Resize((bench.image_size, bench.image_size))
    errors = []
    for i in range(min(40, len(pictures))):
        theirs = np.asarray(resize(Image.open(pictures.path(i)).convert("RGB")), dtype=float)
        ours = decode(pictures.path(i), Preprocessing(bench.image_size)).image.numpy().astype(float)
        errors.append(((ours - theirs) ** 2).mean())
    return {
        "build_images_per_second_per_core": len(pictures) / build_seconds / (os.cpu_count() or 1),
        "batches_images_per_second_one_thread": gathered,
        "flipped_and_normalised_one_thread": normalised,
        "psnr_db": float(10 * np.log10(255**2 / np.mean(errors))),
    }


def memory_by_size(bench: Bench, scale: Scale) -> dict[str, float]:
    """Peak memory of a freeze run at 64 pixels, on 2,000 pictures and on 20,000."""
    small_images = Bench(bench.folder / "memory", 64)
    peaks = [
        peak_bytes(small_images.ours, "freeze", small_images.pictures(count, 200, (64, 64)), 2)
        for count in (2000, 20_000)
    ]
    return {
        "small_peak_bytes": peaks[0],
        "large_peak_bytes": peaks[1],
        "ratio": peaks[1] / peaks[0],
    }


def measure_sweep(bench: Bench, scale: Scale) -> dict[str, Any]:
    data_dir = bench.pictures(*scale.sweep)
    return complete_sweep(bench.folder / "sweeps", bench.weights, data_dir, bench.image_size)


def measure_heads(bench: Bench, scale: Scale) -> dict[str, Any]:
    data_dir = bench.pictures(*scale.large, (64, 64))
    folder = bench.folder / "heads"
    return heads_together(folder, bench.weights, data_dir, 64, scale.alternations)


def networks(bench: Bench, scale: Scale) -> dict[str, Any]:
    """Other networks at 128 pixels, two epochs, beside the plain pipeline; images per second."""
    figures: dict[str, Any] = {}
    for model in ("resnet50", "efficientnet_b0"):
        other = Bench(bench.folder / model, 128, model)
        data_dir = other.pictures(*scale.small, (400, 300))
        for strategy in ("freeze", "partial"):
            other.ours(strategy, data_dir, 2)  # fills the caches
            pairs = [
                (
                    other.ours(strategy, data_dir, 2).images_per_second,
                    other.plain(strategy, data_dir, 2),
                )
                for _ in range(scale.alternations)
            ]
            ratios = [ours / theirs for ours, theirs in pairs]
            ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            row = {"ours": ours, "plain": theirs, "ratio": statistics.median(ratios)}
            figures[f"{model} {strategy}"] = row | {"ratios": ratios}
            print(f"  {model} {strategy}: {row}", flush=True)
    return figures


SECTIONS: dict[str, Callable[[Bench, Scale], dict[str, Any]]] = {
    "store": image_store,
    **{strategy: partial(compare_strategy, strategy) for strategy in EPOCHS},
    "commands": lambda bench, scale: commands(bench.folder / "commands", scale.alternations),
    "overhead": lambda bench, scale: sweep_overhead(bench.folder / "trials", scale.num_trials),
    "heads": measure_heads,
    "memory": memory_by_size,
    "networks": networks,
    "sweep": measure_sweep,
}
IN_QUICK = ("store", *EPOCHS)


def strategies_table(figures: dict[str, Any]) -> Table:
    """One row per strategy: images per second with filled caches, and peak memory."""
    table = Table(box=None, pad_edge=False)
    for head in ("strategy", "images/s", "plain", "ratio", "raw loop", "peak MB", "plain MB"):
        table.add_column(head, justify="left" if head == "strategy" else "right")
    for strategy in (name for name in EPOCHS if name in figures):
        found = figures[strategy]
        raw = found["raw_loop_images_per_second"]
        table.add_row(
            strategy,
            f"{found['ours_images_per_second']:.1f}",
            f"{found['plain_images_per_second']:.1f}",
            f"{found['ratio']:.2f} ({min(found['ratios']):.2f} to {max(found['ratios']):.2f})",
            "-" if raw is None else f"{raw:.1f}",
            f"{found['ours_peak_bytes'] / 1e6:.0f}",
            f"{found['plain_peak_bytes'] / 1e6:.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about two minutes, rough figures")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="only these sections")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/latest.json"))
    given = parser.parse_args()
    os.environ["WANDB_MODE"] = "disabled"
    sections = given.only or (IN_QUICK if given.quick else SECTIONS)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), 256)
        for name in sections:
            print(f"{name} ...", flush=True)
            figures[name] = SECTIONS[name](bench, QUICK if given.quick else Scale())
            print(f"{name}: {json.dumps(figures[name])}", flush=True)
    if EPOCHS.keys() & figures.keys():
        Console().print(strategies_table(figures))
    if "commands" in figures:
        Console().print(commands_table(figures["commands"]))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
