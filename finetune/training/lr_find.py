"""The learning-rate range test: `python -m finetune lr_find [--FIELD VALUE ...]`.

The rate rises exponentially while the run's own training is repeated, and the loss falls as long as
the rate is not too high (Smith 2017, https://arxiv.org/abs/1506.01186).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl

from finetune.config.fields import RunConfig
from finetune.features.loader import EpochLoader
from finetune.model.network import build_from
from finetune.runs.resolve import resolve, with_file
from finetune.system.errors import ConfigError
from finetune.system.progress import bar
from finetune.system.shutdown import stoppable
from finetune.training.module import FineTuning
from finetune.training.train import log, make_trainer

LOWEST_RATE, HIGHEST_RATE, NUM_STEPS = 1e-6, 10.0, 100
_SMOOTHING, _DIVERGED = 0.9, 4.0
_NUM_SKIPPED, _NUM_LOW, _NUM_AROUND = 10, 15, 5
_NUM_ROWS, _BAR_WIDTH = 20, 40


class RangeTest(NamedTuple):
    """The learning rates of the steps, and the smoothed loss at each."""

    rates: list[float]
    losses: list[float]

    @property
    def is_too_short(self) -> bool:
        """Whether training diverged before the loss at low rates was known."""
        return len(self.losses) <= _NUM_SKIPPED + _NUM_LOW

    @property
    def suggestion(self) -> float | None:
        """The rate at which the loss falls most steeply over the logarithm of the rate.

        That is the rule `steep` of fastai's `lr_find` (https://docs.fast.ai/callback.schedule.html;
        Lightning takes the slope over the rate itself), with two differences. The slope is taken
        over ten steps, because that from one step to the next is mostly noise. And a fall after the
        least loss, from a peak at high rates, doesn't count. The first steps, whose smoothed loss
        is of few batches, are left out.

        None if the curve is too short, or if the loss falls by less than twice what it varies at
        the lowest rates.
        """
        if self.is_too_short:
            return None
        losses, around = np.array(self.losses[_NUM_SKIPPED:]), _NUM_AROUND
        low = losses[:_NUM_LOW]
        if low.min() - losses.min() < 2 * (low.max() - low.min()):
            return None
        falls = losses[: -2 * around] - losses[2 * around :]  # [i]: around step i + 5
        until_least = falls[: max(1, int(losses.argmin()) + 1 - around)]
        return self.rates[_NUM_SKIPPED + around + int(until_least.argmax())]


def lr_find(fields: Mapping[str, Any]) -> int:
    """Print the curve of a range test and the suggested rate; returns the exit code.

    `fields` are those of a run. Nothing is written but the caches. Raises `FinetuneError`.
    """
    given = with_file(fields)
    if "resume" in given:
        raise ConfigError("resume: lr_find starts anew; pass --config RUN_DIR/config.yaml instead")
    config = RunConfig.from_fields(given)
    if config.learning_rate is None:
        raise ConfigError(f"strategy: {config.strategy} has no learning rate to find")
    with stoppable():
        found = range_test(config)
    print("\n".join(describe(found)))
    return 0


def range_test(config: RunConfig) -> RangeTest:
    """Train with rising rates, all parts that will train being open from the start."""
    config, splits, cache = resolve(config, log, bar)
    at_once = {"unfreeze_every": 0, "lr_schedule": "constant"}
    config = config.model_copy(update=at_once)
    chain, _ = build_from(config, len(splits.class_names), log)
    loader = EpochLoader(config, splits, cache, log)
    assert config.learning_rate is not None
    module, rising = FineTuning(chain, config, loader), _RisingRate(config.learning_rate)
    trainer = make_trainer(config, Path.cwd(), rising, max_steps=NUM_STEPS, limit_val_batches=0)
    trainer.fit(module)
    return RangeTest(rising.rates, rising.losses)


class _RisingRate(pl.Callback):
    """Sets the rate of each step and records its loss, until that is far above the least."""

    def __init__(self, learning_rate: float) -> None:
        self._configured_rate = learning_rate
        self._shares: list[float] = []
        self._average = 0.0
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        groups = trainer.optimizers[0].param_groups
        self._shares = [group["lr"] / self._configured_rate for group in groups]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        progress = len(self.rates) / (NUM_STEPS - 1)
        rate = LOWEST_RATE * (HIGHEST_RATE / LOWEST_RATE) ** progress
        for group, share in zip(trainer.optimizers[0].param_groups, self._shares, strict=True):
            group["lr"] = rate * share
        self.rates.append(rate)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = float(outputs["loss"])
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
        smoothed = self._average / (1 - _SMOOTHING ** len(self.rates))
        if not math.isfinite(smoothed) or smoothed > _DIVERGED * min([*self.losses, smoothed]):
            self.rates.pop()
            trainer.should_stop = True
        else:
            self.losses.append(smoothed)


def describe(found: RangeTest) -> Sequence[str]:
    """The curve as rows of rate, loss and bar, and the suggestion."""
    rates, losses = found
    if not losses:
        return ["the loss is not finite at the first step; check the data and the weights"]
    lines = [f"{'rate':>10} {'loss':>8}"]
    least, most = min(losses), max(losses)
    for i in range(0, len(losses), max(1, len(losses) // _NUM_ROWS)):
        share = (losses[i] - least) / (most - least) if most > least else 0.0
        bar_text = "#" * round(share * _BAR_WIDTH)
        lines.append(f"{rates[i]:10.2g} {losses[i]:8.3f} {bar_text}".rstrip())
    if len(losses) < NUM_STEPS:
        lines.append(f"stopped after {rates[-1]:.2g}: then {_DIVERGED:g} times the least loss")
    if (rate := found.suggestion) is not None:
        return [*lines, f"steepest descent: --learning_rate {rate:.2g}"]
    if found.is_too_short:
        return [*lines, f"the curve has only {len(losses)} steps: no rate is suggested"]
    return [
        *lines,
        "the loss does not fall more than it varies from batch to batch: no rate is suggested",
    ]
