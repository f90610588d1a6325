"""The LightningModule: trains the parts that the strategy's plan opens at each epoch.

What trains depends on the plan and the epoch alone and is set at the start of every epoch, so a
resumed run needs no state for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from finetune.config.fields import RunConfig
from finetune.config.optimizers import OPTIMIZERS
from finetune.config.strategies import SCHEDULES
from finetune.data.batches import Batch, EpochBatches, PrefetchedBatches
from finetune.data.seeding import step_generator
from finetune.features.loader import EpochLoader
from finetune.features.split_inputs import network_input
from finetune.model.chain import Chain
from finetune.runs.predictions import confusion_counts, macro_f1
from finetune.runs.result import RATE, Row
from finetune.system.resources import is_out_of_memory
from finetune.training.solve_head import Choice, solve_head


class Mix(NamedTuple):
    """A batch mixed with a permutation of itself: mixup (https://arxiv.org/abs/1710.09412)."""

    share: float
    """Of the first of the two pictures, 0.5 to 1."""
    order: Tensor
    """The index of each picture's partner, int64, (B,)."""

    @classmethod
    def drawn(cls, rng: np.random.Generator, alpha: float, batch_size: int) -> Self:
        share = rng.beta(alpha, alpha)
        return cls(max(share, 1 - share), torch.from_numpy(rng.permutation(batch_size)))

    def of(self, x: Tensor) -> Tensor:
        return self.share * x + (1 - self.share) * self.permuted(x)

    def permuted(self, x: Tensor) -> Tensor:
        return x[self.order.to(x.device, non_blocking=True)]


class FineTuning(pl.LightningModule):
    """The frozen prefix in eval mode without gradients; one parameter group per part."""

    def __init__(
        self,
        chain: Chain,
        config: RunConfig,
        loader: EpochLoader,
        first_epoch: int = 0,
        head_choice: Choice | None = None,
    ) -> None:
        """`first_epoch`: the one at which a resumed run goes on. `head_choice`: how
        the head is solved; None: the validation loss chooses."""
        super().__init__()
        self.network = chain.network  # its name is part of last.ckpt's keys
        self.chain = chain
        self.config = config
        self.loader = loader
        self.first_epoch = first_epoch  # Lightning restores its own after `on_fit_start`
        self.strict_loading = False  # last.ckpt leaves out the parts that never train
        self._open = chain.parts
        self._class_weights: Tensor | None
        self.register_buffer("_class_weights", _class_weights(config, loader), persistent=False)
        self._totals: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": []}
        """Each batch's summed loss and number of correct predictions, by split."""
        self._val_logits: list[Tensor] = []
        self._rates: dict[str, float] = {}
        self.head_choice = head_choice
        """How the head was solved, if it was."""

    def train(self, mode: bool = True) -> Self:
        """Frozen parts stay in eval mode, whatever `mode` is."""
        super().train(mode)
        for part in self.chain.parts:
            for module in self.chain.modules(part):
                module.train(mode and part in self._open)
        return self

    def open_parts(self, epoch: int) -> None:
        """Enable gradients and train mode for the parts that train at this epoch only."""
        self._open = self.config.plan.trainable_parts(epoch)
        for part in self.chain.parts:
            for parameter in self.chain.parameters(part):
                parameter.requires_grad_(part in self._open)
        self.train()

    def configure_optimizers(self) -> Any:
        config = self.config
        shares = config.plan.rate_shares
        parts = {part: self.chain.parameters(part) for part in self.chain.parts}
        groups = [parameter_group(config, part, parts[part], shares[part]) for part in parts]
        return self.optimizer_of(groups, [config.lr_schedule] * len(groups))

    def optimizer_of(self, groups: list[dict[str, Any]], schedules: Sequence[str | None]) -> Any:
        """The config's optimizer of these groups, and each group's learning rate schedule."""
        entry = OPTIMIZERS[self.config.optimizer or "sgd"]
        fused = self.device.type in ("cpu", "cuda")
        optimizer = getattr(torch.optim, entry.name)(groups, lr=0.0, fused=fused)
        if {*schedules} <= {None, "constant"}:
            return optimizer
        num_steps = self.config.num_epochs * len(self.loader.train_epoch(0))

        def multiplier(schedule: str | None) -> Callable[[int], float]:
            of_share = SCHEDULES[schedule or "constant"]
            return lambda step: of_share(min(1.0, step / num_steps))

        scheduler = LambdaLR(optimizer, [multiplier(schedule) for schedule in schedules])
        by_step = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": by_step}

    def on_fit_start(self) -> None:
        precision = self.trainer.precision_plugin.forward_context
        self.network.eval()
        self.loader.prepare(self.chain, self.first_epoch, precision)
        if self.config.solves_head and self.first_epoch == 0:
            self.head_choice, line = solve_head(
                self.chain, self.loader, precision, self._class_weights, self.head_choice
            )
            self.loader.log(line)

    def train_dataloader(self) -> EpochBatches | PrefetchedBatches:
        return self.loader.train_epoch(self.current_epoch)

    def val_dataloader(self) -> EpochBatches | PrefetchedBatches:
        return self.loader.val_epoch(self.current_epoch)

    def forward(self, batch: Batch, mix: Mix | None = None) -> Tensor:
        """Logits, float32, (B, K); if memory runs out, without what lives on the device."""
        try:
            return self._logits(batch, mix)
        except RuntimeError as error:
            if not (is_out_of_memory(error) and self.loader.release_memory()):
                raise
        return self._logits(batch, mix)

    def _logits(self, batch: Batch, mix: Mix | None) -> Tensor:
        boundary = self._open[0]
        with torch.no_grad():
            changed = batch.augmentation
            pixels = batch.inputs if changed is None else changed.apply(batch.inputs)
            x = network_input(pixels, batch.flips, self.chain.backbone)
            x = x if mix is None else mix.of(x)
            x = self.chain.forward(x, batch.part, boundary)
        return self.head_logits(x, boundary)

    def head_logits(self, x: Tensor, boundary: str) -> Tensor:
        """The logits, float32, from the input of the part `boundary`."""
        return self.chain.logits(x, boundary)

    def on_train_epoch_start(self) -> None:
        self.open_parts(self.current_epoch)
        self._totals["train"] = []
        optimizer: Any = self.optimizers()
        self._start_momentum(optimizer)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        self._rates = {part: rate if part in self._open else 0.0 for part, rate in rates.items()}

    def _start_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        """Momentum starts at 0, which gives the same steps as torch's own start.

        The fused SGD would allocate it at its first step without setting it, and return early if
        the GradScaler found an infinite gradient: then it was whatever the memory had held.
        """
        for group in optimizer.param_groups:
            if group.get("momentum") and group["name"] in self._open:
                for parameter in group["params"]:
                    state = optimizer.state[parameter]
                    state.setdefault("momentum_buffer", torch.zeros_like(parameter))

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss, (). What is drawn follows from the seed, the epoch and `batch_index` alone."""
        config = self.config
        rng = step_generator(config.seed, self.current_epoch, batch_index)
        mix = Mix.drawn(rng, config.mixup, len(batch.labels)) if config.mixup else None
        with _seeded(int(rng.integers(2**63)), self.device):  # dropout and stochastic depth
            logits = self(batch, mix)
        loss = self._loss(logits, batch.labels)
        if mix is not None:
            partners_loss = self._loss(logits, mix.permuted(batch.labels))
            loss = mix.share * loss + (1 - mix.share) * partners_loss
        num_correct = (logits.argmax(dim=-1) == batch.labels).sum(dim=-1)
        self._totals["train"].append((loss.detach() * len(batch.labels), num_correct))
        return loss.sum()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(
            logits,
            labels,
            weight=self._class_weights,
            label_smoothing=self.config.label_smoothing or 0.0,
        )

    def _loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The validation loss of a batch, neither weighted nor smoothed, times its size."""
        return cross_entropy(logits, labels, reduction="sum")

    def on_validation_epoch_start(self) -> None:
        self._totals["val"], self._val_logits = [], []

    @torch.inference_mode()
    def validation_step(self, batch: Batch, batch_index: int) -> None:
        logits = self(batch)
        num_correct = (logits.argmax(dim=-1) == batch.labels).sum(dim=-1)
        self._totals["val"].append((self._loss_sum(logits, batch.labels), num_correct))
        self._val_logits.append(logits)

    def epoch_metrics(self) -> Row:
        """The finished epoch's mean losses, accuracies, macro F1 and learning rates.

        Without those of validation if there was none.
        """
        return self._row(self._totals, self.val_logits(), self._rates)

    def _row(
        self,
        totals: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
        val_logits: Tensor | None,
        rates: Mapping[str, float],
    ) -> Row:
        row: Row = {"epoch": self.current_epoch}
        for name, split in {"train": self.loader.train, "val": self.loader.val}.items():
            if not totals[name]:  # there is no validation
                continue
            loss_sums, nums_correct = zip(*totals[name], strict=True)
            row[f"{name}_loss"] = float(sum(loss_sums)) / len(split.pictures)
            row[f"{name}_acc"] = int(sum(nums_correct)) / len(split.pictures)
        if val_logits is not None:
            labels, logits = self.loader.val.pictures.labels, val_logits.numpy()
            counts = confusion_counts(labels, logits.argmax(axis=1), logits.shape[1])
            row["val_macro_f1"] = macro_f1(counts)
        parameters = self.network.parameters()
        row["trainable_parameters"] = sum(p.numel() for p in parameters if p.requires_grad)
        return row | {f"{RATE}{part}": rate for part, rate in rates.items()}

    def val_logits(self) -> Tensor | None:
        """The finished epoch's validation logits, float32 on the CPU, (N, K), if it has any."""
        return torch.cat(self._val_logits, dim=-2).cpu() if self._val_logits else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the parts that never train: the source weights have them."""
        trained = self.chain.state(self.config.plan.start_epochs)
        checkpoint["state_dict"] = {f"network.{key}": value for key, value in trained.items()}


def parameter_group(
    config: RunConfig, part: str, parameters: Sequence[nn.Parameter], rate_share: float = 1.0
) -> dict[str, Any]:
    """The parameters of a part, with the config's optimizer options."""
    fields = OPTIMIZERS[config.optimizer or "sgd"].fields
    options = {name: getattr(config, name) or 0.0 for name in sorted(fields)}
    rate = (config.learning_rate or 0.0) * rate_share
    return {"params": parameters, "lr": rate, "name": part, **options}


def _class_weights(config: RunConfig, loader: EpochLoader) -> Tensor | None:
    """`balanced`: N / (K * the class's number of training pictures), as in scikit-learn."""
    if config.class_weights == "none":
        return None
    pictures = loader.train.pictures
    counts = np.bincount(pictures.labels, minlength=len(pictures.class_names))
    return torch.from_numpy(len(pictures) / (len(counts) * counts.clip(min=1))).float()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from this seed on the CPU and the device, and restore the generators afterwards.

    torch.manual_seed would seed all devices, which takes as long as a small training step.
    """
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if is_cuda else []):
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            torch.cuda.manual_seed(seed)
        yield
