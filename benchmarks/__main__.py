"""This project beside the plain way, alternating, and what limits both.

Turns made-up 800x600 JPEGs into images a second, seconds to the result, peak memory and ratios, as
a table and as JSON.

    python -m benchmarks [--quick] [--only freeze sweep]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.transforms import v2

from benchmarks.memory import peak_bytes
from benchmarks.ways import Bench
from benchmarks.whole_sweep import whole_sweep
from finetune.data.decode import decode
from finetune.data.images import open_images
from finetune.data.pictures import find_pictures
from finetune.model.network import normalise
from finetune.system.array_store import Cache


def compare_strategy(
    bench: Bench, strategy: str, sizes: tuple[int, int], plain_sizes: tuple[int, int], epochs: int,
    alternations: int,
) -> dict[str, Any]:  # fmt: skip
    """Alternating runs of both, caches filled before the first, which tells the memory."""
    data_dir, plain_dir = bench.pictures(*sizes), bench.pictures(*plain_sizes)
    our_bytes = peak_bytes(bench.ours, strategy, data_dir, epochs)
    plain_bytes = peak_bytes(bench.plain, strategy, plain_dir, 1)
    pairs = []
    for _ in range(alternations):
        theirs = bench.plain(strategy, plain_dir, epochs)
        ours = bench.ours(strategy, data_dir, epochs).images_per_second
        pairs.append((ours, theirs))
        print(f"  {strategy}: {ours:.1f} against {theirs:.1f} images/s", flush=True)
    return {
        "pictures": sizes,
        "plain_pictures": plain_sizes,
        "epochs": epochs,
        "ours_images_per_second": statistics.median(ours for ours, _ in pairs),
        "plain_images_per_second": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
        "ratios": [ours / theirs for ours, theirs in pairs],
        "raw_loop_images_per_second": bench.raw(strategy, 6) if strategy != "freeze" else None,
        "ours_peak_bytes": our_bytes,
        "plain_peak_bytes": plain_bytes,
    }


def first_freeze_run(bench: Bench, sizes: tuple[int, int], plain_rate: float) -> dict[str, Any]:
    """Ten epochs from nothing, caches included, against the plain way's time at its rate."""
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


def store_figures(bench: Bench, sizes: tuple[int, int]) -> dict[str, float]:
    """Building the decoded store, batches from it on one thread, and likeness to PIL's pictures."""
    pictures = find_pictures(bench.pictures(*sizes) / "train")
    cache = Cache(bench.place / "store", 1e11)
    started = time.perf_counter()
    images, _ = open_images(pictures, bench.image_size, False, cache)
    build_seconds = time.perf_counter() - started
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    started, num_batches = time.perf_counter(), 60
    for _ in range(num_batches):
        images.batch(rng.integers(0, len(pictures), 32))
    gather = 32 * num_batches / (time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(num_batches):
        batch = images.batch(rng.integers(0, len(pictures), 32))
        normalise(batch, torch.from_numpy(rng.choice(32, 16, replace=False)))
    whole = 32 * num_batches / (time.perf_counter() - started)
    torch.set_num_threads(num_threads)
    resize = v2.Resize((bench.image_size, bench.image_size))
    errors = []
    for i in range(min(40, len(pictures))):
        theirs = np.asarray(resize(Image.open(pictures.path(i)).convert("RGB")), dtype=float)
        ours = decode(pictures.path(i), bench.image_size).numpy().astype(float)
        errors.append(((ours - theirs) ** 2).mean())
    return {
        "build_images_per_second_per_core": len(pictures) / build_seconds / (os.cpu_count() or 1),
        "batches_images_per_second_one_thread": gather,
        "flipped_and_normalised_one_thread": whole,
        "psnr_db": float(10 * np.log10(255**2 / np.mean(errors))),
    }


def memory_by_size(place: Path, small: int, large: int) -> dict[str, float]:
    """Peak memory of a freeze run at 64 pixels, on few pictures and on many."""
    bench = Bench(place, 64)
    peaks = [
        peak_bytes(bench.ours, "freeze", bench.pictures(count, 200, (64, 64)), 2)
        for count in (small, large)
    ]
    return {
        "small_peak_bytes": peaks[0],
        "large_peak_bytes": peaks[1],
        "ratio": peaks[1] / peaks[0],
    }


SECTIONS = ("store", "freeze", "partial", "gradual", "scratch", "memory", "sweep")
EPOCHS = {"freeze": 2, "partial": 2, "gradual": 10, "scratch": 1}


def measure(
    bench: Bench, sections: Sequence[str], alternations: int, quick: bool
) -> dict[str, Any]:
    """The figures of each section, printed as they come."""
    small, large = ((32, 32), (320, 64)) if quick else ((160, 32), (2000, 400))
    figures: dict[str, Any] = {}

    def show(name: str, values: dict[str, Any]) -> None:
        figures[name] = values
        print(f"{name}: {json.dumps(values)}", flush=True)

    for name in sections:
        print(f"{name} ...", flush=True)
        if name == "store":
            show(name, store_figures(bench, large))
        elif name == "memory":
            show(name, memory_by_size(bench.place / "memory", 2000, 20_000))
        elif name == "sweep":
            data_dir = bench.pictures(*((40, 20) if quick else (120, 40)))
            show(
                name, whole_sweep(bench.place / "sweeps", bench.weights, data_dir, bench.image_size)
            )
        else:
            sizes = large if name == "freeze" else small
            epochs = 4 if quick and name == "gradual" else EPOCHS[name]
            show(name, compare_strategy(bench, name, sizes, small, epochs, alternations))
        if name == "freeze":
            rate = figures[name]["plain_images_per_second"]
            show("first_freeze_run", first_freeze_run(bench, large, rate))
    return figures


def strategies_table(figures: dict[str, Any]) -> Table:
    """What was measured of each strategy, epochs with the caches there."""
    table = Table(box=None, pad_edge=False)
    for head in ("strategy", "images/s", "plain", "times", "raw loop", "peak MB", "plain MB"):
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
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/latest.json"))
    given = parser.parse_args()
    os.environ["WANDB_MODE"] = "disabled"
    alternations = 1 if given.quick else given.alternations
    sections = given.only or (SECTIONS[:-2] if given.quick else SECTIONS)
    with tempfile.TemporaryDirectory() as place:
        figures = measure(Bench(Path(place), 256), sections, alternations, given.quick)
    if EPOCHS.keys() & figures.keys():
        Console().print(strategies_table(figures))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
