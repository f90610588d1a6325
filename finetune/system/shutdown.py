"""Stop signals, and how a command ends its process: by an exit code or by the signal."""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar, NoReturn

from finetune.system.errors import FinetuneError, Stopped
from finetune.system.resources import shortage
from finetune.system.text import message

PREEMPTION_SIGNAL = signal.SIGUSR1
"""What schedulers send before they take the machine (Slurm: --signal=USR1@120)."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, PREEMPTION_SIGNAL)


class _Stop:
    """The handler of `STOP_SIGNALS`: the first signal raises `Stopped`, later ones do nothing.

    The handler itself counts them, because a Trainer that is stopped restores the handlers that it
    has found.
    """

    active: ClassVar["_Stop | None"] = None

    def __init__(self) -> None:
        self.has_raised = False
        self.deferred: list[int] | None = None
        self.unraisablehook = sys.unraisablehook

    def __call__(self, signum: int, frame: FrameType | None = None) -> None:
        if self.deferred is not None:
            self.deferred.append(signum)
        elif not self.has_raised:
            self.has_raised = True
            raise Stopped(signum)

    def on_unraisable(self, dropped: "sys.UnraisableHookArgs") -> None:
        """Python drops what is raised while an object is freed: send that signal once more."""
        if not isinstance(dropped.exc_value, Stopped):
            self.unraisablehook(dropped)
            return
        self.has_raised = False
        main, signum = threading.main_thread().ident, dropped.exc_value.signum
        threading.Timer(0.01, signal.pthread_kill, (main, signum)).start()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it, the first of `STOP_SIGNALS` raises `Stopped`; later ones are ignored.

    The previous handlers are restored at the end. Within another `stoppable` it does nothing, nor
    outside the main thread, where Python runs no handlers.
    """
    if _Stop.active or not _in_main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    _Stop.active = stop = _Stop()
    try:
        for signum in STOP_SIGNALS:
            signal.signal(signum, stop)
        sys.unraisablehook = stop.on_unraisable
        yield
    finally:
        sys.unraisablehook = stop.unraisablehook
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _Stop.active = None


@contextmanager
def defer_stop() -> Iterator[None]:
    """Within it, a stop is deferred to the end: what belongs together is written together."""
    stop = _Stop.active
    if stop is None or stop.deferred is not None or not _in_main_thread():
        yield
        return
    signums = stop.deferred = []
    try:
        yield
    finally:
        stop.deferred = None
        for signum in signums:
            stop(signum)


def is_stopping() -> bool:
    """Whether a stop signal has arrived, also one that `defer_stop` still defers."""
    stop = _Stop.active
    return stop is not None and (stop.has_raised or bool(stop.deferred))


def run_cli(command: Callable[[], int | None]) -> NoReturn:
    """Call a command's main function and end the process with its exit code.

    A `FinetuneError` prints its message alone, without a traceback. `Stopped` ends the process by
    the same signal, so that a shell shows 130 or 143 and W&B's agent sees no failure.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may hold bytes without an encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    with stoppable():  # to the very end: a second Ctrl-C must not interrupt the first
        try:
            code = command() or 0
            sys.stdout.flush()
            sys.exit(code)
        except FinetuneError as error:
            print(f"error: {message(error)}", file=sys.stderr)
            sys.exit(error.exit_code)
        except BrokenPipeError:  # the reader of the output has closed it (`| head`)
            _discard_output()
            sys.exit(1)
        except Exception as error:
            if (short := shortage(error)) is None:
                raise
            print(f"error: {short}", file=sys.stderr)
            _discard_output()  # it may be what fills the disk
            sys.exit(short.exit_code)
        except Stopped as stop:
            print(str(stop), file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            signal.signal(stop.signum, signal.SIG_DFL)
            os.kill(os.getpid(), stop.signum)
            raise


def _discard_output() -> None:
    """Nothing more can be written to it, and Python's last flush would change the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
