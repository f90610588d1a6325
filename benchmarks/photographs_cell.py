"""One strategy on so many photographs a class: search, confirmation with fresh seeds, test.

All training, choosing and testing is the product's: `sweep`, `confirm`, `evaluate`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

import finetune
from finetune.analysis.intervals import accuracy_interval
from finetune.analysis.statistics import Correct
from finetune.config.backbones import find_backbone
from finetune.data.pictures import find_pictures
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.runs.settings import best_setting, results_by_setting
from finetune.sweep.runner import run_sweep

NUM_SEEDS = 5
NUM_STEPS = 80
"""A run has at least about so many steps, within `EPOCHS`."""
EPOCHS = (3, 40)
"""The fewest and the most epochs of a run, before an approach's factor."""
MAX_EXTENSIONS = 2
"""How often a range of learning rates is extended because the best one is at its end."""
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""The learning rates that may be searched; an approach begins with some neighbours of them."""


@dataclass(frozen=True)
class Approach:
    """A strategy as it is measured."""

    strategy: str
    rates: tuple[float, ...] = ()
    """The learning rates with which the search begins; none for a strategy without."""
    depth: int | None = None
    """Parts below the head that train, -1: all; None: the strategy's default."""
    epochs_factor: int = 1

    def fields(self, model: str) -> dict[str, Any]:
        """The fields of a run that make this approach, without the learning rate."""
        if self.depth is None:
            return {"strategy": self.strategy}
        parts = find_backbone(model).part_names
        deepest = parts[0] if self.depth < 0 else parts[-1 - self.depth]
        return {"strategy": self.strategy, "unfreeze_from": deepest}


APPROACHES: Mapping[str, Approach] = {
    "probe": Approach("probe"),
    "freeze": Approach("freeze", (0.003, 0.01, 0.03, 0.1), epochs_factor=3),
    "partial": Approach("partial", (0.003, 0.01, 0.03)),
    "gradual": Approach("gradual", (0.003, 0.01, 0.03)),
    "lp-ft": Approach("lp-ft", (0.001, 0.003, 0.01), depth=2),
    "full": Approach("partial", (0.003, 0.01, 0.03), depth=-1),
    "scratch": Approach("scratch", (0.003, 0.01, 0.03), epochs_factor=2),
}
"""lp-ft trains what partial trains, so that they differ in the head's start alone."""


def draw(data_dir: Path, num_per_class: int | None, folder: Path) -> tuple[Path, int]:
    """A data set with so many readable training pictures of each class, and all of val/.

    Returns it with the number of training pictures. Each picture is a link. A larger draw contains
    a smaller one. None means all.
    """
    pictures = find_pictures(data_dir / "train")
    chosen: list[Path] = []
    for label, name in enumerate(pictures.class_names):
        paths = [p for p, of in zip(pictures.paths, pictures.labels, strict=True) if of == label]
        random.Random(name).shuffle(paths)
        readable = (path for path in paths if _is_readable(path))
        chosen += [p for p, _ in zip(readable, range(num_per_class or len(paths)), strict=False)]
    for path in chosen:
        link = folder / "train" / path.relative_to(pictures.folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path.absolute())
    if not (folder / "val").exists():
        (folder / "val").symlink_to((data_dir / "val").absolute(), target_is_directory=True)
    return folder, len(chosen)


def _is_readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except OSError:
        return False
    return True


def schedule(num_train: int) -> dict[str, int]:
    """Batch size and epochs for so many training pictures, of which a fifth validates."""
    trained = num_train * 4 // 5
    batch_size = 8 if trained <= 50 else 16 if trained <= 400 else 32
    least, most = EPOCHS
    epochs = math.ceil(NUM_STEPS / math.ceil(trained / batch_size))
    return {"batch_size": batch_size, "epochs": min(max(epochs, least), most)}


def measure(
    approach: Approach, num_train: int, fields: Mapping[str, Any], out: Path, workers: int
) -> dict[str, Any]:
    """The record of an approach: what was searched, chosen, confirmed and found on the test set.

    The run directories are in `out`. The same call resumes. `fields` are those of all runs.
    """
    training = schedule(num_train)
    training["epochs"] *= approach.epochs_factor
    fixed = {**fields, **training, "lr_schedule": "cosine"}
    fixed |= approach.fields(str(fields["model"]))
    times = [time.perf_counter()]
    searched = search(approach.rates, fixed, out, workers)
    times.append(time.perf_counter())
    trials = finetune.confirm(out, num_seeds=NUM_SEEDS, workers=workers)
    times.append(time.perf_counter())
    runs = sorted(trial.run_dir for trial in trials if trial.state == "finished")
    tested = test(runs)
    times.append(time.perf_counter())
    places = ("data_dir", "cache_dir", "weights")
    best = RunResult.load(_best_of(out)[0]).config
    return {
        "fields": {name: value for name, value in fixed.items() if name not in places},
        "learning_rates": [list(pair) for pair in searched],
        "learning_rate": best["learning_rate"],
        "unfreeze_from": best["unfreeze_from"],
        "at_the_edge": bool(searched)
        and best["learning_rate"] in (searched[0][0], searched[-1][0]),
        **confirmed(runs),
        **tested,
        "seconds": {
            name: end - start
            for name, (start, end) in zip(
                ("search", "confirm", "test"), pairwise(times), strict=True
            )
        },
    }


