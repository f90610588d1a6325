"""The time that a sweep may take: which trials can still end within it."""

import time
from collections.abc import Hashable
from dataclasses import dataclass, field

from finetune.config.fields import RunConfig

_MARGIN_SECONDS = 1.0
"""To stop workers and to write what they leave."""


@dataclass
class TimeBudget:
    """A deadline, and how long the trials of each kind have taken so far.

    Trials with the same network, strategy, parts, size of pictures and batches are of one kind. A
    kind without an epoch so far is assumed to fit.
    """

    deadline: float
    """In the time of `time.monotonic`."""
    _first_seconds: dict[Hashable, float] = field(default_factory=dict)
    """From a trial's start to the end of its first epoch; the latest, which finds filled caches."""
    _epoch_seconds: dict[Hashable, float] = field(default_factory=dict)
    """The longest of the other epochs."""

    @classmethod
    def of_minutes(cls, minutes: float) -> "TimeBudget":
        return cls(time.monotonic() + 60 * minutes)

    @property
    def remaining_seconds(self) -> float:
        return self.deadline - time.monotonic() - _MARGIN_SECONDS

    @property
    def is_over(self) -> bool:
        return self.remaining_seconds <= 0

    def observe(self, config: RunConfig, epoch: int, seconds: float) -> None:
        """An epoch has ended, so long after the one before, or after the trial's start."""
        kind = _kind(config)
        if epoch == 0:
            self._first_seconds[kind] = seconds
        else:
            self._epoch_seconds[kind] = max(seconds, self._epoch_seconds.get(kind, 0.0))

    def seconds(self, config: RunConfig) -> float:
        """The expected time of a complete trial; 0 if none of its kind has been seen."""
        kind = _kind(config)
        first = self._first_seconds.get(kind, 0.0)
        return first + (config.num_epochs - 1) * self._epoch_seconds.get(kind, 0.0)

    def fits(self, config: RunConfig) -> bool:
        return self.seconds(config) < self.remaining_seconds

    def fits_an_epoch(self, config: RunConfig) -> bool:
        """Whether a running trial can end one more epoch."""
        return self._epoch_seconds.get(_kind(config), 0.0) < self.remaining_seconds


def _kind(config: RunConfig) -> Hashable:
    return (
        *(config.model, config.strategy, config.unfreeze_from),
        *(config.image_size, config.batch_size, config.data_aug),
    )
