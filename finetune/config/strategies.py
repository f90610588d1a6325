"""Fine-tuning strategies as data: which parts of the network train from which epoch, how fast.

A new strategy is one more entry of `STRATEGIES`; no other file compares a strategy's name.

    >>> plan("gradual").start_epochs
    {'layer2': 3, 'layer3': 2, 'layer4': 1, 'fc': 0}

Freezing as data follows big_vision (https://github.com/google-research/big_vision); unfreezing part
by part, with smaller learning rates towards the input, follows Howard & Ruder 2018
(https://arxiv.org/abs/1801.06146).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PARTS = ("stem", "layer1", "layer2", "layer3", "layer4", "fc")
"""ResNet18's parts from input to output."""


@dataclass(frozen=True)
class Strategy:
    """A strategy: its defaults, and the config fields that it ignores."""

    summary: str
    deepest_part: str
    """The part nearest the input that trains, unless `unfreeze_from` names another."""
    lr_decay: float = 1.0
    stepwise: bool = False
    """The parts are unfrozen one by one, fc first, instead of all at once."""
    ignores: frozenset[str] = frozenset()


STRATEGIES: Mapping[str, Strategy] = {
    "freeze": Strategy(
        "only fc trains, on the frozen network's features",
        deepest_part="fc",
        ignores=frozenset({"unfreeze_from", "unfreeze_every", "lr_decay"}),
    ),
    "partial": Strategy(
        "everything from unfreeze_from up trains from the start",
        deepest_part="layer3",
        ignores=frozenset({"unfreeze_every"}),
    ),
    "gradual": Strategy(
        "fc first, then part after part down to unfreeze_from, deeper parts at lower rates",
        deepest_part="layer2",
        lr_decay=0.5,
        stepwise=True,
    ),
    "scratch": Strategy(
        "random weights, everything trains",
        deepest_part="stem",
        ignores=frozenset({"weights", "unfreeze_from", "unfreeze_every"}),
    ),
}


@dataclass(frozen=True)
class Plan:
    """When each part starts to train, and its share of the head's learning rate."""

    start_epochs: Mapping[str, int]
    """The epoch, from 0, at which each part starts to train; without those that never do."""
    rate_shares: Mapping[str, float]
    """The factor from the head's learning rate to that of each part."""

    def trainable_parts(self, epoch: int) -> tuple[str, ...]:
        """The parts that train at this epoch, from input to output."""
        return tuple(p for p in PARTS if self.start_epochs.get(p, math.inf) <= epoch)

    def first_trainable(self, epoch: int) -> str:
        """The part nearest the input that trains; those before it are the frozen prefix."""
        return self.trainable_parts(epoch)[0]

    @property
    def all_open_epoch(self) -> int:
        """The first epoch at which every part that will train is training."""
        return max(self.start_epochs.values())

    def opened_too_late(self, epochs: int) -> dict[str, int]:
        """The parts, with their start epoch, that don't start within this many epochs."""
        return {part: start for part, start in self.start_epochs.items() if start >= epochs}


def plan(
    strategy: str,
    unfreeze_from: str | None = None,
    unfreeze_every: int | None = None,
    lr_decay: float | None = None,
) -> Plan:
    """The plan of a strategy with these settings; None means the strategy's default."""
    entry = STRATEGIES[strategy]
    deepest = PARTS.index(unfreeze_from or entry.deepest_part)
    step = (unfreeze_every or 1) if entry.stepwise else 0
    decay = entry.lr_decay if lr_decay is None else lr_decay
    depths = {part: len(PARTS) - 1 - i for i, part in enumerate(PARTS)}
    return Plan(
        start_epochs={part: depths[part] * step for part in PARTS[deepest:]},
        rate_shares={part: decay ** depths[part] for part in PARTS},
    )


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _onecycle(progress: float) -> float:
    warmup, first, last = 0.3, 1 / 25, 1 / 250_000
    if progress < warmup:
        return first + (1 - first) * (1 - _cosine(progress / warmup))
    return last + (1 - last) * _cosine((progress - warmup) / (1 - warmup))


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": _cosine,
    "onecycle": _onecycle,
}
"""Schedule -> multiplier of all learning rates after a share (0 to 1) of the run's steps.

`cosine` is SGDR without restarts (https://arxiv.org/abs/1608.03983); `onecycle` has the shape and
constants of torch.optim.lr_scheduler.OneCycleLR (https://arxiv.org/abs/1708.07120), but leaves
momentum as it is.
"""


def epochs_since_best(val_losses: list[float], plan: Plan) -> int:
    """Epochs since the best validation loss, from the epoch at which every part is training.

    `val_losses` has one value per epoch. Training stops early when the result reaches `patience`.
    """
    counted = val_losses[plan.all_open_epoch :]
    return len(counted) - 1 - counted.index(min(counted)) if counted else 0
