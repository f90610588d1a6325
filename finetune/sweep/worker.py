"""One trial's process, from the inside.

Turns a job, a config and a run directory, into a run that tells its parent of every epoch and of
its end. A parent that is gone ends it in good order. Knows nothing about sweeps, keys or storages.

    >>> Process(target=work, args=(connection, job, dict(os.environ), 1))  # doctest: +SKIP
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from finetune.config.fields import RunConfig
from finetune.runs.result import Row
from finetune.runs.run_dir import RunDir
from finetune.system.errors import FinetuneError, Pruned, Stopped, failure_of
from finetune.system.resources import shortage
from finetune.system.shutdown import stoppable
from finetune.system.text import message

OUTPUT_NAME = "output.log"
"""Inside a run directory: what the run printed."""

_LOCK_SECONDS = 60.0  # how long a run directory is waited for: its last holder may be failure_of


@dataclass(frozen=True)
class Job:
    """One run for a worker."""

    config: RunConfig
    run_dir: Path
    is_judged: bool
    """The run waits for an answer after each epoch: why it should end, or None."""


@dataclass(frozen=True)
class EpochEnded:
    """A worker's run has finished an epoch."""

    row: Row


@dataclass(frozen=True)
class TrialEnded:
    """A worker's run has ended: finished, pruned, failed, stopped, starved (the machine has run out
    of something, which is not the run's fault), or died with its process."""

    state: str
    reason: str = ""


Event = EpochEnded | TrialEnded


def work(connection: Connection, job: Job, environment: dict[str, str], num_workers: int) -> None:
    """A child's life: carry out the job, tell the parent, end."""
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)  # which the server ignores
    os.setpgid(0, 0)  # Ctrl-C is the parent's: it asks its workers to stop
    os.environ.clear()
    os.environ.update(environment)
    with stoppable():
        try:
            job.run_dir.mkdir(parents=True, exist_ok=True)
            _redirect_output(job.run_dir / OUTPUT_NAME)
            with _own_temporary_files():
                end = _carry_out(connection, job, num_workers)
        except Stopped as stop:
            end = TrialEnded("stopped", str(stop))
        except Exception as error:
            end = _failure(error)
    _tell(connection, end)


@contextmanager
def _own_temporary_files() -> Iterator[None]:
    """Removed at the end: a child ends without the clean-up that Python does at its exit."""
    with tempfile.TemporaryDirectory(prefix="trial-", ignore_cleanup_errors=True) as place:
        tempfile.tempdir = place
        yield


def _carry_out(connection: Connection, job: Job, num_workers: int) -> TrialEnded:
    answers = _listen(connection)

    def on_epoch(row: Row) -> None:
        _tell(connection, EpochEnded(row))
        if job.is_judged and (reason := answers.get()) is not None:
            raise Pruned(reason)

    try:
        import torch

        from finetune.training.train import run

        if num_workers > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // num_workers))
        run(job.config, RunDir(job.run_dir, wait_seconds=_LOCK_SECONDS), on_epoch)
    except Pruned as pruned:
        return TrialEnded("pruned", str(pruned))
    return TrialEnded("finished")


def _failure(error: Exception) -> TrialEnded:
    """How an error ends a run, after a word in its output where there is room for it."""
    short = shortage(error)
    with suppress(OSError):
        if short or isinstance(error, FinetuneError):
            print(f"error: {message(short or error)}", flush=True)
        else:
            traceback.print_exception(error)
    return (
        TrialEnded("starved", str(short))
        if short
        else TrialEnded("failed", failure_of(error).reason)
    )


def _tell(connection: Connection, event: Event) -> None:
    with suppress(OSError):  # the parent is gone; the directory tells
        connection.send(event)


def _listen(connection: Connection) -> queue.Queue[str | None]:
    """The parent's answers; when the parent is gone, this process is asked to stop."""
    answers: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        try:
            while True:
                answers.put(connection.recv())
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    return answers


def _redirect_output(path: Path) -> None:
    """Everything that is printed, by libraries and a crash too, goes to a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
