"""Fine-tuning strategies as data: which parts of the network train from which epoch, how fast.

A new strategy is one more entry of `STRATEGIES`; no other file compares a strategy's name. Depth
counts the parts from the head, whose depth is 0, towards the input.

    >>> plan("gradual", ["stem", "stage1", "stage2", "head"], unfreeze_from="stage1").start_epochs
    {'stage1': 2, 'stage2': 1, 'head': 0}

Freezing as data follows big_vision (https://github.com/google-research/big_vision); unfreezing part
by part, with smaller learning rates towards the input, follows Howard & Ruder 2018
(https://arxiv.org/abs/1801.06146).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """A strategy: its defaults, and the config fields that it ignores."""

    summary: str
    max_depth: int | None
    """The depth of the deepest part that trains, unless `unfreeze_from` names it; None: all do."""
    start_epoch: Callable[[int, int], int] = lambda depth, every: 0
    """The epoch at which a part of this depth starts to train, with this `unfreeze_every`."""
    unfreeze_every: int = 1
    lr_decay: float = 1.0
    solves_head: bool = False
    """The head is solved before the first epoch (`finetune.training.solve_head`)."""
    ignores: frozenset[str] = frozenset()

    def deepest(self, parts: Sequence[str]) -> str:
        """The part nearest the input that trains by default."""
        return parts[0] if self.max_depth is None else parts[max(-len(parts), -1 - self.max_depth)]


_OF_STEPS = frozenset(
    {
        *("epochs", "batch_size", "mixup", "learning_rate", "lr_decay"),
        *("lr_schedule", "optimizer", "momentum", "weight_decay", "label_smoothing"),
        *("unfreeze_from", "unfreeze_every", "patience"),
    }
)
"""The fields that mean something only to training by steps of an optimizer."""

STRATEGIES: Mapping[str, Strategy] = {
    "probe": Strategy(
        "only the head, solved by L-BFGS with an L2 penalty that the validation loss chooses; "
        "no epochs, no learning rate",
        max_depth=0,
        solves_head=True,
        ignores=_OF_STEPS,
    ),
    "freeze": Strategy(
        "only the head trains, on the frozen network's features",
        max_depth=0,
        ignores=frozenset({"unfreeze_from", "unfreeze_every", "lr_decay"}),
    ),
    "partial": Strategy(
        "everything from unfreeze_from up trains from the start",
        max_depth=2,
        ignores=frozenset({"unfreeze_every"}),
    ),
    "gradual": Strategy(
        "the head first, then part after part down to unfreeze_from, deeper parts at lower rates",
        max_depth=3,
        start_epoch=lambda depth, every: depth * every,
        lr_decay=0.5,
    ),
    "lp-ft": Strategy(
        "the head solved as by probe, then everything from unfreeze_from up trains "
        "(Kumar et al. 2022)",
        max_depth=None,
        solves_head=True,
        ignores=frozenset({"unfreeze_every"}),
    ),
    "scratch": Strategy(
        "random weights, everything trains",
        max_depth=None,
        ignores=frozenset({"weights", "unfreeze_from", "unfreeze_every"}),
    ),
}
"""lp-ft: https://arxiv.org/abs/2202.10054."""


@dataclass(frozen=True)
class Plan:
    """When each part starts to train, and its share of the head's learning rate."""

    parts: tuple[str, ...]
    """All parts of the network, from input to output."""
    start_epochs: Mapping[str, int]
    """The epoch, from 0, at which each part starts to train; without those that never do."""
    rate_shares: Mapping[str, float]
    """The factor from the head's learning rate to that of each part."""

    def trainable_parts(self, epoch: int) -> tuple[str, ...]:
        """The parts that train at this epoch, from input to output."""
        return tuple(p for p in self.parts if self.start_epochs.get(p, math.inf) <= epoch)

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
    parts: Sequence[str],
    unfreeze_from: str | None = None,
    unfreeze_every: int | None = None,
    lr_decay: float | None = None,
) -> Plan:
    """The plan of a strategy for a network of these parts; None means the strategy's default."""
    entry = STRATEGIES[strategy]
    trained = parts[parts.index(unfreeze_from or entry.deepest(parts)) :]
    every = entry.unfreeze_every if unfreeze_every is None else unfreeze_every
    decay = entry.lr_decay if lr_decay is None else lr_decay
    depths = {part: len(parts) - 1 - i for i, part in enumerate(parts)}
    return Plan(
        parts=tuple(parts),
        start_epochs={part: entry.start_epoch(depths[part], every) for part in trained},
        rate_shares={part: decay ** depths[part] for part in parts},
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
