"""What can go wrong at a user's hands, in words.

Turns a mistake into one message and an exit code. Knows nothing about what raised it.

    FinetuneError            exit code 1: the run failed
    ├── ConfigError          2: the command line or a config is wrong
    │   └── MissingPackage   2: an optional package is needed; its pip line is named
    ├── DataError            1: pictures, folders, splits
    ├── WeightsError         1: weight files and checkpoints
    ├── RunDirError          1: a run directory that can't be used
    ├── Diverged             1: the loss is no longer a number
    ├── Shortage             1: the machine has run out of disk, file handles or the like
    └── Pruned               the sweep that a run belongs to has seen enough of it
    Stopped                  ends by its signal; a BaseException, so that nothing swallows it

"""

from __future__ import annotations

import signal
import traceback
from dataclasses import dataclass

PREEMPTION_SIGNAL = signal.SIGUSR1
"""What schedulers send before they take the machine (Slurm: --signal=USR1@120)."""


class FinetuneError(Exception):
    """A mistake that its message explains: what was wrong, found, allowed, and what to do."""

    exit_code = 1


class ConfigError(FinetuneError):
    """The command line or a config is wrong."""

    exit_code = 2


class MissingPackage(ConfigError):
    """An optional package isn't installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install {package} (or '.[{extra}]')")


class DataError(FinetuneError):
    """Pictures, folders or splits can't be used."""


class WeightsError(FinetuneError):
    """Weights or a checkpoint can't be found, read or fitted."""


class RunDirError(FinetuneError):
    """A run directory is in use, finished, of another config, or can't be written."""


class Diverged(FinetuneError):
    """The loss is not a finite number any more."""


class Shortage(FinetuneError):
    """The machine has run out of something. What was done stays, and can be gone on with."""


class Pruned(FinetuneError):
    """A sweep ends this run early: others are better at the same epoch."""


class Stopped(BaseException):
    """A signal asked the process to end; everything is written first."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def state(self) -> str:
        """`preempted` where a scheduler takes the machine and the run is to be queued again."""
        return "preempted" if self.signum == PREEMPTION_SIGNAL else "stopped"


@dataclass(frozen=True)
class Failure:
    """How a run that did not finish ended, as failure.json and W&B tell it."""

    state: str
    """failed, stopped, pruned or preempted."""
    reason: str
    exit_code: int


def failure_of(error: BaseException) -> Failure:
    """What an exception that ends a run amounts to; a pruned run hasn't failed."""
    match error:
        case Stopped():
            return Failure(error.state, str(error), 128 + error.signum)
        case KeyboardInterrupt():
            return Failure("stopped", "interrupted", 128 + signal.SIGINT)
        case Pruned():
            return Failure("pruned", str(error), 0)
        case FinetuneError():
            return Failure("failed", str(error), error.exit_code)
        case _:
            reason = "".join(traceback.format_exception_only(error)).strip()
            return Failure("failed", reason, FinetuneError.exit_code)
