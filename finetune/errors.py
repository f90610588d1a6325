"""What can go wrong at a user's hands, and how a process then ends.

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
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import FrameType
from typing import ClassVar, NoReturn

from finetune.progress import bars_end


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


PREEMPTION_SIGNAL = signal.SIGUSR1
"""What schedulers send before they take the machine (Slurm: --signal=USR1@120)."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, PREEMPTION_SIGNAL)


class _Stop:
    """The handler of `STOP_SIGNALS`: the first to come raises `Stopped`, later ones do nothing.

    It remembers that itself: a Trainer puts the handlers back that it has found, also on its way
    out from a stop.
    """

    active: ClassVar[_Stop | None] = None

    def __init__(self) -> None:
        self._has_raised = False
        self._waiting: list[int] | None = None

    def __call__(self, signum: int, frame: FrameType | None = None) -> None:
        if self._waiting is not None:
            self._waiting.append(signum)
        elif not self._has_raised:
            self._has_raised = True
            raise Stopped(signum)

    @property
    def has_come(self) -> bool:
        return self._has_raised or bool(self._waiting)

    @contextmanager
    def held_off(self) -> Iterator[None]:
        if self._waiting is not None:
            yield
            return
        came = self._waiting = []
        try:
            yield
        finally:
            self._waiting = None
            for signum in came:
                self(signum)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it, the first of `STOP_SIGNALS` raises `Stopped`; later ones wait for the clean-up.

    Handlers are put back at the end. It does nothing within another `stoppable`, whose clean-up it
    is a part of, and outside the main thread, where Python has no handlers.
    """
    if _Stop.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    _Stop.active = stop = _Stop()
    try:
        for signum in STOP_SIGNALS:
            signal.signal(signum, stop)
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _Stop.active = None


@contextmanager
def undivided() -> Iterator[None]:
    """Within it, a stop waits for the end: what belongs together is written together."""
    stop = _Stop.active
    if stop is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with stop.held_off():
        yield


def is_stopping() -> bool:
    """Whether a stop has come: the process cleans up, or will once `undivided` has ended."""
    return _Stop.active is not None and _Stop.active.has_come


def message(error: BaseException) -> str:
    """What an error says, its own line breaks kept, as a terminal may show it."""
    return "\n".join(map(one_line, str(error).split("\n")))


def run_door(door: Callable[[], int | None]) -> NoReturn:
    """Call a command's main function and end the process as its outcome says.

    A `FinetuneError` prints its message alone, without a traceback. `Stopped` ends the process by
    the same signal, so that a shell shows 130 or 143 and W&B's agent sees no failure.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may hold what no encoding has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with stoppable(), bars_end():
            code = door() or 0
            sys.stdout.flush()
            sys.exit(code)
    except FinetuneError as error:
        print(f"error: {message(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output is gone (`| head`)
        _discard_output()
        sys.exit(1)
    except Exception as error:
        if (short := shortage(error)) is None:
            raise
        print(f"error: {short}", file=sys.stderr)
        _discard_output()  # it may be what the disk has no room for
        sys.exit(short.exit_code)
    except Stopped as stop:
        print(str(stop), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(stop.signum, signal.SIG_DFL)
        os.kill(os.getpid(), stop.signum)
        raise


def _discard_output() -> None:
    """Nothing more can be written there; Python's own last flush would change the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
