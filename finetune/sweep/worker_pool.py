"""Child processes, one a trial, from a fork server that has the heavy imports done.

Turns jobs into processes and what they tell into events. A crash costs the trial alone. Knows
nothing about sweeps, keys or storages.

    >>> worker_pool = WorkerPool(num_workers=2); worker_pool.start(job)  # doctest: +SKIP
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.sweep.worker import OUTPUT_NAME, Event, Job, TrialEnded, work
from finetune.system.devices import visible_devices
from finetune.system.resources import require_handles

STOP_SECONDS = 40.0
"""What a worker is granted, once asked to stop, to write and send everything."""

_WANDB_MODULES = ("wandb", "wandb.plot", "wandb.sdk.launch")  # init imports the last one late
_NUM_HANDLES = 12  # more than a start takes; one that is cut short ends the fork server


@dataclass(eq=False)
class Worker:
    """A child process and its end of the connection."""

    job: Job
    process: ForkServerProcess
    connection: Connection
    slot: int
    started: float = field(default_factory=time.perf_counter)

    def answer(self, reason: str | None) -> None:
        """Tell a judged run to go on, or why to end."""
        with suppress(OSError):  # it has ended meanwhile; its sentinel tells
            self.connection.send(reason)


class WorkerPool:
    """Up to `num_workers` child processes, each with its share of the threads and its device."""

    def __init__(self, num_workers: int, devices: list[str] | None = None) -> None:
        self.num_workers = num_workers
        self._devices = visible_devices() if devices is None else devices
        self._workers: dict[int, Worker] = {}
        self._leaving: list[ForkServerProcess] = []
        _start_fork_server()

    @property
    def has_room(self) -> bool:
        return len(self._workers) < self.num_workers

    @property
    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    def start(self, job: Job) -> Worker:
        require_handles(_NUM_HANDLES)
        slot = next(i for i in range(self.num_workers) if i not in self._workers)
        environment = dict(os.environ)
        # The caller's own W&B service would go on holding the run of a trial that was killed.
        environment.pop("WANDB_SERVICE", None)
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[slot % len(self._devices)]
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("forkserver").Process(
            target=work,
            args=(theirs, job, environment, self.num_workers),
            name=job.run_dir.name,
            daemon=True,
        )
        with _nothing_of_the_caller():
            process.start()
        theirs.close()
        worker = Worker(job, process, ours, slot)
        self._workers[slot] = worker
        return worker

    def events(self, timeout: float) -> Iterator[tuple[Worker, Event]]:
        """What the workers tell within `timeout` seconds; a dead one's end is told for it."""
        sources: list[Any] = [w.connection for w in self.workers]
        sources += [w.process.sentinel for w in self.workers]
        ready = wait(sources, timeout) if sources else []
        for worker in self.workers:
            if worker.connection in ready or worker.process.sentinel in ready:
                event: Event
                try:
                    event = worker.connection.recv()
                except (EOFError, OSError):
                    event = self._death(worker)
                if isinstance(event, TrialEnded):
                    self._release(worker)
                yield worker, event

    def _death(self, worker: Worker) -> TrialEnded:
        worker.process.join()
        code = worker.process.exitcode or 0
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return TrialEnded(
            "died", f"its process ended by {cause}; see {worker.job.run_dir / OUTPUT_NAME}"
        )

    def _release(self, worker: Worker) -> None:
        """Free a worker's place; its process takes a moment more to leave."""
        del self._workers[worker.slot]
        worker.connection.close()
        self._leaving = [process for process in self._leaving if process.is_alive()]
        self._leaving.append(worker.process)
        if self._devices:  # its memory must be free for the next one
            worker.process.join()

    def close(self) -> None:
        """Wait until the last processes have left."""
        for process in self._leaving:
            process.join()

    def stop(self) -> list[Worker]:
        """Ask every worker to stop, wait until all have; those that were running."""
        stopped = self.workers
        for worker in stopped:
            worker.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in stopped:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.exitcode is None:
                worker.process.kill()
            self._release(worker)
        return stopped


def _start_fork_server() -> None:
    """Start importing in the background; nothing there computes, so that no thread is forked."""
    modules = ["finetune.sweep.preload"]
    if os.environ.get("WANDB_MODE") != "disabled":
        modules += _WANDB_MODULES
    multiprocessing.set_forkserver_preload(modules)
    with _startable(), _nothing_of_the_caller():
        forkserver.ensure_running()


@contextmanager
def _nothing_of_the_caller() -> Iterator[None]:
    """Children would import the caller's script, and run it again where it has no guard; and W&B
    records their arguments, among which a storage's password may be."""
    main, arguments = sys.modules["__main__"], sys.argv
    sys.modules["__main__"], sys.argv = ModuleType("__main__"), arguments[:1]
    try:
        yield
    finally:
        sys.modules["__main__"], sys.argv = main, arguments


@contextmanager
def _startable() -> Iterator[None]:
    """The server finds this package, and Ctrl-C in its imports is the parent's affair."""
    path = os.environ.get("PYTHONPATH")
    package_dir = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([package_dir, *([path] if path else [])])
    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread
        handler = None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
