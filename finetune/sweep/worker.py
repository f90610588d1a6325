"""The child process of one trial: it carries out a run and reports to the sweep's process."""

import os
import queue
import signal
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from finetune.config.fields import RunConfig
from finetune.runs.result import Row, failure_of
from finetune.runs.run_dir import RunDir
from finetune.system.errors import DeviceError, FinetuneError, Pruned, Stopped
from finetune.system.progress import show_details
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
class TrialEnded:
    """The end of a worker's run."""

    state: str
    """As in `Failure`, or finished, crashed (its process has), out of resources, or without device
    (the GPU that it was given can't be used)."""
    reason: str = ""


Event = Row | TrialEnded  # the metrics of each epoch, then the end


def work(
    connection: Connection,
    job: Job,
    environment: dict[str, str],
    num_workers: int,
    num_sharing: int = 1,
) -> None:
    """The main function of a child process; `num_sharing` of them use its GPU."""
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)  # the fork server ignores them
    os.setpgid(0, 0)  # on Ctrl-C, the parent stops its workers
    os.environ.clear()
    os.environ.update(environment)
    with stoppable():
        try:
            job.run_dir.mkdir(parents=True, exist_ok=True)
            _redirect_output(job.run_dir / OUTPUT_NAME)
            # A child process ends without Python's exit handlers, which remove temporary files.
            with tempfile.TemporaryDirectory(prefix="trial-", ignore_cleanup_errors=True) as place:
                tempfile.tempdir = place
                _run(connection, job, num_workers, num_sharing)
            end = TrialEnded("finished")
        except (Stopped, Exception) as error:
            end = _end_by(error)
    _send(connection, end)


def _run(connection: Connection, job: Job, num_workers: int, num_sharing: int) -> None:
    answers = _receive_answers(connection)

    def on_epoch(row: Row) -> None:
        _send(connection, row)
        if job.is_judged and (reason := answers.get()) is not None:
            raise Pruned(reason)

    import torch

    from finetune.training.train import run

    show_details()
    if num_sharing > 1 and job.config.accelerator != "cpu":
        from finetune.system.cuda import use_share_of_memory

        use_share_of_memory(num_sharing)
    if num_workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_workers))
    run(job.config, RunDir(job.run_dir, wait_seconds=_LOCK_SECONDS), on_epoch)


def _end_by(error: BaseException) -> TrialEnded:
    """How an exception ends a run; a failure is printed."""
    failure = failure_of(error)
    if failure.state != "failed":
        return TrialEnded(failure.state, failure.reason)
    short = shortage(error)
    with suppress(OSError):  # the disk may be full
        if short or isinstance(error, FinetuneError):
            print(f"error: {message(short or error)}", flush=True)
        else:
            traceback.print_exception(error)
    if short:
        return TrialEnded("out of resources", str(short))
    if isinstance(error, DeviceError):
        return TrialEnded("without device", failure.reason)
    return TrialEnded("failed", failure.reason)


def _send(connection: Connection, event: Event) -> None:
    with suppress(OSError):  # the parent has ended; the run directory holds the result
        connection.send(event)


def _receive_answers(connection: Connection) -> queue.Queue[str | None]:
    """The answers of the parent; when the parent has ended, this process is stopped."""
    answers: queue.Queue[str | None] = queue.Queue()

    def receive() -> None:
        with suppress(EOFError, OSError):
            while True:
                answers.put(connection.recv())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=receive, daemon=True).start()
    return answers


def _redirect_output(path: Path) -> None:
    """Write all output to a file, that of libraries and crashes included."""
    with path.open("ab") as file:
        for stream, standard in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(file.fileno(), standard)
