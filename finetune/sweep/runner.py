"""Run a sweep on this machine: claim trials, run them in worker processes, record how they end."""

import math
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune.config.fields import RunConfig
from finetune.runs.result import Row, RunResult, best_epoch, read_failure
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.sweep.checks import check_places
from finetune.sweep.retention import Retention
from finetune.sweep.spec import Sweep
from finetune.sweep.storage import sqlite_url, storage_errors_as_messages
from finetune.sweep.sweep_file import read_sweep
from finetune.sweep.table import LiveTable, final_table, open_console
from finetune.sweep.trial_queue import MAX_CRASHES, Claim, TrialQueue
from finetune.sweep.trials import RECORD_FIELDS, TrialResult
from finetune.sweep.worker import Event, Job, TrialEnded
from finetune.sweep.worker_pool import Worker, WorkerPool
from finetune.system.devices import worker_devices
from finetune.system.errors import ConfigError, FinetuneError, RunDirError, Shortage, Stopped
from finetune.system.shutdown import stoppable
from finetune.system.text import command_line, this_command

MAX_FIRST_FAILURES = 3
"""If this many trials are the first to end and all have failed, the sweep is stopped."""

_POLL_SECONDS = 1.0
_RESUME = "the sweep has ended; start it again once this is fixed"


def run_sweep(
    sweep: Sweep | Path | str | Mapping[str, Any],
    *,
    out: Path | str | None = None,
    workers: int | None = None,
    storage: str | None = None,
    max_runs: int | None = None,
    name: str | None = None,
    retry_failed: bool = False,
    keep_best: int | None = None,
    fields: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> list[TrialResult]:
    """Run a sweep here, resume it, or join it; return every trial's result, the best first.

    `sweep` is a sweep.yaml, a mapping with the same content, or a `Sweep`. Run directories go to
    `out` (default: the sweep's own `out`, else runs/), and so does the database NAME.db unless
    `storage` is given. `fields` are defaults for what the sweep does not set, such as data_dir.
    The default of `workers` is one per visible GPU, two per GPU of 40 GB or more, else 1. With
    `keep_best` only so many of the best trials, and each strategy's best, keep their checkpoints.

    Raises `ConfigError` for an invalid sweep, `DataError` or `WeightsError` if the data or weights
    of all trials are missing, `FinetuneError` if the first trials all fail, and
    `Stopped` on SIGINT, SIGTERM or SIGUSR1, after requeuing the running trials.
    """
    if not isinstance(sweep, Sweep):
        sweep = read_sweep(Path(sweep) if isinstance(sweep, str) else sweep)
    spec = sweep.amended(name, fields or {}, {} if out is None else {"out": str(out)})
    num_trials = spec.num_trials(max_runs)
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: got {workers}; must be an integer >= 1")
    check_places(spec)
    _make(spec.out_dir)
    where = storage or sqlite_url(spec.out_dir / f"{spec.slug}.db")
    with stoppable(), storage_errors_as_messages(where):
        live_table = LiveTable(num_trials, spec.metric.name, console)
        worker_pool = WorkerPool(workers or max(1, len(worker_devices())))
        with closing(TrialQueue(spec, where, num_trials)) as queue:
            if retry_failed and (num_requeued := queue.retry_failed()):
                live_table.log(f"trials to run again: {num_requeued}")
            retention = None if keep_best is None else Retention(keep_best)
            with live_table.display:
                _Runner(spec, queue, worker_pool, live_table, retention).run()
            results = queue.results()
            if retention is not None:
                retention.apply(results)
            return results


def sweep_command(sweep: Path, fields: Mapping[str, Any] | None = None, **options: Any) -> int:
    """`python -m finetune sweep`: run the sweep and print its results; returns the exit code.

    `fields` hold for all trials.
    """
    console, spec = open_console(), read_sweep(sweep, fields)
    for line in (spec.summary(), *spec.notes):
        console.print(line, soft_wrap=True)
    try:
        results = run_sweep(spec, console=console, **options)
    except Stopped:
        console.print(f"resume: {this_command()}", soft_wrap=True)
        raise
    code = conclude(results, spec.metric.name, console)
    for command in ("report", "confirm"):
        words = ("-m", "finetune", command, results[0].run_dir.parent)
        console.print(f"next: {command_line(*words)}", soft_wrap=True)
    return code


def conclude(results: list[TrialResult], metric: str, console: Console) -> int:
    """Print every trial; returns 0 if all have finished or were pruned, else 1."""
    console.print(final_table(results, metric))
    counts = Counter(result.state for result in results)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))
    if counts["failed"]:
        console.print("run it again with --retry_failed to retry the failed trials")
    return 0 if counts.keys() <= {"finished", "pruned"} else 1


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"{directory} can't be created: {error.strerror}"
        raise FinetuneError(f"out: {problem}; pass another --out") from None


