"""What can go wrong at a user's hands, and how a process then ends.

Turns a mistake into one message and an exit code. Knows nothing about what raised it.

    FinetuneError            exit code 1: the run failed
    ├── ConfigError          2: the command line or a config is wrong
    │   └── MissingPackage   2: an optional package is needed; its pip line is named
    ├── DataError            1: pictures, folders, splits
    ├── WeightsError         1: weight files and checkpoints
    ├── RunDirError          1: a run directory that can't be used
    ├── Diverged             1: the loss is no longer a number
    └── Pruned               the sweep that a run belongs to has seen enough of it
    Stopped                  ends by its signal; a BaseException, so that nothing swallows it

"""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


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


class Pruned(FinetuneError):
    """A sweep ends this run early: others are better at the same epoch."""


class Stopped(BaseException):
    """A signal asked the process to end; everything is written first."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean ...?` for a misspelt name, or nothing where no choice is near."""
    near = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it, the first SIGINT or SIGTERM raises `Stopped`; later ones wait for the clean-up.

    Handlers are put back at the end. Outside the main thread, where Python has no handlers, it
    does nothing.
    """

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signum)

    try:
        before = {signum: signal.signal(signum, stop) for signum in STOP_SIGNALS}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run_door(door: Callable[[], int | None]) -> NoReturn:
    """Call a command's main function and end the process as its outcome says.

    A `FinetuneError` prints its message alone, without a traceback. `Stopped` ends the process by
    the same signal, so that a shell shows 130 or 143 and W&B's agent sees no failure.
    """
    try:
        with stoppable():
            sys.exit(door() or 0)
    except FinetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output is gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Stopped as stop:
        print(str(stop), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(stop.signum, signal.SIG_DFL)
        os.kill(os.getpid(), stop.signum)
        raise
