"""The child process of one trial: it carries out a run and reports to the sweep's process."""

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
from finetune.runs.result import Row, failure_of
from finetune.runs.run_dir import RunDir
from finetune.system.errors import FinetuneError, Pruned, Stopped
from finetune.system.resources import shortage
from finetune.system.shutdown import stoppable
from finetune.system.text import message

OUTPUT_NAME = "output.log"
"""The file in a run directory that holds what the run printed."""

_LOCK_SECONDS = 60.0  # a process that used the run directory before may still be ending


@dataclass(frozen=True)
class Job:
    """A run for a worker."""

    config: RunConfig
    run_dir: Path
    is_judged: bool
    """After each epoch the run waits for the reason why it should end, or None."""


@dataclass(frozen=True)
class EpochEnded:
    """A worker's run has finished an epoch."""

    row: Row


@dataclass(frozen=True)
class TrialEnded:
    """A worker's run has ended.

    `state` is finished, pruned, failed, stopped (by a signal), crashed (with its process), or "out
    of resources" (of the machine, which is no fault of the run).
    """

    state: str
    reason: str = ""


Event = EpochEnded | TrialEnded


def work(connection: Connection, job: Job, environment: dict[str, str], num_workers: int) -> None:
    """The main function of a child process."""
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)  # the fork server ignores them
    os.setpgid(0, 0)  # on Ctrl-C, the parent stops its workers
    os.environ.clear()
    os.environ.update(environment)
    with stoppable():
        try:
            job.run_dir.mkdir(parents=True, exist_ok=True)
            _redirect_output(job.run_dir / OUTPUT_NAME)
            with _temporary_directory():
                end = _run(connection, job, num_workers)
        except Stopped as stop:
            end = TrialEnded("stopped", str(stop))
        except Exception as error:
            end = _failed(error)
    _send(connection, end)


@contextmanager
def _temporary_directory() -> Iterator[None]:
    """For all temporary files, because a child process ends without Python's exit handlers."""
    with tempfile.TemporaryDirectory(prefix="trial-", ignore_cleanup_errors=True) as place:
        tempfile.tempdir = place
        yield


def _run(connection: Connection, job: Job, num_workers: int) -> TrialEnded:
    answers = _receive_answers(connection)

    def on_epoch(row: Row) -> None:
        _send(connection, EpochEnded(row))
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


def _failed(error: Exception) -> TrialEnded:
    """The end of a run by an exception, which is printed if the disk has space for it."""
    short = shortage(error)
    with suppress(OSError):
        if short or isinstance(error, FinetuneError):
            print(f"error: {message(short or error)}", flush=True)
        else:
            traceback.print_exception(error)
    if short:
        return TrialEnded("out of resources", str(short))
    return TrialEnded("failed", failure_of(error).reason)


def _send(connection: Connection, event: Event) -> None:
    with suppress(OSError):  # the parent has ended; the run directory holds the result
        connection.send(event)


def _receive_answers(connection: Connection) -> queue.Queue[str | None]:
    """The answers of the parent; when the parent has ended, this process is stopped."""
    answers: queue.Queue[str | None] = queue.Queue()

    def receive() -> None:
        try:
            while True:
                answers.put(connection.recv())
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=receive, daemon=True).start()
    return answers


def _redirect_output(path: Path) -> None:
    """Write all output to a file, that of libraries and crashes included."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
