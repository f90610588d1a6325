"""Progress bars on a terminal, and lines in a log, for whatever takes longer than a second."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from finetune.system.shutdown import defer_stop

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

StartProgress = Callable[[str, int], Callable[[], None]]
"""(what, total) -> a function to call once for each item done."""

PATIENCE_SECONDS = 1.0
LINE_SECONDS = 10.0

_running: list[Progress] = []


def show_details() -> None:
    """Print what the package logs as details."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("finetune").setLevel(logging.INFO)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, where no line can replace another."""
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def no_progress(what: str, total: int) -> Callable[[], None]:
    return lambda: None


@contextmanager
def close_bars() -> Iterator[None]:
    """Remove all bars at the end and show the cursor again, whatever ended the context."""
    try:
        yield
    finally:
        while _running:
            _running.pop().stop()


def bar(what: str, total: int) -> Callable[[], None]:
    """A function to call once for each item done, from any thread.

    On a terminal a bar appears after a second. Elsewhere one line at the end says how long it took,
    if it took longer than that.
    """
    started, count, lock = time.perf_counter(), 0, threading.Lock()
    show: Callable[[int], None] | None = None

    def done() -> None:
        nonlocal count, show
        with lock:
            count += 1
            seconds = time.perf_counter() - started
            if show is None and seconds > PATIENCE_SECONDS:
                if count == total:
                    print(f"{what}: {total} in {seconds:.0f} s", flush=True)
                elif sys.stderr.isatty():
                    show = _start_bar(what, total)
            if show:
                show(count)

    return done


def _new_bar(*columns: ProgressColumn) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    label = TextColumn("{task.description}", markup=False)
    return Progress(
        label, BarColumn(), *columns, TimeRemainingColumn(), console=Console(stderr=True)
    )


def _start_bar(what: str, total: int) -> Callable[[int], None]:
    from rich.progress import MofNCompleteColumn

    progress = _new_bar(MofNCompleteColumn())
    task = progress.add_task(what, total=total)
    with defer_stop():  # a bar that is only half started could not be stopped
        _running.append(progress)
        progress.start()

    def show(count: int) -> None:
        progress.update(task, completed=count)
        if count == total and progress in _running:
            _running.remove(progress)
            progress.stop()

    return show


@contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Within it, a function to call with (bytes so far, total bytes if known).

    A terminal shows a bar with rate and remaining time, elsewhere a line appears now and then.
    """
    if sys.stderr.isatty():
        from rich.progress import DownloadColumn, TransferSpeedColumn

        with _new_bar(DownloadColumn(), TransferSpeedColumn()) as progress:
            task = progress.add_task(what, total=None)
            yield lambda position, total: progress.update(task, completed=position, total=total)
        return
    printed = time.perf_counter()

    def show(position: int, total: int | None) -> None:
        nonlocal printed
        if time.perf_counter() - printed > LINE_SECONDS:
            printed = time.perf_counter()
            share = f" of {total / 1e6:.1f} MB ({position / total:.0%})" if total else " MB"
            print(f"{what}: {position / 1e6:.1f}{share}", flush=True)

    yield show