@dataclass
class _Runner:
    spec: Sweep
    queue: TrialQueue
    worker_pool: WorkerPool
    live_table: LiveTable
    retention: Retention | None = None
    _claims: dict[Worker, Claim] = field(default_factory=dict)
    _end_states: list[str] = field(default_factory=list)
    _next_claim: float = 0.0  # when there was nothing to claim

    def run(self) -> None:
        """Run until every trial is done, here or elsewhere; on errors requeue the running ones."""
        self.live_table.update(self.queue.results())
        try:
            while True:
                self._start_trials()
                if self._claims:
                    for worker, event in self.worker_pool.events(_POLL_SECONDS):
                        self._handle(worker, event)
                elif self._is_over():
                    break
                else:
                    time.sleep(_POLL_SECONDS)
                self.queue.record_heartbeats()
                self.queue.refresh_if_due()
        finally:
            self._requeue_running()

    def _is_over(self) -> bool:
        if self.queue.is_complete():
            return True
        if machines := sorted(self.queue.unobservable()):
            self.live_table.log(
                f"trials are running on {', '.join(machines)}; a journal does not tell whether "
                "their processes are alive: if they have ended, run this again with --retry_failed"
            )
        return bool(machines)

    def _start_trials(self) -> None:
        while self.worker_pool.has_room and time.monotonic() >= self._next_claim:
            if claim := self.queue.claim():
                self._start(claim)
            else:
                self._next_claim = time.monotonic() + _POLL_SECONDS

    def _start(self, claim: Claim) -> None:
        run_dir = claim.result.run_dir
        if end := _unrecorded_end(run_dir):
            self._end(claim, *end)
            return
        config = self.spec.config(claim.values, group=self.spec.name)
        for row in _rows(run_dir):  # of an earlier attempt
            self._report(claim, config, row, judge=False)
        self.live_table.started(claim.run_id, config)  # the first process takes a while to start
        job = Job(config, run_dir, self.spec.early_termination is not None)
        self._claims[self.worker_pool.start(job)] = claim

    def _report(self, claim: Claim, config: RunConfig, row: Row, judge: bool) -> str | None:
        """Report an epoch to the queue; returns why the trial should end, or None.

        An epoch counts as an iteration once every part that will train is training, so that each
        strategy is judged after the same number of epochs of its complete training.
        """
        iteration = int(row["epoch"]) + 1 - config.plan.all_open_epoch
        value = self._logged_value(row)
        return self.queue.report(claim, iteration, value, judge) if iteration > 0 else None

    def _logged_value(self, row: Row) -> float:
        """The sweep's metric. Raises `ConfigError`."""
        name = self.spec.metric.name
        if name not in row:
            logged = ", ".join(row)
            raise ConfigError(f"metric.name: got {name!r}; must be one that the run logs: {logged}")
        return row[name]

    def _handle(self, worker: Worker, event: Event) -> None:
        if isinstance(event, TrialEnded):
            claim = self._claims.pop(worker)
            if event.state == "without device":
                self._retire(worker, claim, event.reason)
            else:
                self._end(claim, event, time.perf_counter() - worker.started)
            return
        claim, config = self._claims[worker], worker.job.config
        self.live_table.epoch_ended(claim.run_id, config, event)
        is_last = event["epoch"] + 1 == config.num_epochs
        reason = self._report(claim, config, event, judge=not is_last)
        if worker.job.is_judged:
            worker.answer(reason)

    def _retire(self, worker: Worker, claim: Claim, reason: str) -> None:
        """Go on without a worker whose GPU can't be used; `FinetuneError` if none is left."""
        self.queue.requeue(claim)
        if not self.worker_pool.retire(worker):
            raise FinetuneError(f"no GPU that was assigned can be used: {reason} ({_RESUME})")
        self.live_table.log(f"continuing with one worker less: {reason}")

    def _end(self, claim: Claim, end: TrialEnded, seconds: float | None) -> None:
        """Record how a trial ended, or requeue it if it was interrupted."""
        self._next_claim = 0.0
        result = replace(claim.result, state=end.state, seconds=seconds, reason=end.reason)
        if end.state == "out of resources":
            self.queue.requeue(claim)
            raise Shortage(f"{claim.run_id}: {end.reason} ({_RESUME})")
        if end.state in ("crashed", "stopped", "preempted"):
            if self.queue.requeue(claim, crashed=True):
                self.live_table.ended(replace(result, state="interrupted"))
                return
            reason = f"{end.reason}; it happened {MAX_CRASHES} times"
            result = replace(result, state="failed", reason=reason)
        result = self._with_values(result)
        record = {name: getattr(result, name) for name in RECORD_FIELDS}
        if not self.queue.finish(claim, result.state, result.value, record):
            self.live_table.log(f"{claim.run_id}: discarded; another process was given the trial")
        results = self.queue.results()
        self.live_table.update(results)
        self.live_table.ended(result)
        # With several seeds, a setting's mean may rise or fall until its last one has finished.
        if self.retention is not None and "seed" not in self.spec.varied:
            self.retention.apply(results)
        self._end_states.append(result.state)
        if self._end_states == ["failed"] * MAX_FIRST_FAILURES:
            raise FinetuneError(
                f"the first {MAX_FIRST_FAILURES} trials all failed, the last one because of: "
                f"{result.reason} ({_RESUME}, with --retry_failed)"
            )

    def _with_values(self, result: TrialResult) -> TrialResult:
        """The result of a trial that has ended, with the values in its run directory."""
        if not (rows := _rows(result.run_dir)):
            return result
        best = rows[best_epoch(rows)]
        f1 = best["val_macro_f1"]
        return replace(
            result,
            value=None if result.state == "failed" else self._logged_value(rows[-1]),
            best_val_acc=best["val_acc"],
            best_val_macro_f1=None if math.isnan(f1) else f1,
            best_epoch=best_epoch(rows),
        )

    def _requeue_running(self) -> None:
        stopped = self.worker_pool.stop()
        for worker in stopped:
            if claim := self._claims.pop(worker, None):
                # If the storage itself has failed, other processes see that this one has ended.
                with suppress(Exception):
                    self.queue.requeue(claim)
        if stopped:
            count = len(stopped)
            self.live_table.log(f"trials requeued: {count}; run the same command to resume them")


def _rows(run_dir: Path) -> list[Row]:
    """The rows of metrics.csv; none if it is damaged, since last.ckpt holds them too."""
    try:
        return read_metrics(run_dir / "metrics.csv")
    except RunDirError:
        return []


def _unrecorded_end(run_dir: Path) -> tuple[TrialEnded, float | None] | None:
    """How a run ended and its seconds, if its process ended before these were recorded."""
    if RunDir(run_dir).finished:
        try:
            result = RunResult.load(run_dir)
        except RunDirError as error:
            return TrialEnded("failed", f"{error}; remove {run_dir} to run the trial again"), None
        return TrialEnded("finished"), result.train_seconds + result.cache_seconds
    failure = read_failure(run_dir / "failure.json")
    if failure and failure.get("state") == "pruned":
        return TrialEnded("pruned", str(failure.get("reason"))), None
    return None
