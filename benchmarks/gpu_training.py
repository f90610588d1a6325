"""Checks of `gpu_check` that train in its own process, and what all checks share."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from finetune.config.backbones import IMAGENET_MEAN, IMAGENET_STD
from finetune.config.fields import RunConfig
from finetune.datasets.digits import write_digits
from finetune.features.loader import EpochLoader
from finetune.model.network import build, build_from, normalise
from finetune.runs.resolve import resolve
from finetune.system.cuda import synchronise
from finetune.training.module import FineTuning
from finetune.training.train import make_trainer

STRATEGIES = ("freeze", "partial", "gradual", "scratch")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class Skipped(Exception):
    """A check that this machine can't make, with the reason."""


class Failed(Exception):
    """A check whose result is wrong."""


def require(is_right: bool, words: str) -> None:
    if not is_right:
        raise Failed(words)


@dataclass
class Setup:
    """Where and on what the checks compute."""

    place: Path
    device: str
    """cuda or cpu."""
    data_dir: Path = field(init=False)
    weights: Path = field(init=False)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.data_dir, self.weights = self.place / "digits", self.place / "resnet18.pth"
        write_digits(self.data_dir, range(5, 10), train_per_class=10, val_per_class=6)
        torch.save(build("resnet18", 1000, 64, seed=7).network.state_dict(), self.weights)

    def fields(self, **given: Any) -> dict[str, Any]:
        """The fields of a run of a few seconds."""
        return {
            "data_dir": self.data_dir,
            "weights": self.weights,
            "val_fraction": 0,
            "image_size": 64,
            "batch_size": 10,
            "epochs": 2,
            "patience": 0,
            "out": self.place / "runs",
            "cache_dir": self.place / "cache",
            "accelerator": self.device,
            **given,
        }

    def new_folder(self) -> Path:
        return self.place / f"place{next(self._numbers)}"

    @property
    def is_late(self) -> bool:
        """Whether another long part would take more than ten minutes in all."""
        return time.monotonic() - self._started > 9 * 60

    def require_cuda(self) -> None:
        if self.device != "cuda":
            raise Skipped("needs CUDA")


class Watcher(pl.Callback):
    """Keeps each epoch's row and speed, and acts at steps."""

    def __init__(self, overflows: bool = False, on_epoch: Callable[[], Any] = lambda: None) -> None:
        self.rows: list[dict[str, float]] = []
        self.noted: list[Any] = []
        self.num_unsynchronised = 0
        self.steps_per_second: list[float] = []
        self._started = 0.0
        self._overflows, self._on_epoch = overflows, on_epoch
        self.forbids_synchronisation = False

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._overflows:
            self._overflows = False
            trained = [p for p in pl_module.parameters() if p.grad is not None]
            trained[-1].grad.fill_(math.inf)  # type: ignore[union-attr]

    def on_train_batch_start(self, *given: Any) -> None:
        if self.forbids_synchronisation and given[-1] >= 4:  # the first steps allocate
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *given: Any) -> None:
        if self.forbids_synchronisation:
            torch.cuda.set_sync_debug_mode("default")
            self.num_unsynchronised += given[-1] >= 4

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronise(pl_module.device)
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronise(pl_module.device)
        seconds = time.perf_counter() - self._started
        self.steps_per_second.append(trainer.num_training_batches / seconds)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, FineTuning)
        self.rows.append(dict(pl_module.epoch_metrics()))
        self.noted.append(self._on_epoch())


def fit(fields: dict[str, Any], watcher: Watcher | None = None) -> tuple[Watcher, FineTuning]:
    """Train without a run directory, and without printing."""
    watcher = watcher or Watcher()
    with contextlib.redirect_stdout(io.StringIO()):
        config, splits, cache = resolve(RunConfig.from_fields(fields))
        chain, _ = build_from(config, len(splits.class_names), print)
        module = FineTuning(chain, config, EpochLoader(config, splits, cache))
        trainer = make_trainer(config, Path.cwd(), watcher, max_epochs=config.epochs)
        trainer.fit(module)
    return watcher, module


