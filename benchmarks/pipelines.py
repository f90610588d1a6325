"""This project's pipeline, the plain one and a bare loop, on the same generated pictures.

A module of its own, because the child processes that measure memory import it by name.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from benchmarks import plain
from finetune.model.network import build, normalise
from finetune.runs.resolve import default_device
from finetune.system.cuda import synchronise
from finetune.training.train import train_and_finetune

NUM_CLASSES = 10
_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def make_pictures(folder: Path, num_train: int, num_val: int, size: tuple[int, int]) -> None:
    """Write JPEGs of this width and height: coarse shapes in a colour per class, and noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", num_train), ("val", num_val)):
        for i in range(count):
            label = i % NUM_CLASSES
            tint = 60 * np.array([label % 3, label // 3 % 3, label // 9])
            coarse = rng.integers(0, 128, (6, 8, 3)) + tint
            image = Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.BICUBIC)
            noisy = np.asarray(image, dtype=np.int16) + rng.integers(-12, 13, (size[1], size[0], 3))
            class_dir = folder / split / f"class{label}"
            class_dir.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
                class_dir / f"{i:05d}.jpg", quality=88
            )


def _silent(call: Callable[[], Any]) -> Any:
    """The call's value, without its printed lines."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        return call()


class Bench:
    """The pipelines on the same pictures, with one folder for all files."""

    def __init__(self, folder: Path, image_size: int, model: str = "resnet18") -> None:
        self.folder, self.image_size, self.model = folder, image_size, model
        self.accelerator, self.precision = default_device()
        folder.mkdir(exist_ok=True)
        self.weights = folder / f"{model}.pth"
        torch.save(build(model, 1000, image_size, seed=1).network.state_dict(), self.weights)

    def pictures(self, num_train: int, num_val: int, size: tuple[int, int] = (800, 600)) -> Path:
        folder = self.folder / f"pictures-{num_train}-{num_val}-{size[0]}x{size[1]}"
        if not folder.exists():
            make_pictures(folder, num_train, num_val, size)
        return folder

    def ours(self, strategy: str, data_dir: Path, epochs: int, cache: str = "cache") -> Any:
        """One run of this project; returns its RunResult."""
        model = _silent(
            lambda: train_and_finetune(
                model=self.model,
                strategy=strategy,
                epochs=epochs,
                data_dir=data_dir,
                weights=self.weights,
                image_size=self.image_size,
                val_fraction=0,
                patience=0,
                out=self.folder / "runs",
                cache_dir=self.folder / cache,
            )
        )
        return model.result

    def plain(self, strategy: str, data_dir: Path, epochs: int) -> float:
        """Images per second of the plain pipeline."""
        run = _silent(
            lambda: plain.train(
                self.model,
                data_dir,
                self.weights,
                strategy,
                epochs,
                self.image_size,
                accelerator=self.accelerator,
                precision=self.precision,
            )
        )
        return run.images_per_second

    def raw(self, strategy: str, num_steps: int) -> float:
        """Images per second of a bare training loop on the complete network, in channels_last."""
        chain = build(self.model, NUM_CLASSES, self.image_size, seed=0)
        device, dtype = torch.device(self.accelerator), _DTYPES.get(self.precision)
        model, backbone = chain.network.to(device), chain.backbone
        plain.open_parts(model, backbone.parts, plain.NUM_OPEN[strategy])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "16-mixed")
        images = torch.randint(0, 256, (32, self.image_size, self.image_size, 3)).byte().to(device)
        x = normalise(images, None, backbone.mean, backbone.std)
        y = torch.arange(32, device=device) % NUM_CLASSES
        started = 0.0
        num_warm = 1 if device.type == "cpu" else 20
        for step in range(num_steps + num_warm):
            if step == num_warm:
                synchronise(device)
                started = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        synchronise(device)
        return 32 * num_steps / (time.perf_counter() - started)
