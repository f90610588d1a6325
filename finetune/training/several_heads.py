"""Several heads on one frozen network, trained on the same batches in one training loop.

Each head has the parameters, losses and metrics that it would have alone, to the bit: it computes
with the same operations on the same batches. Shared are the features, Lightning's work for each
step, and the optimizer, in which each head is a parameter group.

Legend: R runs, B batch, K classes.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from finetune.config.fields import RunConfig
from finetune.features.loader import EpochLoader
from finetune.model.chain import Chain
from finetune.runs.result import Row
from finetune.training.module import FineTuning, parameter_group


class SeveralHeads(FineTuning):
    """`FineTuning` of R runs whose configs differ only in `HEAD_FIELDS`."""

    def __init__(self, chain: Chain, configs: Sequence[RunConfig], loader: EpochLoader) -> None:
        super().__init__(chain, configs[0], loader)
        self.configs = configs
        self._head = chain.parts[-1]
        self.heads: Any = nn.ModuleList(copy.deepcopy(chain.part(self._head)) for _ in configs)
        self._head_rates: list[float] = []

    def train(self, mode: bool = True) -> "SeveralHeads":
        super().train(mode)
        for head in self.heads:
            head.train(mode)
        return self

    def configure_optimizers(self) -> Any:
        groups = [
            parameter_group(config, self._head, list(head.parameters()))
            for config, head in zip(self.configs, self.heads, strict=True)
        ]
        return self.optimizer_of(groups, [config.lr_schedule for config in self.configs])

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        optimizer: Any = self.optimizers()
        self._head_rates = [group["lr"] for group in optimizer.param_groups]

    def head_logits(self, x: Tensor, boundary: str) -> Tensor:
        """The logits of each run, float32, (R, B, K)."""
        x = self.chain.forward(x, boundary, self._head)
        found, draws = [], _Draws(x.device)
        with torch.autocast(x.device.type, enabled=False):
            for head in self.heads:
                draws.restart()  # dropout draws what it would draw alone
                found.append(head(x.to(torch.float32, copy=True)))  # it may change its input
        return torch.stack(found)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(R,): each run with its label smoothing."""
        smoothings = [config.label_smoothing or 0.0 for config in self.configs]
        weight = self._class_weights
        losses = [
            cross_entropy(own, labels, weight=weight, label_smoothing=smoothing)
            for own, smoothing in zip(logits, smoothings, strict=True)
        ]
        return torch.stack(losses)

    def _loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([cross_entropy(own, labels, reduction="sum") for own in logits])

    def rows(self) -> list[Row]:
        """The finished epoch's metrics of each run, as `epoch_metrics` gives them for one."""
        logits = self.val_logits()
        assert logits is not None
        found, no_rates = [], dict.fromkeys(self.chain.parts, 0.0)
        for i, rate in enumerate(self._head_rates):
            totals = {
                split: [(losses[i], nums_correct[i]) for losses, nums_correct in batches]
                for split, batches in self._totals.items()
            }
            found.append(self._row(totals, logits[i], no_rates | {self._head: rate}))
        return found

    def head_state(self, run: int) -> dict[str, Tensor]:
        """A copy of a run's head, under the network's keys."""
        return {key: value.clone() for key, value in self.heads[run].state_dict().items()}


class _Draws:
    """The state of the random generators, to which they can return."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._states = self._read()

    def _read(self) -> tuple[Tensor, Tensor | None]:
        on_device = None if self._device is None else torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state(), on_device

    def restart(self) -> None:
        on_cpu, on_device = self._states
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, self._device or "cuda")
