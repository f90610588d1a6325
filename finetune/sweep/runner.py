"""A sweep, run to its end on this machine's workers.

Claims trials from the queue, gives them to the worker pool, reports their epochs and records their
ends. A stop puts running trials back.

    >>> run_sweep("sweep.yaml", workers=2)  # doctest: +SKIP
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune.runs.result import Row, RunResult, best_epoch, read_failure
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.sweep.distributions import Value
from finetune.sweep.spec import Sweep
from finetune.sweep.storage import sqlite_url, told
from finetune.sweep.sweep_file import read_sweep
from finetune.sweep.table import LiveTable, TrialResult, final_table, open_console
from finetune.sweep.trial_queue import MAX_DEATHS, Claim, TrialQueue
from finetune.sweep.trials import TrialStatus
from finetune.sweep.worker import EpochEnded, Event, Job, TrialEnded
from finetune.sweep.worker_pool import Worker, WorkerPool
from finetune.system.devices import visible_devices
from finetune.system.errors import ConfigError, FinetuneError, RunDirError, Shortage
from finetune.system.shutdown import stoppable

FIRST_FAILURES = 3
"""If the first so many trials all fail, the fault isn't theirs: the sweep ends."""

_WAIT_SECONDS = 1.0


def run_sweep(
    sweep: Sweep | Path | str | Mapping[str, Any],
    *,
    out: Path | str | None = None,
    workers: int | None = None,
    storage: str | None = None,
    max_runs: int | None = None,
    name: str | None = None,
    retry_failed: bool = False,
    fields: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> list[TrialResult]:
    """Run a sweep here and return every trial's outcome, the best first.

    `sweep` is a sweep.yaml, the same as a mapping, or a `Sweep`. Run directories and, where
    `storage` names no other place, NAME.db go to `out` (default: the sweep's own `out`, else
    runs/). The same call goes on with a sweep that was interrupted, and from a second process joins
    it. `fields` are defaults for what the sweep doesn't set, such as data_dir. `workers` is one a
    visible GPU, or one.

    Raises `ConfigError` for a sweep that can't be run, `FinetuneError` when the first trials all
    fail, and `Stopped` on SIGINT, SIGTERM or SIGUSR1, its trials put back. Failed trials don't
    raise: they are outcomes.
    """
    spec = sweep if isinstance(sweep, Sweep) else _read(sweep)
    spec = spec.amended(name, fields or {}, {} if out is None else {"out": str(out)})
    num_trials = spec.num_trials(max_runs)
    _make(spec.out_dir)
    where = storage or sqlite_url(spec.out_dir / f"{spec.slug}.db")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: got {workers}; a whole number from 1 on is needed")
    num_workers = workers or max(1, len(visible_devices()))
    with stoppable(), told(where):
        view = LiveTable(num_trials, spec.metric.name, spec.metric.goal, console)
        worker_pool = WorkerPool(num_workers)
        with closing(TrialQueue.open(spec, where, num_trials, view.say)) as trial_queue:
            if retry_failed and (again := trial_queue.retry_failed()):
                view.say(f"{again} trials run again")
            runner = _Runner(spec, trial_queue, worker_pool, view)
            with view:
                runner.to_the_end()
            return runner.outcomes()


def sweep_command(sweep: Path, **given: Any) -> int:
    """`python -m finetune sweep`: run, print the final table; the exit code."""
    console = open_console()
    spec = read_sweep(sweep)
    outcomes = run_sweep(spec, console=console, **given)
    return conclude(outcomes, spec.metric.name, console)


def conclude(outcomes: list[TrialResult], metric: str, console: Console) -> int:
    """Print every trial, the best first; 0 when all ended well, else 1."""
    console.print(final_table(outcomes, metric))
    counts = Counter(outcome.state for outcome in outcomes)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))
    if counts["failed"]:
        console.print("run it again with --retry_failed to try those that failed once more")
    return 0 if counts.keys() <= {"finished", "pruned"} else 1


def _read(sweep: Path | str | Mapping[str, Any]) -> Sweep:
    return read_sweep(sweep if isinstance(sweep, Mapping) else Path(sweep))


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetuneError(
            f"out: {directory} can't be made: {error.strerror}; pass another --out"
        ) from None


