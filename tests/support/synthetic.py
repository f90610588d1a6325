"""Run directories made without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config.fields import RunConfig
from finetune.config.strategies import Plan, plan
from finetune.runs.predictions import confusion_counts, macro_f1
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir, read_metrics

CLASSES = ("Amphibia", "Aves", "Fungi", "Insecta", "Mammalia")
_HARDNESS = np.random.default_rng(99).standard_normal(10_000)


def write_run(
    runs_dir: Path,
    run_id: str,
    accuracy: float = 0.8,
    *,
    classes: Sequence[str] = CLASSES,
    num_val: int = 500,
    best_epoch: int = 6,
    train_acc: float = 0.97,
    pictures: Sequence[Path] = (),
    fingerprints: tuple[str, str, str] = ("data-0", "split-0", "weights-0"),
    parts: Sequence[str] = (),
    **fields: Any,
) -> Path:
    """A finished run whose pictures are right with about this probability, the hard ones less.

    `parts` are those of a network that isn't known here.
    """
    config = RunConfig.from_fields({"weights": "imagenet", "val_fraction": 0.2, "out": runs_dir} | fields)  # noqa: E501  # fmt: skip
    chance = np.random.default_rng(list(f"{run_id} {config.seed}".encode()))
    run_dir = RunDir(runs_dir / run_id)
    run_dir.path.mkdir(parents=True)
    labels = np.arange(num_val) % len(classes)
    noise = 0.8 * _HARDNESS[:num_val] + 0.6 * chance.standard_normal(num_val)
    correct = noise < np.quantile(noise, accuracy)
    logits = chance.normal(0, 1, (num_val, len(classes))).astype(np.float32)
    guesses = np.where(correct, labels, (labels + 1 + chance.integers(0, len(classes) - 1, num_val)) % len(classes))  # noqa: E501  # fmt: skip
    logits[np.arange(num_val), guesses] = logits.max(axis=1) + chance.exponential(2, num_val)
    found = float((logits.argmax(axis=1) == labels).mean())
    paths = [str(pictures[i % len(pictures)]) if pictures else f"/data/train/{classes[label]}/{i:05}.jpg" for i, label in enumerate(labels)]  # noqa: E501  # fmt: skip
    np.savez(run_dir.predictions_path, logits=logits, labels=labels, paths=np.array(paths))
    unfreezing = _plan(config, parts)
    best_epoch = min(best_epoch, config.num_epochs - 1)
    rows = _rows(config, unfreezing, found, best_epoch, train_acc)
    run_dir.write_config(config)
    run_dir.write_metrics(rows)
    run_dir.write_result(
        RunResult(
            run_id=run_id,
            strategy=config.strategy,
            seed=config.seed,
            best_val_acc=found,
            best_val_loss=rows[best_epoch]["val_loss"],
            best_val_macro_f1=macro_f1(
                confusion_counts(labels, logits.argmax(axis=1), len(classes))
            ),
            best_epoch=best_epoch,
            last_val_acc=rows[-1]["val_acc"],
            epochs_run=len(rows),
            stopped_early=len(rows) < config.num_epochs,
            num_threads=2,
            train_seconds=float(60 * len(rows) * chance.uniform(0.9, 1.1)),
            cache_seconds=3.0,
            images_per_second=210.0,
            trainable_parameters=int(rows[-1]["trainable_parameters"]),
            start_epochs=dict(unfreezing.start_epochs),
            class_names=list(classes),
            num_train=4 * num_val,
            num_val=num_val,
            unreadable=[],
            dataset_fingerprint=fingerprints[0],
            split_fingerprint=fingerprints[1],
            weights_fingerprint=fingerprints[2] if config.weights else None,
            versions={"python": "3.11.7", "torch": "2.14.1"},
            git_commit="0123456789abcdef",
            prefix_timings={},
            config=config.to_fields(),
        )
    )
    return run_dir.path


def write_predictions(
    run_dir: Path, counts: Mapping[tuple[int, int], int], num_classes: int, picture: str = "a.png"
) -> None:
    """Replace a run's predictions by as many as given for each label and prediction."""
    pairs = np.array([pair for pair, count in counts.items() for _ in range(count)])
    logits = np.eye(num_classes, dtype=np.float32)[pairs[:, 1]]
    paths = np.array([picture] * len(pairs))
    np.savez(RunDir(run_dir).predictions_path, logits=logits, labels=pairs[:, 0], paths=paths)


def _plan(config: RunConfig, parts: Sequence[str] = ()) -> Plan:
    """The config's plan; with `parts`, the network is not asked."""
    if not parts:
        return config.plan
    timing = config.unfreeze_from, config.unfreeze_every, config.lr_decay
    return plan(config.strategy, parts, *timing)