def confirmed(runs: Sequence[Path]) -> dict[str, Any]:
    """What the runs with fresh seeds found on their validation pictures."""
    results = [RunResult.load(run) for run in runs]
    accuracies = [result.best_val_acc for result in results]
    return {
        "num_train": results[0].num_train,
        "num_val": results[0].num_val,
        "seeds": [result.seed for result in results],
        "val_accuracies": accuracies,
        "val_accuracy": fmean(accuracies),
        "val_interval": accuracy_interval(np.stack([_val_correct(run) for run in runs])),
        "val_acc_by_epoch": val_acc_by_epoch(runs),
        "best_epochs": [result.best_epoch for result in results],
        "seconds_per_run": fmean(result.train_seconds for result in results),
        "images_per_second": fmean(result.images_per_second for result in results),
        "num_threads": results[0].num_threads,
        "git": results[0].git_commit,
    }


def search(
    rates: Sequence[float], fixed: Mapping[str, Any], out: Path, workers: int
) -> list[tuple[float, float]]:
    """Sweep the learning rates, and further ones while the best is at an end of their range.

    Returns each rate with its best validation accuracy, in order.
    """
    tried = sorted(rates)
    for number in range(MAX_EXTENSIONS + 1):
        new = {"learning_rate": {"values": list(rates)}} if rates else {}
        parameters = new | {"strategy": {"value": fixed["strategy"]}}
        given = {name: value for name, value in fixed.items() if name not in parameters}
        sweep = {"method": "grid", "parameters": parameters}
        run_sweep(
            sweep, name=f"search{number}", out=out, workers=workers, fields=given, keep_best=1
        )
        best = RunResult.load(_best_of(out)[0]).config["learning_rate"]
        if not rates or best not in (tried[0], tried[-1]):
            break
        beyond = RATES.index(best) + (1 if best == tried[-1] else -1)
        if number == MAX_EXTENSIONS or not 0 <= beyond < len(RATES):
            break
        rates = [RATES[beyond]]
        tried = sorted([*tried, *rates])
    found = [RunResult.load(path.parent) for path in out.glob("*/result.json")]
    return sorted((r.config["learning_rate"], r.best_val_acc) for r in found if rates)


def _best_of(out: Path) -> list[Path]:
    """The run directories of the best setting of the search, by the product's own rule."""
    results = {
        path.parent: RunResult.load(path.parent) for path in sorted(out.glob("*/result.json"))
    }
    settings = results_by_setting(results.values())
    best = {result.run_id for result in settings[best_setting(settings)]}
    return [run for run, result in results.items() if result.run_id in best]


def test(runs: Sequence[Path]) -> dict[str, Any]:
    """What `evaluate` finds on the test set, of each run once.

    A tested run's checkpoint is removed; its evaluation stays.
    """
    rows, scores = [], []
    for run in runs:
        saved = run / "test_correct.npy"
        if not saved.exists():
            record = finetune.evaluate(run)
            pictures = find_pictures(Path(record["folder"]))
            assert tuple(record["class_names"]) == pictures.class_names
            np.save(saved, np.array(record["predictions"]) == pictures.labels)
            RunDir(run).best_path.unlink()
        rows.append(np.load(saved))
        scores.append(RunDir(run).read_evaluations()[0]["macro_f1"])
    correct_RN = np.stack(rows)
    return {
        "num_test": correct_RN.shape[1],
        "test_accuracies": correct_RN.mean(axis=1).tolist(),
        "test_accuracy": float(correct_RN.mean()),
        "test_interval": accuracy_interval(correct_RN),
        "test_macro_f1": fmean(scores),
        "test_correct": [packed(row) for row in correct_RN],
    }


def val_acc_by_epoch(runs: Sequence[Path]) -> list[float]:
    """The mean over the runs, for each epoch that all of them have."""
    curves = [[row["val_acc"] for row in read_metrics(RunDir(run).metrics_path)] for run in runs]
    return [fmean(values) for values in zip(*curves, strict=False)]


def _val_correct(run: Path) -> Correct:
    logits, labels, _ = RunDir(run).read_predictions()
    correct: Correct = logits.argmax(axis=1) == labels
    return correct


def packed(correct_N: Correct) -> str:
    """The bits of a row, as text for JSON."""
    return np.packbits(correct_N).tobytes().hex()


def unpacked(text: str, count: int) -> Correct:
    """The inverse of `packed`."""
    bits = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return np.unpackbits(bits, count=count).astype(bool)
