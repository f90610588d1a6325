"""The plain pipeline: Lightning, ImageFolder and Pillow, as in tutorials, without `finetune`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from finetune.config.backbones import BACKBONES
from finetune.training.train import silence_lightning

NUM_OPEN = {"freeze": 1, "partial": 3, "gradual": 4, "scratch": 6}
"""How many of a network's parts train, counted from the head; gradual opens one per epoch."""


@dataclass
class PlainRun:
    """What is measured of a run."""

    images_per_second: float
    """Training and validation pictures over the wall time of the epochs."""
    seconds: float
    val_accuracies: list[float]


class Plain(pl.LightningModule):
    """Frozen parts have no gradients and are in eval mode; the rest is Lightning's default."""

    def __init__(
        self, model: str, strategy: str, weights: Path, num_classes: int, learning_rate: float
    ) -> None:
        super().__init__()
        self.strategy, self.learning_rate = strategy, learning_rate
        self.parts = BACKBONES[model].parts
        self.model = getattr(models, model)(num_classes=num_classes)
        if strategy != "scratch":
            (*_, head), state = self.parts.values(), torch.load(weights, weights_only=True)
            state = {k: v for k, v in state.items() if not k.startswith(f"{head}.")}
            self.model.load_state_dict(state, strict=False)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.epoch_seconds: list[float] = []
        self.val_accuracies: list[float] = []

    def on_train_epoch_start(self) -> None:
        self._started = time.perf_counter()
        num_open = NUM_OPEN[self.strategy]
        if self.strategy == "gradual":
            num_open = min(num_open, self.current_epoch + 1)
        open_parts(self.model, self.parts, num_open)

    def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
        images, labels = batch
        loss = cross_entropy(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        images, labels = batch
        logits = self.model(images)
        self.log("val_loss", cross_entropy(logits, labels))
        self.accuracy.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        self.val_accuracies.append(self.accuracy.compute().item())
        self.accuracy.reset()

    def on_train_epoch_end(self) -> None:
        self.epoch_seconds.append(time.perf_counter() - self._started)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=self.learning_rate, momentum=0.9)


def open_parts(model: torch.nn.Module, parts: Mapping[str, str], num_open: int) -> None:
    """Train the last parts; the others have no gradients and are in eval mode.

    Needs modules that are registered in the order in which they run, as in torchvision's networks.
    """
    part, opened = next(iter(parts)), list(parts)[-num_open:]
    for name, module in model.named_modules():
        part = next((p for p, begin in parts.items() if name == begin), part)
        module.train(part in opened)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(part in opened)


def train(
    model: str,
    data_dir: Path,
    weights: Path,
    strategy: str,
    epochs: int,
    image_size: int,
    batch_size: int = 32,
    learning_rate: float = 0.001,
    accelerator: str = "cpu",
    precision: Any = "32-true",
) -> PlainRun:
    """Fine-tune on a folder with train/CLASS/* and val/CLASS/*."""
    silence_lightning()
    started = time.perf_counter()
    common = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    resize = v2.Resize((image_size, image_size))
    flipped = v2.Compose([resize, v2.RandomHorizontalFlip(), *common])
    train_set = ImageFolder(str(data_dir / "train"), flipped)
    val_set = ImageFolder(str(data_dir / "val"), v2.Compose([resize, *common]))
    loading: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": 2,
        "persistent_workers": True,
        "pin_memory": accelerator == "cuda",
    }
    module = Plain(model, strategy, weights, len(train_set.classes), learning_rate)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(
        module,
        DataLoader(train_set, shuffle=True, **loading),
        DataLoader(val_set, **loading),
    )
    num_pictures = epochs * (len(train_set) + len(val_set))
    return PlainRun(
        images_per_second=num_pictures / sum(module.epoch_seconds),
        seconds=time.perf_counter() - started,
        val_accuracies=module.val_accuracies,
    )
