"""How a process ends: at its end, by a message, or by a signal once everything is written.

Turns the first stop signal into `Stopped`, and a command's outcome into the process's own end.
Knows nothing about what is being stopped.

    >>> with stoppable(): ...  # doctest: +SKIP
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar, NoReturn

from finetune.system.errors import PREEMPTION_SIGNAL, FinetuneError, Stopped
from finetune.system.resources import shortage
from finetune.system.text import message

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
    def deferred(self) -> Iterator[None]:
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
def defer_stop() -> Iterator[None]:
    """Within it, a stop waits for the end: what belongs together is written together."""
    stop = _Stop.active
    if stop is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with stop.deferred():
        yield


def is_stopping() -> bool:
    """Whether a stop has come: the process cleans up, or will once `defer_stop` has ended."""
    return _Stop.active is not None and _Stop.active.has_come


def run_cli(door: Callable[[], int | None]) -> NoReturn:
    """Call a command's main function and end the process as its outcome says.

    A `FinetuneError` prints its message alone, without a traceback. `Stopped` ends the process by
    the same signal, so that a shell shows 130 or 143 and W&B's agent sees no failure.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may hold what no encoding has
        sys.stdout.reconfigure(errors="backslashreplace")
    with stoppable():  # to the very end: a second Ctrl-C finds the first one at work
        try:
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
