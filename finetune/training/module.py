"""One network, trained as its plan says: the LightningModule.

Turns batches into losses, logits and gradients of the parts that train. What trains follows from
the plan and the epoch alone and is applied at every epoch's start, so a resumed run is right by
construction. Knows nothing about files, W&B or what a run leaves behind.

    >>> module = FineTuning(network, config, feed)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import ResNet

from finetune.config.fields import RunConfig
from finetune.config.strategies import PARTS, SCHEDULES
from finetune.data.batches import Batch, EpochBatches
from finetune.features.feed import Feed
from finetune.features.forms import enter
from finetune.model.network import forward, part_modules, part_parameters, part_state
from finetune.runs.result import Row


class FineTuning(pl.LightningModule):
    """Frozen prefix without gradients and in eval mode; trained suffix; SGD, a group a part."""

    def __init__(self, network: ResNet, config: RunConfig, feed: Feed) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.feed = feed
        self.plan = config.plan
        self.strict_loading = False  # last.ckpt leaves out what never trains
        self._open: tuple[str, ...] = PARTS
        num_classes = len(feed.train_pictures.class_names)
        self.train_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self._train_loss_sum = torch.zeros(())
        self._val_loss_sum = torch.zeros(())
        self._val_logits: list[Tensor] = []
        self._rates: dict[str, float] = {}

    # What trains

    def train(self, mode: bool = True) -> Self:
        """Train mode for the parts that train; the others stay in eval mode whatever is asked."""
        super().train(mode)
        for part in PARTS:
            for module in part_modules(self.network, part):
                module.train(mode and part in self._open)
        return self

    def open_parts(self, epoch: int) -> None:
        """Give the parts that train at this epoch, and no others, gradients and train mode."""
        self._open = self.plan.trainable_parts(epoch)
        for part in PARTS:
            for parameter in part_parameters(self.network, part):
                parameter.requires_grad_(part in self._open)
        self.train()

    def configure_optimizers(self) -> Any:
        fused = self.device.type in ("cpu", "cuda")
        rate = self.config.learning_rate
        groups = [
            {
                "params": part_parameters(self.network, part),
                "lr": rate * self.plan.rate_shares[part],
                "name": part,
            }
            for part in PARTS
        ]
        optimizer = torch.optim.SGD(
            groups,
            lr=rate,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
            fused=fused,
        )
        if self.config.lr_schedule == "constant":
            return optimizer
        multiplier = SCHEDULES[self.config.lr_schedule]
        num_steps = self.config.epochs * len(self.feed.train_epoch(0))
        scheduler = LambdaLR(optimizer, lambda step: multiplier(min(1.0, step / num_steps)))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # Batches

    def on_fit_start(self) -> None:
        self.network.eval()
        self.feed.prepare(
            self.network, self.current_epoch, self.trainer.precision_plugin.forward_context
        )

    def train_dataloader(self) -> EpochBatches:
        return self.feed.train_epoch(self.current_epoch)

    def val_dataloader(self) -> EpochBatches:
        return self.feed.val_epoch(self.current_epoch)

    def forward(self, batch: Batch) -> Tensor:
        """Logits, float32 or the precision's own, (B, K)."""
        boundary = self._open[0]
        with torch.no_grad():
            x = enter(batch.inputs, batch.flips, batch.part)
            x = forward(self.network, x, batch.part, boundary)
        return forward(self.network, x, boundary, None)

    # Steps

    def on_train_epoch_start(self) -> None:
        self.open_parts(self.current_epoch)
        self._train_loss_sum = torch.zeros((), device=self.device)
        self.train_acc.reset()
        optimizer: Any = self.optimizers()
        self._rates = {
            group["name"]: group["lr"] if group["name"] in self._open else 0.0
            for group in optimizer.param_groups
        }

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        logits = self(batch)
        loss = cross_entropy(logits, batch.labels, label_smoothing=self.config.label_smoothing)
        self._train_loss_sum += loss.detach() * len(batch.labels)
        self.train_acc.update(logits.detach(), batch.labels)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._val_loss_sum = torch.zeros((), device=self.device)
        self._val_logits = []
        self.val_acc.reset()

    @torch.inference_mode()
    def validation_step(self, batch: Batch, batch_index: int) -> None:
        logits = self(batch).float()
        self._val_loss_sum += cross_entropy(logits, batch.labels, reduction="sum")
        self.val_acc.update(logits, batch.labels)
        self._val_logits.append(logits)

    # What an epoch amounted to

    def epoch_metrics(self) -> Row:
        """The finished epoch's losses (means over pictures), accuracies and learning rates."""
        return {
            "epoch": self.current_epoch,
            "train_loss": self._train_loss_sum.item() / len(self.feed.train_pictures),
            "train_acc": _exact(self.train_acc.compute(), len(self.feed.train_pictures)),
            "val_loss": self._val_loss_sum.item() / len(self.feed.val_pictures),
            "val_acc": _exact(self.val_acc.compute(), len(self.feed.val_pictures)),
            "trainable_parameters": sum(
                p.numel() for p in self.network.parameters() if p.requires_grad
            ),
            **{f"lr/{part}": self._rates[part] for part in PARTS},
        }

    def val_logits(self) -> Tensor:
        """The finished epoch's validation logits, float32 on the CPU, (N, K)."""
        return torch.cat(self._val_logits).cpu()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what never trains: the source weights have it."""
        trained = part_state(self.network, self.plan.start_epochs)
        checkpoint["state_dict"] = {f"network.{key}": value for key, value in trained.items()}


def _exact(accuracy: Tensor, num_pictures: int) -> float:
    """A float32 accuracy as the fraction of whole pictures that it rounds."""
    return round(accuracy.item() * num_pictures) / num_pictures
