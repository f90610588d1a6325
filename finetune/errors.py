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

import difflib
import errno
import os
import signal
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

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
class Ending:
    """How a run that did not finish ended, as failure.json and W&B tell it."""

    state: str
    """failed, stopped, pruned or preempted."""
    reason: str
    exit_code: int


def ending(error: BaseException) -> Ending:
    """What an exception that ends a run amounts to; a pruned run hasn't failed."""
    match error:
        case Stopped():
            return Ending(error.state, str(error), 128 + error.signum)
        case KeyboardInterrupt():
            return Ending("stopped", "interrupted", 128 + signal.SIGINT)
        case Pruned():
            return Ending("pruned", str(error), 0)
        case FinetuneError():
            return Ending("failed", str(error), error.exit_code)
        case _:
            reason = "".join(traceback.format_exception_only(error)).strip()
            return Ending("failed", reason, FinetuneError.exit_code)


_REMEDIES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within the disk's quota",
    errno.EROFS: "pass a place that can be written",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "allow more open files on this machine",
}


def shortage(error: BaseException) -> Shortage | None:
    """What the machine has run out of, where an error says so; None for any other error.

    Libraries wrap the system's errors in their own: in their causes, or in their words alone.
    """
    found: BaseException | None = error
    while found is not None:
        for code, remedy in _REMEDIES.items():
            if os.strerror(code) in str(found):
                if isinstance(error, FinetuneError):
                    return Shortage(str(error))
                path = getattr(found, "filename", None)
                place = f"{path} can't be used: " if path else ""
                return Shortage(f"{place}{os.strerror(code)}; {remedy}")
        found = found.__cause__ or found.__context__
    return None


def require_handles(count: int) -> None:
    """Raise `OSError` unless so many more files can be opened: libraries may hang without."""
    pipes: list[tuple[int, int]] = []
    try:
        while 2 * len(pipes) < count:
            pipes.append(os.pipe())
    finally:
        for descriptor in chain.from_iterable(pipes):
            os.close(descriptor)


def is_out_of_memory(error: BaseException) -> bool:
    """On the CPU, where torch's allocator raises a RuntimeError."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean ...?` for a misspelt name, or nothing where no choice is near."""
    near = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def one_line(name: object) -> str:
    """A name from outside as a terminal may show it: line breaks, control characters and bytes
    that are no text stand there as escapes."""
    return "".join(c if c.isprintable() else _escaped(c) for c in str(name))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def message(error: BaseException) -> str:
    """What an error says, its own line breaks kept, as a terminal may show it."""
    return "\n".join(map(one_line, str(error).split("\n")))
