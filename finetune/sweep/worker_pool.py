"""Child processes that run the trials, forked from a server that has made the imports."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.sweep.worker import OUTPUT_NAME, Event, Job, TrialEnded, work
from finetune.system.devices import assigned_device, worker_devices
from finetune.system.resources import require_handles
from finetune.system.shutdown import STOP_SIGNALS

STOP_SECONDS = 40.0
"""How long a worker that is asked to stop may take to write and send everything."""

EXIT_SECONDS = 30.0
"""How long a worker whose run has ended may take to exit."""

_WANDB_MODULES = ("wandb", "wandb.plot", "wandb.sdk.launch")  # init imports the last one late
_NUM_HANDLES = 12  # more than a start needs; if it fails midway, the fork server ends


@dataclass(eq=False)
class Worker:
    """A child process and the connection to it."""

    job: Job
    process: ForkServerProcess
    connection: Connection
    slot: int
    started: float = field(default_factory=time.perf_counter)
    unfinished: set[int] = field(default_factory=set)
    """The indices of its runs that have not ended."""

    def __post_init__(self) -> None:
        self.unfinished |= set(range(len(self.job.configs)))

    def answer(self, reason: str | None) -> None:
        """Send a judged run the reason why it should end, or None."""
        with suppress(OSError):  # it has ended meanwhile, which is an event of its own
            self.connection.send(reason)


class WorkerPool:
    """Up to `num_workers` child processes, each with its share of the threads and its device."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._devices = worker_devices()
        self._slots = list(range(num_workers))
        self._workers: dict[int, Worker] = {}
        self._exiting: list[ForkServerProcess] = []
        _start_fork_server()

    @property
    def has_room(self) -> bool:
        return len(self._workers) < len(self._slots)

    def retire(self, worker: Worker) -> bool:
        """Use the slot of a worker that has ended no more; whether others are left."""
        self._slots.remove(worker.slot)
        return bool(self._slots)

    def start(self, job: Job) -> Worker:
        """Start a process for a job. Raises `OSError` without file handles."""
        require_handles(_NUM_HANDLES)
        slot = next(i for i in self._slots if i not in self._workers)
        environment = dict(os.environ)
        # The W&B service of this process would keep the run of a killed trial open.
        environment.pop("WANDB_SERVICE", None)
        num_sharing = 1
        if self._devices:
            device, num_sharing = assigned_device(self._devices, self.num_workers, slot)
            environment["CUDA_VISIBLE_DEVICES"] = device
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("forkserver").Process(
            target=work, args=(theirs, job, environment, self.num_workers, num_sharing), daemon=True
        )
        with _without_main_module():
            process.start()
        theirs.close()
        self._workers[slot] = Worker(job, process, ours, slot)
        return self._workers[slot]

    def events(self, timeout: float) -> Iterator[tuple[Worker, int, Event]]:
        """The events within `timeout` seconds, of a worker's run; a crash is a `TrialEnded` too."""
        workers = list(self._workers.values())
        sources: list[Any] = [s for w in workers for s in (w.connection, w.process.sentinel)]
        ready = wait(sources, timeout)
        for worker in workers:
            if worker.connection in ready or worker.process.sentinel in ready:
                try:
                    events: list[tuple[int, Event]] = [worker.connection.recv()]
                except (EOFError, OSError):
                    crash = _crash(worker)
                    events = [(index, crash) for index in sorted(worker.unfinished)]
                for index, event in events:
                    if isinstance(event, TrialEnded):
                        worker.unfinished.discard(index)
                        if not worker.unfinished:
                            self._release(worker)
                    yield worker, index, event

    def _release(self, worker: Worker) -> None:
        """Free a worker's slot; its process may still be exiting."""
        del self._workers[worker.slot]
        worker.connection.close()
        self._exiting = [process for process in self._exiting if process.is_alive()]
        self._exiting.append(worker.process)
        if self._devices:  # the next worker needs its GPU memory
            _join(worker.process)

    def stop(self) -> list[Worker]:
        """Stop all workers, wait until their processes have exited, and return the workers."""
        stopped = list(self._workers.values())
        for worker in stopped:
            worker.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in stopped:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.exitcode is None:
                worker.process.kill()
            self._release(worker)
        for process in self._exiting:
            _join(process)
        return stopped


def _join(process: ForkServerProcess) -> None:
    """Wait until a process has exited; one that hangs, as in a GPU's driver, is killed."""
    process.join(EXIT_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join(EXIT_SECONDS)


def _crash(worker: Worker) -> TrialEnded:
    worker.process.join()
    code = worker.process.exitcode or 0
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    reason = f"its process ended by {cause}; see {worker.job.run_dirs[0] / OUTPUT_NAME}"
    return TrialEnded("crashed", reason)


def _start_fork_server() -> None:
    """Start the server, which makes its imports in the background."""
    modules = ["finetune.sweep.preload"]
    if os.environ.get("WANDB_MODE") != "disabled":
        modules += _WANDB_MODULES
    multiprocessing.set_forkserver_preload(modules)
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), path]))
    resource_tracker.ensure_running()  # it would unblock signals
    # Blocked in the server too, until `preload` ignores them: Ctrl-C must not interrupt its start.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with _without_main_module():
            forkserver.ensure_running()
    finally:
        os.environ["PYTHONPATH"] = path  # if empty, it is ignored
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Hide the caller's script and its arguments from child processes.

    They would import the script, and run it again if it has no guard; and W&B records the
    arguments, which may include a storage's password.
    """
    main, arguments = sys.modules["__main__"], sys.argv
    sys.modules["__main__"], sys.argv = ModuleType("__main__"), arguments[:1]
    try:
        yield
    finally:
        sys.modules["__main__"], sys.argv = main, arguments