@contextmanager
def exact() -> Iterator[None]:
    """Without TF32, and with cuDNN's deterministic algorithms."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = False, False, True
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = before


def losses(watcher: Watcher) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([[row["train_loss"], row["val_loss"]] for row in watcher.rows])


def optimizer_under_overflow(setup: Setup) -> str:
    """2: an infinite gradient at a part's first step changes no weight beyond training's own."""
    setup.require_cuda()
    given = {"precision": "16-mixed", "epochs": 3, "data_aug": "n", "learning_rate": 0.01}
    largest = 0.0
    for strategy in ("partial", "gradual"):
        junk = [torch.full((2**24,), 1e20, device=setup.device) for _ in range(8)]
        del junk  # the allocator hands this memory out again
        overflown, module = fit(setup.fields(strategy=strategy, **given), Watcher(overflows=True))
        _, plain = fit(setup.fields(strategy=strategy, **given))
        for key, value in module.network.state_dict().items():
            require(bool(torch.isfinite(value).all()), f"{strategy}: {key} is not finite")
            limit = 2 * plain.network.state_dict()[key].abs().max() + 1
            require(bool(value.abs().max() <= limit), f"{strategy}: {key} has {value.abs().max()}")
            largest = max(largest, float(value.abs().max()))
        require(len(overflown.rows) == 3, "an epoch is missing")
    return f"largest weight {largest:.3g}"


def normalise_and_flip(setup: Setup) -> str:
    """3: device against CPU, within 2 units in the last place of 1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 256, 256, 3), generator=generator).byte()
    flips = torch.rand(64, generator=generator) < 0.5
    ours = normalise(images.to(setup.device), flips.to(setup.device), IMAGENET_MEAN, IMAGENET_STD)
    expected = normalise(images, flips, IMAGENET_MEAN, IMAGENET_STD)
    allowed = 2 * torch.finfo(torch.float32).eps * expected.abs().clamp(min=1)
    difference = (ours.cpu() - expected).abs()
    require(bool((difference <= allowed).all()), f"they differ by {difference.max():.3g}")
    return f"largest difference {difference.max():.2g}"


def strategies_and_caches(setup: Setup) -> dict[str, float]:
    """4: all strategies and precisions are finite, and equal with and without the caches."""
    precisions = PRECISIONS if setup.device == "cuda" else PRECISIONS[:2]
    found: dict[str, float] = {}
    with exact():
        for strategy, precision in itertools.product(STRATEGIES, precisions):
            fields = setup.fields(strategy=strategy, precision=precision, epochs=3)
            runs = [
                losses(fit(fields | {"cache": cache}, Watcher(precision == "16-mixed"))[0])
                for cache in ("auto", "off")
            ]
            what = f"{strategy} {precision}"
            require(bool(np.isfinite(runs).all()), f"{what}: a loss is not finite")
            found[what] = float(np.abs(runs[0] - runs[1]).max())
    for what, difference in found.items():
        allowed = 1e-5 if what.endswith("32-true") else 1e-2
        require(difference <= allowed, f"{what}: with and without caches {difference:.2g}; {found}")
    return found


def equal_to_cpu(setup: Setup) -> dict[str, float]:
    """5: in 32-true without TF32 the first epoch's losses are the CPU's, within 1e-3."""
    setup.require_cuda()
    found = {}
    with exact():
        for strategy in STRATEGIES:
            fields = setup.fields(strategy=strategy, precision="32-true", epochs=1)
            rows = [losses(fit(fields | {"accelerator": a})[0]) for a in (setup.device, "cpu")]
            found[strategy] = float(np.abs(rows[0] - rows[1]).max())
    for strategy, difference in found.items():
        require(difference <= 1e-3, f"{strategy} differs by {difference:.2g}; {found}")
    return found


def no_synchronisation(setup: Setup) -> str:
    """7: the host never waits for the device in a step after the first ones."""
    setup.require_cuda()
    for data_aug, precision in itertools.product(("y", "strong"), PRECISIONS):
        watcher = Watcher()
        watcher.forbids_synchronisation = True
        given = {"data_aug": data_aug, "precision": precision, "class_weights": "balanced"}
        try:
            fit(setup.fields(batch_size=2, epochs=1, label_smoothing=0.1, **given), watcher)
        except RuntimeError as error:
            torch.cuda.set_sync_debug_mode("default")
            raise Failed(
                f"{data_aug} {precision}, step {watcher.num_unsynchronised}: {error}"
            ) from error
        require(watcher.num_unsynchronised >= 20, f"only {watcher.num_unsynchronised} steps")
    return "20 steps each of y and strong in three precisions"


def constant_memory(setup: Setup) -> str:
    """10: the same memory is in use after epochs 5 and 30."""
    setup.require_cuda()
    watcher = Watcher(on_epoch=torch.cuda.memory_allocated)
    fit(setup.fields(strategy="scratch", epochs=31), watcher)
    early, late = watcher.noted[5], watcher.noted[30]
    require(abs(late - early) < 2**16, f"{early} bytes after epoch 5, {late} after epoch 30")
    return f"{late / 1e6:.1f} MB"
