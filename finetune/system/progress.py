"""Progress of what takes longer than a second, on the terminal.

Turns (what, total) into a bar that a terminal shows and a log leaves out. Knows nothing about what
is being done.

    >>> done = bar("decoding train/", 100)  # doctest: +SKIP
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from finetune.system.shutdown import defer_stop

if TYPE_CHECKING:
    from rich.progress import Progress

StartProgress = Callable[[str, int], Callable[[], None]]
"""(what, total) -> a function that is called once for each one done."""


def no_progress(what: str, total: int) -> Callable[[], None]:
    return lambda: None


PATIENCE_SECONDS = 1.0
LINE_SECONDS = 10.0


_unfinished: list[Progress] = []


@contextmanager
def close_bars() -> Iterator[None]:
    """At its end no bar is left on the terminal, nor its cursor hidden, whatever broke off."""
    try:
        yield
    finally:
        while _unfinished:
            _unfinished.pop().stop()


def bar(what: str, total: int) -> Callable[[], None]:
    """A function to call once for each one done, from any thread.

    A terminal sees a bar once a second has passed; elsewhere one line says what was done and how
    long it took, if it took longer than that.
    """
    started = time.perf_counter()
    count = 0
    lock = threading.Lock()
    shown: list[Callable[[int], None]] = []

    def done() -> None:
        nonlocal count
        with lock:
            count += 1
            seconds = time.perf_counter() - started
            if count == total and not shown and seconds > PATIENCE_SECONDS:
                print(f"{what}: {total} in {seconds:.0f} s", flush=True)
            elif not shown and seconds > PATIENCE_SECONDS and sys.stderr.isatty():
                shown.append(_rich_bar(what, total))
            if shown:
                shown[0](count)

    return done


def _rich_bar(what: str, total: int) -> Callable[[int], None]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = progress.add_task(what, total=total)
    with defer_stop():  # one that is half started can't be stopped
        _unfinished.append(progress)
        progress.start()

    def show(count: int) -> None:
        progress.update(task, completed=count)
        if count == total and progress in _unfinished:
            _unfinished.remove(progress)
            progress.stop()

    return show


@contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Within it, a function to call with (bytes so far, bytes in all, if known).

    A terminal sees a bar with rate and remaining time, anything else a line now and then.
    """
    if not sys.stderr.isatty():
        yield _byte_lines(what)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=None)
        yield lambda position, total: progress.update(task, completed=position, total=total)


def _byte_lines(what: str) -> Callable[[int, int | None], None]:
    said = time.perf_counter()

    def show(position: int, total: int | None) -> None:
        nonlocal said
        if time.perf_counter() - said > LINE_SECONDS:
            said = time.perf_counter()
            share = f" of {total / 1e6:.1f} MB ({position / total:.0%})" if total else " MB"
            print(f"{what}: {position / 1e6:.1f}{share}", flush=True)

    return show