@dataclass
class _Runner:
    """One process's part in a sweep."""

    spec: Sweep
    queue: TrialQueue
    worker_pool: WorkerPool
    view: LiveTable
    _claims: dict[Worker, Claim] = field(default_factory=dict)
    _num_ended: int = 0
    _reasons: list[str] = field(default_factory=list)
    _nothing_until: float = 0.0

    def to_the_end(self) -> None:
        """Until every trial is done, here or elsewhere. What is running is put back on the way
        out, whatever the reason."""
        try:
            while True:
                self._fill()
                if self._claims:
                    for worker, event in self.worker_pool.events(_WAIT_SECONDS):
                        self._handle(worker, event)
                elif self._is_over():
                    break
                else:
                    time.sleep(_WAIT_SECONDS)
                self.queue.beat()
                self.queue.look()
        except BaseException:
            self._put_back()
            raise
        finally:
            self.worker_pool.close()

    def _is_over(self) -> bool:
        if self.queue.settled():
            return True
        machines = self.queue.held_elsewhere()
        if machines:
            self.view.say(
                f"trials are held by {', '.join(machines)}, which can't be seen in a journal; if "
                "its processes are gone, run this again with --retry_failed"
            )
        return bool(machines)

    def _fill(self) -> None:
        """Give free workers trials."""
        if time.monotonic() < self._nothing_until:
            return
        while self.worker_pool.has_room:
            claim = self.queue.claim()
            if claim is None:
                self._nothing_until = time.monotonic() + _WAIT_SECONDS
                break
            self._tell_what_is_done()
            self._start(claim)

    def _tell_what_is_done(self) -> None:
        """By earlier attempts and other processes too."""
        done = [s for s in self.queue.standings() if s.state in _DONE]
        finished = [s for s in done if s.state == "finished" and s.value is not None]
        best = min(finished, key=self._rank, default=None)
        self.view.found(len(done), None if best is None else self._described(best))

    def _start(self, claim: Claim) -> None:
        config = self.spec.config(claim.values, group=self.spec.name)
        run_dir = config.out / claim.run_id
        if end := _left_behind(run_dir):
            self._end(claim, end, None)
            return
        # A trial that goes on with its directory has logged these before.
        for row in _logged_before(run_dir):
            self.queue.report(claim, *self._logged(row), judge=False)
        self.view.started(claim.run_id, config)  # before, as the first waits for the fork server
        worker = self.worker_pool.start(
            Job(config, run_dir, self.spec.early_termination is not None)
        )
        self._claims[worker] = claim

    def _logged(self, row: Row) -> tuple[int, float]:
        """(iteration, the metric): W&B counts logged values from 1."""
        return int(row["epoch"]) + 1, row[self.spec.metric.name]

    def _handle(self, worker: Worker, event: Event) -> None:
        claim = self._claims[worker]
        if isinstance(event, EpochEnded):
            self.view.epoch(claim.run_id, event.row)
            iteration, value = self._logged(event.row)
            config = worker.job.config
            judge = config.plan.all_open_epoch < iteration < config.epochs
            reason = self.queue.report(claim, iteration, value, judge)
            if worker.job.is_judged:
                worker.answer(reason)
            return
        del self._claims[worker]
        self._end(claim, event, time.perf_counter() - worker.started)

    def _end(self, claim: Claim, end: TrialEnded, seconds: float | None) -> None:
        """Record how a trial ended, or let it wait again if it was cut off."""
        if end.state == "starved":
            self.queue.requeue(claim)
            raise Shortage(
                f"{claim.run_id}: {end.reason} (the sweep has ended; start it again once that is "
                "put right, and it goes on)"
            )
        if end.state in ("died", "stopped"):
            if self.queue.requeue(claim, died=True):
                self.view.ended(self._outcome(claim, "cut off", None, end.reason, seconds))
                self._nothing_until = 0.0
                return
            end = TrialEnded("failed", f"{end.reason}; it happened {MAX_DEATHS} times")
        rows = _logged_before(self.spec.out_dir / claim.run_id)
        value = self._logged(rows[-1])[1] if rows and end.state != "failed" else None
        outcome = self._outcome(claim, end.state, value, end.reason, seconds)
        self.queue.finish(claim, end.state, value, _record(outcome))
        self.view.ended(outcome)
        self._nothing_until = 0.0
        self._num_ended += 1
        if end.state == "failed":
            self._reasons.append(end.reason)
        if len(self._reasons) == self._num_ended == FIRST_FAILURES:
            raise FinetuneError(
                f"the first {FIRST_FAILURES} trials all failed, the last one so: {end.reason} "
                "(the sweep has ended; start it again with --retry_failed once that is put right)"
            )

    def _put_back(self) -> None:
        """Stop what is running and let it wait for whoever goes on with the sweep."""
        stopped = self.worker_pool.stop()
        for worker in stopped:
            claim = self._claims.pop(worker, None)
            if claim is not None:
                # The storage may be what ended it; who goes on sees that this process is gone.
                with suppress(Exception):
                    self.queue.requeue(claim)
        if stopped:
            self.view.say(f"trials put back: {len(stopped)}; the same command goes on with them")

    def _outcome(
        self, claim: Claim, state: str, value: float | None, reason: str, seconds: float | None
    ) -> TrialResult:
        run_dir = self.spec.out_dir / claim.run_id
        record: dict[str, Any] = {"seconds": seconds, "reason": reason}
        if state == "finished":
            result = RunResult.load(run_dir)
            record |= {"best_val_acc": result.best_val_acc, "best_epoch": result.best_epoch}
            record["seconds"] = seconds or result.train_seconds + result.cache_seconds
        elif rows := _logged_before(run_dir):
            best = best_epoch(rows)
            record |= {"best_val_acc": rows[best]["val_acc"], "best_epoch": best}
        return _describe(self.spec, claim.run_id, claim.values, state, value, record)

    def outcomes(self) -> list[TrialResult]:
        """Every trial, the best first; those without a value last."""
        return [self._described(s) for s in sorted(self.queue.standings(), key=self._rank)]

    def _rank(self, standing: TrialStatus) -> tuple[bool, float, str]:
        sign = -1 if self.spec.metric.goal == "maximize" else 1
        return standing.value is None, sign * (standing.value or 0.0), standing.run_id

    def _described(self, s: TrialStatus) -> TrialResult:
        return _describe(self.spec, s.run_id, s.values, s.state, s.value, s.record)