def _rows(
    config: RunConfig, unfreezing: Plan, accuracy: float, best_epoch: int, train_acc: float
) -> list[dict[str, float]]:
    rows = []
    for epoch in range(config.num_epochs):
        share = (epoch + 1) / config.num_epochs
        val_acc = accuracy - 0.02 * abs(epoch - best_epoch)
        open_parts = unfreezing.trainable_parts(epoch)
        rate = config.learning_rate or 0.0
        rates = {part: rate * (part in open_parts) for part in unfreezing.parts}
        rows.append(
            {
                "epoch": epoch,
                "train_loss": 1.6 * (1 - share) + 0.05,
                "train_acc": train_acc * (0.5 + 0.5 * share),
                "val_loss": 1.2 - 0.8 * val_acc,
                "val_acc": val_acc,
                "val_macro_f1": val_acc - 0.01,
                "best_val_acc": max([val_acc, *(row["val_acc"] for row in rows)]),
                "trainable_parameters": 2_500_000 * len(open_parts),
                "images_per_second": 210.0,
                **{f"lr/{part}": rate for part, rate in rates.items()},
            }
        )
    return rows


def write_failure(runs_dir: Path, run_id: str, state: str, reason: str, **fields: Any) -> Path:
    """A run that failed in its second epoch."""
    config = RunConfig.from_fields({"val_fraction": 0.2, "out": runs_dir} | fields)
    run_dir = RunDir(runs_dir / run_id)
    run_dir.path.mkdir(parents=True)
    run_dir.write_config(config)
    run_dir.write_metrics(_rows(config, _plan(config), 0.4, 0, 0.5)[:1])
    run_dir.write_failure(state, reason, 1)
    return run_dir.path


def write_pruned(runs_dir: Path, run_id: str, accuracy: float = 0.8, **fields: Any) -> Path:
    """A run that early termination ended after seven epochs, the best of which was the last."""
    run_dir = RunDir(write_run(runs_dir, run_id, accuracy, **fields))
    run_dir.write_metrics([dict(row) for row in read_metrics(run_dir.metrics_path)[:7]])
    run_dir.result_path.unlink()
    run_dir.write_failure("pruned", "best_val_acc is not among the best half", 7)
    return run_dir.path


ACCURACY = {"freeze": 0.74, "partial": 0.84, "gradual": 0.83, "scratch": 0.42}


def write_sweep(runs_dir: Path, **changed: Any) -> None:
    """A grid over strategies, learning rates, batch sizes and augmentation, with some failures."""
    for strategy, accuracy in ACCURACY.items():
        for i, rate in enumerate((0.001, 0.01, 0.1)):
            for batch_size in (32, 64):
                for data_aug in ("y", "n"):
                    run_id = f"{strategy[:3]}{i}{batch_size}{data_aug}"
                    fields = {
                        "strategy": strategy,
                        "learning_rate": rate,
                        "batch_size": batch_size,
                        "data_aug": data_aug,
                    }
                    if rate == 0.1 and strategy == "partial":
                        reason = "diverged in epoch 1 at learning_rate 0.1: train_loss is nan"
                        write_failure(runs_dir, run_id, "failed", reason, **fields)
                        continue
                    loss = 0.04 * abs(i - 1) + 0.01 * (data_aug == "n") + 0.005 * (batch_size == 64)
                    train_acc = 0.8 if strategy == "scratch" else 0.97
                    write_run(
                        runs_dir, run_id, accuracy - loss, train_acc=train_acc, **fields, **changed
                    )
    write_failure(runs_dir, "pruned01", "pruned", "below the median at epoch 1", strategy="scratch")
    write_failure(runs_dir, "stopped1", "stopped", "stopped by SIGTERM", strategy="gradual")


def write_confirmed(
    runs_dir: Path,
    accuracies: dict[str, float],
    num_seeds: int = 5,
    spread: float = 0.004,
    **changed: Any,
) -> None:
    """Fresh seeds of one setting per strategy."""
    chance = np.random.default_rng(7)
    for strategy, accuracy in accuracies.items():
        for seed in range(1000, 1000 + num_seeds):
            reached = accuracy + spread * chance.standard_normal()
            write_run(runs_dir, f"{strategy}-{seed}", reached, strategy=strategy, seed=seed, learning_rate=0.01, **changed)  # noqa: E501  # fmt: skip


NETWORKS = {"resnet18": 0.0, "resnet50": 0.05}


def write_networks(
    runs_dir: Path, networks: Mapping[str, float] = NETWORKS, num_seeds: int = 5, **changed: Any
) -> None:
    """A grid over networks, strategies and learning rates, and fresh seeds of the best settings.

    `networks` gives what a network adds to an accuracy.
    """
    for model, more in networks.items():
        for strategy, accuracy in ACCURACY.items():
            fields = {"model": model, "strategy": strategy, **changed}
            fields |= {"fingerprints": ("data-0", "split-0", f"{model}'s weights")}
            begin = f"{model}-{strategy}"
            for rate, loss in ((0.01, 0.0), (0.001, 0.03)):
                write_run(runs_dir, f"{begin}-{rate}", accuracy + more - loss, learning_rate=rate, **fields)  # noqa: E501  # fmt: skip
            chance = np.random.default_rng(list(begin.encode()))
            for seed in range(1000, 1000 + num_seeds):
                reached = accuracy + more + 0.004 * chance.standard_normal()
                write_run(runs_dir / "confirm", f"{begin}-{seed}", reached, learning_rate=0.01, seed=seed, group="confirm", **fields)  # noqa: E501  # fmt: skip


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
