"""Starts the trials of a sweep on workers, judges them, and records how they end."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.config.fields import RunConfig
from finetune.runs.result import Row, RunResult, best_epoch, read_failure
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.runs.settings import head_group
from finetune.sweep.distributions import Value
from finetune.sweep.retention import Retention
from finetune.sweep.spec import Sweep, cell_key
from finetune.sweep.table import LiveTable
from finetune.sweep.time_budget import TimeBudget
from finetune.sweep.trial_queue import MAX_CRASHES, TrialQueue
from finetune.sweep.trials import RECORD_FIELDS, Claim, TrialResult
from finetune.sweep.worker import Event, Job, TrialEnded
from finetune.sweep.worker_pool import Worker, WorkerPool
from finetune.system.errors import ConfigError, FinetuneError, RunDirError, Shortage

MAX_FIRST_FAILURES = 3
"""If this many trials are the first to end and all have failed, the sweep is stopped."""

MAX_TOGETHER = 16
"""So many trials that train only the head are carried out by one worker."""

_POLL_SECONDS = 1.0
_RESUME = "the sweep has ended; start it again once this is fixed"


@dataclass
class TrialRunner:
    """Runs a sweep's trials in worker processes until all are done."""

    spec: Sweep
    queue: TrialQueue
    worker_pool: WorkerPool
    live_table: LiveTable
    retention: Retention | None = None
    budget: TimeBudget | None = None
    _claims: dict[Worker, dict[int, Claim]] = field(default_factory=dict)
    """The unfinished trials of each worker, by the index of their run."""
    _head_groups: dict[str, str | None] = field(default_factory=dict)
    _end_states: list[str] = field(default_factory=list)
    _next_claim: float = 0.0  # when there was nothing to claim
    _last_event: dict[Worker, tuple[int, float]] = field(default_factory=dict)
    """The latest epoch of each worker, -1 at its start, and the time of its end."""

    def run(self) -> None:
        """Run until every trial is done, here or elsewhere; on errors requeue the running ones."""
        self.live_table.update(self.queue.results())
        try:
            while True:
                if self.budget and self.budget.is_over:
                    self.live_table.log("the time is over")
                    break
                self._start_trials()
                if self._claims:
                    for worker, index, event in self.worker_pool.events(_POLL_SECONDS):
                        self._handle(worker, index, event)
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
        if self.budget and self._next_claim:
            self.live_table.log("no other trial can end in the time that is left")
            return True
        if machines := sorted(self.queue.unobservable()):
            self.live_table.log(
                f"trials are running on {', '.join(machines)}; a journal does not tell whether "
                "their processes are alive: if they have ended, run this again with --retry_failed"
            )
        return bool(machines)

    def _start_trials(self) -> None:
        while self.worker_pool.has_room and time.monotonic() >= self._next_claim:
            if claim := self.queue.claim(self._fits):
                self._start(claim)
            else:
                self._next_claim = time.monotonic() + _POLL_SECONDS

    def _fits(self, values: Mapping[str, Any]) -> bool:
        """Whether a trial with these values can end in time."""
        return self.budget is None or self.budget.fits(self.spec.config(values))

    def _start(self, claim: Claim) -> None:
        run_dir = claim.result.run_dir
        if end := _unrecorded_end(run_dir):
            self._end(claim, *end)
            return
        config = self.spec.config(claim.values, group=self.spec.name)
        for row in _rows(run_dir):  # of an earlier attempt
            self._report(claim, config, row, judge=False)
        claims = [claim] if run_dir.exists() else [claim, *self._claim_similar(config)]
        configs = [self.spec.config(c.values, group=self.spec.name) for c in claims]
        for c, config in zip(claims, configs, strict=True):
            self.live_table.started(c.run_id, config)  # the first process takes a while to start
        is_judged = self.spec.early_termination is not None or self.budget is not None
        run_dirs = tuple(c.result.run_dir for c in claims)
        worker = self.worker_pool.start(Job(tuple(configs), run_dirs, is_judged))
        self._claims[worker] = dict(enumerate(claims))
        self._last_event[worker] = -1, time.monotonic()

    def _claim_similar(self, config: RunConfig) -> list[Claim]:
        """Claim trials that can train their heads together with this one."""
        if (wanted := head_group(config)) is None:
            return []

        def is_similar(values: dict[str, Value]) -> bool:
            if (key := cell_key(values)) not in self._head_groups:
                config = self.spec.config(values, group=self.spec.name)
                self._head_groups[key] = head_group(config)
            return self._head_groups[key] == wanted and self._fits(values)

        return self.queue.claim_new(is_similar, MAX_TOGETHER - 1)

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

    def _handle(self, worker: Worker, index: int, event: Event) -> None:
        configs = worker.job.configs
        if isinstance(event, TrialEnded):
            claim = self._claims[worker].pop(index)
            if not self._claims[worker]:
                del self._claims[worker]
            if event.state == "without device":
                self._retire(worker, claim, event.reason)
            else:
                seconds = (time.perf_counter() - worker.started) / len(configs)
                self._end(claim, event, seconds)
            return
        claim, config = self._claims[worker][index], configs[index]
        self.live_table.epoch_ended(claim.run_id, config, event)
        is_last = event["epoch"] + 1 == config.num_epochs
        reason = self._report(claim, config, event, judge=not is_last)
        if self.budget:
            epoch, (last_epoch, before) = int(event["epoch"]), self._last_event[worker]
            if epoch != last_epoch:  # heads that train together end an epoch together
                now = time.monotonic()
                self._last_event[worker] = epoch, now
                self.budget.observe(config, epoch, now - before)
            if not is_last and not self.budget.fits_an_epoch(config):
                reason = "no other epoch can end in the time that is left"
        if worker.job.is_judged:
            worker.answer(reason)

    def _retire(self, worker: Worker, claim: Claim, reason: str) -> None:
        """Go on without a worker whose GPU can't be used; `FinetuneError` if none is left."""
        self.queue.requeue(claim)
        if worker in self._claims:  # its other trials end for the same reason
            return
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
        count = 0
        for worker in self.worker_pool.stop():
            for claim in self._claims.pop(worker, {}).values():
                count += 1
                # If the storage itself has failed, other processes see that this one has ended.
                with suppress(Exception):
                    self.queue.requeue(claim)
        if count:
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
