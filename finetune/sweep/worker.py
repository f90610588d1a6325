"""The child process of one trial, or of several that train their heads together.

It carries out their runs and reports to the sweep's process.
"""

import os
import queue
import signal
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from finetune.config.fields import RunConfig
from finetune.runs.result import Row, failure_of
from finetune.runs.run_dir import RunDir
from finetune.system.errors import DeviceError, FinetuneError, Pruned, Stopped
from finetune.system.progress import show_details
from finetune.system.resources import shortage
from finetune.system.shutdown import stoppable
from finetune.system.text import message, one_line

OUTPUT_NAME = "output.log"
"""The file in a run directory that holds what the run printed."""

_LOCK_SECONDS = 60.0  # a process that used the run directory before may still be ending


@dataclass(frozen=True)
class Job:
    """The runs of a worker: one, or several that have the same `head_group`."""

    configs: tuple[RunConfig, ...]
    run_dirs: tuple[Path, ...]
    is_judged: bool
    """After each epoch the run waits for the reason why it should end, or None."""


@dataclass(frozen=True)
class TrialEnded:
    """The end of a run."""

    state: str
    """As in `Failure`, or finished, crashed (its process has), out of resources, or without device
    (the GPU that it was given can't be used)."""
    reason: str = ""


Event = Row | TrialEnded  # of each run: the metrics of each epoch, then the end


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
    execution = _JobExecution(connection, job)
    with stoppable():
        try:
            for path in job.run_dirs:
                path.mkdir(parents=True, exist_ok=True)
            _redirect_output(job.run_dirs[0] / OUTPUT_NAME)
            # A child process ends without Python's exit handlers, which remove temporary files.
            with tempfile.TemporaryDirectory(prefix="trial-", ignore_cleanup_errors=True) as place:
                tempfile.tempdir = place
                _use_share(job, num_workers, num_sharing)
                execution.run()
            end = TrialEnded("finished")
        except (Stopped, Exception) as error:
            end = _end_by(error)
    for i in sorted(execution.unfinished):
        execution.send(i, end)


def _use_share(job: Job, num_workers: int, num_sharing: int) -> None:
    """Limit threads and GPU memory to this worker's share."""
    import torch

    show_details()
    if num_sharing > 1 and job.configs[0].accelerator != "cpu":
        from finetune.system.cuda import use_share_of_memory

        use_share_of_memory(num_sharing)
    if num_workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_workers))


class _JobExecution:
    """Carries out a job's runs and sends their events, each with the index of its run."""

    def __init__(self, connection: Connection, job: Job) -> None:
        self._connection, self._job = connection, job
        self._answers: queue.Queue[str | None] = queue.Queue()
        self.unfinished = set(range(len(job.configs)))
        """The runs whose end has not been sent."""

    def run(self) -> None:
        self._receive_answers()
        run_dirs = [RunDir(path, wait_seconds=_LOCK_SECONDS) for path in self._job.run_dirs]
        if len(run_dirs) == 1:
            from finetune.training.train import run

            run(self._job.configs[0], run_dirs[0], partial(self._on_epoch, 0))
            return
        from finetune.training.together import run_together

        logs = [partial(_append, run_dir.path / OUTPUT_NAME) for run_dir in run_dirs]
        run_together(self._job.configs, run_dirs, logs, self._on_epoch, self._on_end)

    def _on_end(self, index: int, error: Exception | None) -> None:
        self.send(index, _end_by(error) if error else TrialEnded("finished"))

    def _on_epoch(self, index: int, row: Row) -> None:
        self.send(index, row)
        if self._job.is_judged and (reason := self._answers.get()) is not None:
            raise Pruned(reason)

    def send(self, index: int, event: Event) -> None:
        if isinstance(event, TrialEnded):
            self.unfinished.discard(index)
        with suppress(OSError):  # the parent has ended; the run directory holds the result
            self._connection.send((index, event))

    def _receive_answers(self) -> None:
        """Queue the answers of the parent; when it has ended, this process is stopped."""

        def receive() -> None:
            with suppress(EOFError, OSError):
                while True:
                    self._answers.put(self._connection.recv())
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=receive, daemon=True).start()


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


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        print(one_line(line), file=file)


def _redirect_output(path: Path) -> None:
    """Write all output to a file, that of libraries and crashes included."""
    with path.open("ab") as file:
        for stream, standard in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(file.fileno(), standard)
