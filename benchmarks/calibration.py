"""Whether the comparison's figures hold on real training: false alarms, coverage, the best of many.

A pool of runs on handwritten digits is trained once, by the product itself on cached features. Then
seeds and validation pictures are drawn from it many times, as an experiment draws them once; all
pictures and seeds of the pool together are the truth.

    python -m benchmarks.calibration --out DIR [--quick]

Legend: R runs, N pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.analysis.statistics import Correct, group_differences, selection_corrected
from finetune.datasets.digits import write_digits
from finetune.demo import COMMON, SOURCE, train_source
from finetune.runs.run_dir import RunDir

NUM_SEEDS = 5
SIZES = (50, 200)
PAIR: Sequence[dict[str, Any]] = ({"learning_rate": 0.01}, {"learning_rate": 0.003})
SEARCHED: dict[str, Sequence[float]] = {
    "learning_rate": (0.0003, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06),
    "label_smoothing": (0.0, 0.1, 0.2),
    "weight_decay": (0.0, 0.001),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="for data, runs and calibration.json"
    )
    parser.add_argument("--quick", action="store_true", help="a small pool and few draws")
    given = parser.parse_args()
    num_runs, num_searched, num_draws = (8, 1, 50) if given.quick else (60, 6, 2000)
    os.environ["WANDB_MODE"] = "disabled"
    pool = Pool(given.out)
    pair = [pool.rights(setting, num_runs) for setting in PAIR]
    grid = [dict(zip(SEARCHED, v, strict=True)) for v in itertools.product(*SEARCHED.values())]
    searched = [pool.rights(setting, num_searched) for setting in grid]
    rng = np.random.default_rng(0)
    figures: dict[str, Any] = {
        f"{size} pictures": {
            "two equal settings": compared(rng, [pair[0], pair[0]], size, num_draws),
            "two settings": compared(rng, pair, size, num_draws),
            f"best of {len(grid)}": best_of(rng, searched, size, num_draws // 10),
        }
        for size in SIZES
    }
    (given.out / "calibration.json").write_text(json.dumps(figures, indent=2))
    print(json.dumps(figures, indent=2))


class Pool:
    """Runs of the demo's task with many validation pictures, trained when they are needed."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.data_dir, self.weights = out / "target", out / "source.pth"
        write_digits(out / "source", range(5), train_per_class=140, val_per_class=10, num_colours=3)
        write_digits(self.data_dir, range(5, 10), train_per_class=5, num_colours=1)
        common = {"cache_dir": out / "cache", "seed": 42}
        if not self.weights.exists():
            places = {"data_dir": out / "source", "out": out / "source-run"}
            train_source(self.weights, SOURCE | common | places)

    def rights(self, setting: dict[str, Any], num_seeds: int) -> Correct:
        """Whether each seed's run of a setting classifies each picture correctly, (R, N)."""
        from finetune.training.train import train_and_finetune

        rows = []
        for seed in range(num_seeds):
            name = "-".join(str(value) for value in (*setting.values(), seed))
            saved = self.out / "pool" / f"{name}.npy"
            if not saved.exists():
                fields = {"strategy": "freeze", "epochs": 10, "batch_size": 5, "patience": 0}
                places = {"data_dir": self.data_dir, "weights": self.weights}
                places |= {"cache_dir": self.out / "cache", "out": self.out / "runs"}
                with contextlib.redirect_stdout(io.StringIO()):
                    model: Any = train_and_finetune(
                        **COMMON | fields | places | setting | {"seed": seed}
                    )
                run_dir = RunDir(self.out / "runs" / model.result.run_id)
                logits, labels, _ = run_dir.read_predictions()
                run_dir.best_path.unlink()
                saved.parent.mkdir(exist_ok=True)
                np.save(saved, logits.argmax(axis=1) == labels)
            rows.append(np.load(saved))
        return np.stack(rows)


def compared(
    rng: np.random.Generator, rights: Sequence[Correct], num_pictures: int, num_draws: int
) -> dict[str, float]:
    """Of two settings with five fresh seeds each: how often the difference is significant, and how
    often its interval has the difference over all seeds and pictures."""
    is_same = rights[0] is rights[1]
    truth = 0.0 if is_same else float(rights[0].mean() - rights[1].mean())
    significant = covered = 0
    for _ in range(num_draws):
        chosen = rng.choice(rights[0].shape[1], num_pictures, replace=False)
        first, second = (rng.permutation(len(right))[: 2 * NUM_SEEDS] for right in rights)
        seeds = first[:NUM_SEEDS], (first if is_same else second)[-NUM_SEEDS:]
        groups = {
            name: right[rows][:, chosen]
            for name, right, rows in zip("ab", rights, seeds, strict=True)
        }
        (found,) = group_differences(groups)
        significant += found.significant
        covered += found.low <= truth <= found.high
    return {
        "difference": truth,
        "significant": significant / num_draws,
        "coverage": covered / num_draws,
    }


def best_of(
    rng: np.random.Generator, rights: Sequence[Correct], num_pictures: int, num_draws: int
) -> dict[str, float]:
    """The best of many settings: its accuracy as found, as corrected, and on other pictures."""
    found, corrected, other = [], [], []
    for _ in range(num_draws):
        runs = np.stack([right[rng.integers(len(right))] for right in rights])
        order = rng.permutation(runs.shape[1])
        val, rest = runs[:, order[:num_pictures]], runs[:, order[num_pictures:]]
        best = int(val.mean(axis=1).argmax())
        found.append(float(val[best].mean()))
        corrected.append(selection_corrected(val).accuracy)
        other.append(float(rest[best].mean()))
    return {
        "accuracy found": float(np.mean(found)),
        "accuracy corrected": float(np.mean(corrected)),
        "accuracy on other pictures": float(np.mean(other)),
        "bias of the corrected": float(np.mean(corrected) - np.mean(other)),
        "standard error of the bias": float(
            np.std(np.array(corrected) - other, ddof=1) / len(other) ** 0.5
        ),
    }


if __name__ == "__main__":
    main()