_DONE = ("finished", "pruned", "failed")


def _record(outcome: TrialResult) -> dict[str, Any]:
    names = ("best_val_acc", "best_epoch", "seconds", "reason")
    return {name: getattr(outcome, name) for name in names}


def _describe(
    spec: Sweep,
    run_id: str,
    values: Mapping[str, Value],
    state: str,
    value: float | None,
    record: Mapping[str, Any],
) -> TrialResult:
    config = spec.config(values)
    names = [name for name in spec.varied if name not in ("strategy", "name")]
    setting = {name: getattr(config, name) for name in names if name in values}
    return TrialResult(
        run_id=run_id,
        run_dir=spec.out_dir / run_id,
        strategy=config.strategy,
        setting={k: v for k, v in setting.items() if v is not None},
        state=state,
        value=value,
        **record,
    )


def _logged_before(run_dir: Path) -> list[Row]:
    """A run directory's rows; none where they are damaged: its last.ckpt has them too."""
    try:
        return read_metrics(run_dir / "metrics.csv")
    except RunDirError:
        return []


def _left_behind(run_dir: Path) -> TrialEnded | None:
    """How a run ended whose end nobody could record."""
    if RunDir(run_dir).finished:
        try:
            RunResult.load(run_dir)
        except RunDirError as error:
            return TrialEnded("failed", f"{error}; remove {run_dir} to have it run again")
        return TrialEnded("finished")
    failure = read_failure(run_dir / "failure.json")
    if failure and failure.get("state") == "pruned":
        return TrialEnded("pruned", str(failure.get("reason")))
    return None
