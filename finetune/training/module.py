"""The LightningModule: trains the parts that the strategy's plan opens at each epoch.

What trains depends on the plan and the epoch alone and is set at the start of every epoch, so a
resumed run needs no state for it.
"""

from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models import ResNet

from finetune.config.fields import RunConfig
from finetune.config.strategies import PARTS, SCHEDULES
from finetune.data.batches import Batch, EpochBatches
from finetune.features.loader import EpochLoader
from finetune.features.prefix_cache import network_input
from finetune.model.network import forward, part_module, part_state
from finetune.runs.predictions import confusion_counts, macro_f1
from finetune.runs.result import Row


class FineTuning(pl.LightningModule):
    """The frozen prefix in eval mode without gradients; one SGD parameter group per part."""

    def __init__(self, network: ResNet, config: RunConfig, loader: EpochLoader) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.loader = loader
        self.strict_loading = False  # last.ckpt leaves out the parts that never train
        self._open: tuple[str, ...] = PARTS
        self._totals: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": []}
        """Each batch's summed loss and number of correct predictions, by split."""
        self._val_logits: list[Tensor] = []
        self._rates: dict[str, float] = {}

    def train(self, mode: bool = True) -> Self:
        """Frozen parts stay in eval mode, whatever `mode` is."""
        super().train(mode)
        for part in PARTS:
            part_module(self.network, part).train(mode and part in self._open)
        return self

    def open_parts(self, epoch: int) -> None:
        """Enable gradients and train mode for the parts that train at this epoch only."""
        self._open = self.config.plan.trainable_parts(epoch)
        for part in PARTS:
            part_module(self.network, part).requires_grad_(part in self._open)
        self.train()

    def configure_optimizers(self) -> Any:
        config, rate = self.config, self.config.learning_rate
        groups = [
            {
                "params": list(part_module(self.network, part).parameters()),
                "lr": rate * config.plan.rate_shares[part],
                "name": part,
            }
            for part in PARTS
        ]
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.SGD(
            groups, lr=rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
        )
        if config.lr_schedule == "constant":
            return optimizer
        multiplier = SCHEDULES[config.lr_schedule]
        num_steps = config.epochs * len(self.loader.train_epoch(0))
        scheduler = LambdaLR(optimizer, lambda step: multiplier(min(1.0, step / num_steps)))
        by_step = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": by_step}

    def on_fit_start(self) -> None:
        precision = self.trainer.precision_plugin.forward_context
        self.loader.prepare(self.network.eval(), self.current_epoch, precision)

    def train_dataloader(self) -> EpochBatches:
        return self.loader.train_epoch(self.current_epoch)

    def val_dataloader(self) -> EpochBatches:
        return self.loader.val_epoch(self.current_epoch)

    def forward(self, batch: Batch) -> Tensor:
        """Logits, (B, K), in the dtype of the run's precision."""
        boundary = self._open[0]
        with torch.no_grad():
            x = network_input(batch.inputs, batch.flips, batch.part)
            x = forward(self.network, x, batch.part, boundary)
        return forward(self.network, x, boundary, None)

    def on_train_epoch_start(self) -> None:
        self.open_parts(self.current_epoch)
        self._totals["train"] = []
        optimizer: Any = self.optimizers()
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        self._rates = {part: rates[part] if part in self._open else 0.0 for part in PARTS}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        logits = self(batch)
        loss = cross_entropy(logits, batch.labels, label_smoothing=self.config.label_smoothing)
        num_correct = (logits.argmax(dim=1) == batch.labels).sum()
        self._totals["train"].append((loss.detach() * len(batch.labels), num_correct))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._totals["val"], self._val_logits = [], []

    @torch.inference_mode()
    def validation_step(self, batch: Batch, batch_index: int) -> None:
        logits = self(batch).float()
        loss_sum = cross_entropy(logits, batch.labels, reduction="sum")
        self._totals["val"].append((loss_sum, (logits.argmax(dim=1) == batch.labels).sum()))
        self._val_logits.append(logits)

    def epoch_metrics(self) -> Row:
        """The finished epoch's mean losses, accuracies, macro F1 and learning rates."""
        row: Row = {"epoch": self.current_epoch}
        for name, split in {"train": self.loader.train, "val": self.loader.val}.items():
            loss_sums, nums_correct = zip(*self._totals[name], strict=True)
            row[f"{name}_loss"] = float(sum(loss_sums)) / len(split.pictures)
            row[f"{name}_acc"] = int(sum(nums_correct)) / len(split.pictures)
        labels, logits = self.loader.val.pictures.labels, self.val_logits().numpy()
        counts = confusion_counts(labels, logits.argmax(axis=1), logits.shape[1])
        row["val_macro_f1"] = macro_f1(counts)
        parameters = self.network.parameters()
        row["trainable_parameters"] = sum(p.numel() for p in parameters if p.requires_grad)
        return row | {f"lr/{part}": self._rates[part] for part in PARTS}

    def val_logits(self) -> Tensor:
        """The finished epoch's validation logits, float32 on the CPU, (N, K)."""
        return torch.cat(self._val_logits).cpu()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the parts that never train: the source weights have them."""
        trained = part_state(self.network, self.config.plan.start_epochs)
        checkpoint["state_dict"] = {f"network.{key}": value for key, value in trained.items()}
