"""The queue of a sweep's trials, shared by all processes that work on the sweep.

The trials of one grid cell or one draw form a group. An interrupted trial is marked as failed and a
copy of it is enqueued. A trial can be claimed only if all earlier trials of its group have failed,
so no two processes run trials of a group at the same time.
"""

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import chain, islice
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials, get_storage
from optuna.trial import FrozenTrial, TrialState, create_trial

from finetune.sweep import sampling, storage
from finetune.sweep.distributions import Value
from finetune.sweep.spec import Sweep
from finetune.sweep.study import join_study
from finetune.sweep.trials import Claim, TrialGroup, TrialResult, enqueue_copy, group_trials

Accepts = Callable[[dict[str, Value]], bool]

MAX_CRASHES = 3
"""A trial whose worker has crashed this often has failed."""

_REFRESH_SECONDS = 2.0
_UNOWNED_SECONDS = 60.0  # a process that claims a trial records itself as the owner right away
_COPY_SECONDS = 5.0  # a process that fails an interrupted trial enqueues the copy right away


class TrialQueue:
    """The trials of one sweep."""

    def __init__(
        self, sweep: Sweep, where: str, num_trials: int, owner: dict[str, Any] | None = None
    ) -> None:
        """Start the sweep in the storage at `where`, or join it; raises what `join_study` does."""
        self.sweep = sweep
        self.num_trials = num_trials
        self._owner = owner or storage.this_process()
        self._storage = storage.open_storage(where, enqueue_copy)
        self._database = self._storage if isinstance(self._storage, RDBStorage) else None
        cached = get_storage(self._storage)  # reads a database's finished trials once
        self._study, self._token = join_study(sweep, cached, num_trials, self._owner)
        self._groups: dict[str, TrialGroup] = {}
        self._claimed: set[int] = set()
        self._first_seen: dict[tuple[int, TrialState], float] = {}
        self._last_refresh = self._last_heartbeat = -math.inf
        self._refresh_seconds = _REFRESH_SECONDS
        self.refresh()

    def close(self) -> None:
        if self._database:
            self._database.remove_session()
            self._database.engine.dispose()

    def refresh(self) -> None:
        """Read the trials of all processes, and requeue interrupted ones."""
        if self._database:
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                fail_stale_trials(self._study)
        self._read()
        if self._requeue_interrupted():
            self._read()

    def refresh_if_due(self) -> None:
        if time.monotonic() - self._last_refresh >= self._refresh_seconds:
            self.refresh()

    def _read(self) -> None:
        started = time.monotonic()
        groups = group_trials(self._study.get_trials(deepcopy=False), self.sweep)
        # An earlier call may have enqueued more cells than this one is to run.
        limit = self.num_trials if self.sweep.method == "grid" else None
        self._groups = dict(islice(groups.items(), limit))
        self._last_refresh = time.monotonic()
        # Reading thousands of waiting trials is slow, so it is then done less often.
        self._refresh_seconds = max(_REFRESH_SECONDS, 20 * (self._last_refresh - started))

    def results(self) -> list[TrialResult]:
        """Every trial as of the last refresh, the best first and those without a value last."""
        sign = -1 if self.sweep.metric.goal == "maximize" else 1
        results = [g.result(g.values, self._token) for g in self._groups.values()]
        return sorted(results, key=lambda r: (r.value is None, sign * (r.value or 0.0), r.run_id))

    def is_complete(self) -> bool:
        """Whether no process has anything left to do; refreshes first."""
        self.refresh()
        states = {group.state for group in self._groups.values()}
        if self._is_target_reached():
            return "running" not in states
        is_open = states & {"running", "waiting", "interrupted"}
        return not is_open and len(self._groups) >= self.num_trials

    def unobservable(self) -> dict[str, list[FrozenTrial]]:
        """Other machines and the trials that they run; only in a journal, without heartbeats."""
        found = defaultdict(list)
        for trial in [] if self._database else self._trials("running"):
            name = trial.user_attrs.get("owner", {}).get("machine", storage.machine())
            if name != storage.machine():
                found[name.split("/")[0]].append(trial)
        return found

    def _trials(self, state: str) -> list[FrozenTrial]:
        return [group.decisive for group in self._groups.values() if group.state == state]

    def _is_target_reached(self) -> bool:
        reached = self.sweep.metric.reached
        return any(reached(group.value) for group in self._groups.values())

    def claim(self, accepts: Accepts = lambda _: True) -> Claim | None:
        """Claim the next trial whose values it accepts; None if there is none.

        Where values are drawn, they are drawn once: if they are not accepted, there is none.
        """
        if self._is_target_reached():
            return None
        if claim := next(self._waiting(self._groups, accepts), None):
            return claim
        if self.sweep.method == "grid":
            self.refresh()
        else:
            self.refresh_if_due()
        claim = next(self._waiting(self._groups, accepts), None)
        if claim or self.sweep.method == "grid" or self._trials("waiting"):
            return claim
        claim = self._draw()
        if claim is None or accepts(claim.values):
            return claim
        self.requeue(claim)
        return None

    def claim_new(self, accepts: Accepts, limit: int) -> list[Claim]:
        """Claim up to `limit` of a grid's cells that were never claimed before."""
        if self.sweep.method != "grid" or self._is_target_reached():
            return []
        new = {key: group for key, group in self._groups.items() if len(group.trials) == 1}
        return list(islice(self._waiting(new, accepts), limit))

    def _waiting(self, groups: Mapping[str, TrialGroup], accepts: Accepts) -> Iterator[Claim]:
        """Claims of waiting trials, each made when it is asked for."""
        for key, group in groups.items():
            trial = group.decisive
            is_grid = self.sweep.method == "grid"
            is_known = is_grid or len(group.values) == len(self.sweep.dimensions)
            if trial.state != TrialState.WAITING or (is_known and not accepts(group.values)):
                continue
            if self._try_claim(trial):
                yield self._claimed_trial(key, trial)

    def _try_claim(self, trial: FrozenTrial) -> bool:
        """Set a waiting trial to running: exactly one process succeeds."""
        is_ours = False
        with suppress(UpdateFinishedTrialError):
            is_ours = self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            trial.state = TrialState.RUNNING
            if is_ours:
                self._storage.set_trial_user_attr(trial._trial_id, "owner", self._owner)
        return is_ours

    def _claimed_trial(self, key: str, trial: FrozenTrial) -> Claim:
        values = self._groups[key].values
        if len(values) < len(self.sweep.dimensions):
            sampler = sampling.sampler(self.sweep, draw=list(self._groups).index(key))
            # A new study object: one that has sampled before would use the trials of that time.
            study = optuna.Study(self.sweep.name, self._study._storage, sampler)
            new_trial = optuna.trial.Trial(study, trial._trial_id)
            values = sampling.draw(new_trial, self.sweep.dimensions)
        self._claimed.add(trial._trial_id)
        if self._database:
            self._database.record_heartbeat(trial._trial_id)
        result = self._groups[key].result(values, self._token)
        return Claim(trial._trial_id, key, values, result)

    def _draw(self) -> Claim | None:
        """Claim a new trial with drawn values, unless there are enough trials.

        Two processes may both create the last one; the later of the two is then discarded.
        """
        if len(self._groups) >= self.num_trials:
            return None
        template = create_trial(state=TrialState.RUNNING, user_attrs={"owner": self._owner})
        trial_id = self._storage.create_new_trial(self._study._study_id, template)
        self._read()
        trial = self._storage.get_trial(trial_id)
        key = f"draw-{trial.number}"
        if list(self._groups).index(key) < self.num_trials:
            return self._claimed_trial(key, trial)
        self._storage.set_trial_user_attr(trial_id, "surplus", True)
        self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
        del self._groups[key]
        return None

    def report(self, claim: Claim, iteration: int, value: float, judge: bool) -> str | None:
        """Record a value of the metric; if `judge`, return why the trial should end, or None.

        Iterations count from 1. A trial is judged by those of other trials.
        """
        try:
            self._storage.set_trial_intermediate_value(claim.trial_id, iteration, value)
        except UpdateFinishedTrialError:
            return None
        rule, name = self.sweep.early_termination, self.sweep.metric.name
        if not judge or rule is None:
            return None
        if not self._study.pruner.prune(self._study, self._storage.get_trial(claim.trial_id)):
            return None
        return f"{name} {value:.4f} at iteration {iteration} is not among the best 1 in {rule.eta}"

    def finish(self, claim: Claim, state: str, value: float | None, record: dict[str, Any]) -> bool:
        """Record that a claimed trial is `finished`, `pruned` or `failed`.

        False if another process has been given the trial meanwhile: the result is discarded.
        """
        done = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}.get(state)
        values = [value] if done and value is not None else None
        self._claimed.discard(claim.trial_id)
        try:
            attribute = "record" if done else "failure"
            self._storage.set_trial_user_attr(claim.trial_id, attribute, record)
            self._storage.set_trial_state_values(claim.trial_id, done or TrialState.FAIL, values)
        except UpdateFinishedTrialError:
            self._study.set_user_attr(f"discarded-{claim.key}-{claim.trial_id}", record)
            return False
        ended = self._storage.get_trial(claim.trial_id)
        trials = self._groups[claim.key].trials
        trials[:] = [ended if t._trial_id == claim.trial_id else t for t in trials]
        return True

    def requeue(self, claim: Claim, crashed: bool = False) -> bool:
        """Enqueue an interrupted trial again; False if its worker has crashed too often."""
        trial = self._storage.get_trial(claim.trial_id)
        num_crashes = int(trial.user_attrs.get("deaths", 0)) + crashed
        if num_crashes >= MAX_CRASHES:
            return False
        self._claimed.discard(claim.trial_id)
        self._fail_and_copy(trial, deaths=num_crashes)
        return True

    def retry_failed(self) -> int:
        """Requeue failed trials, and in a journal those of other machines; return their number."""
        self.refresh()
        failed = self._trials("failed")
        for trial in failed:
            enqueue_copy(self._study, trial, deaths=0)
        unobservable = list(chain.from_iterable(self.unobservable().values()))
        for trial in unobservable:
            self._fail_and_copy(trial)
        self.refresh()
        return len(failed) + len(unobservable)

    def _fail_and_copy(self, trial: FrozenTrial, **attributes: Any) -> None:
        """Fail a trial and enqueue a copy, unless another process has done so."""
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            enqueue_copy(self._study, trial, **attributes)
            self._last_refresh = -math.inf

    def _requeue_interrupted(self) -> bool:
        """Requeue trials whose process has ended; whether there were any."""
        interrupted = list(filter(self._is_interrupted, self._trials("running")))
        for trial in interrupted:
            self._fail_and_copy(trial)
        without_copy = self._trials("interrupted")
        without_copy = [t for t in without_copy if self._seconds_seen(t) > _COPY_SECONDS]
        for trial in without_copy:
            enqueue_copy(self._study, trial)
        return bool(interrupted or without_copy)

    def _is_interrupted(self, trial: FrozenTrial) -> bool:
        if trial._trial_id in self._claimed:
            return False
        owner = trial.user_attrs.get("owner")
        return storage.has_ended(owner) if owner else self._seconds_seen(trial) > _UNOWNED_SECONDS

    def _seconds_seen(self, trial: FrozenTrial) -> float:
        """Seconds since this process first saw a trial in its state; other clocks may differ."""
        now = time.monotonic()
        return now - self._first_seen.setdefault((trial._trial_id, trial.state), now)

    def record_heartbeats(self) -> None:
        """Record in a database that the claimed trials are still running, if it is due."""
        if self._database and time.monotonic() - self._last_heartbeat >= storage.HEARTBEAT_SECONDS:
            for trial_id in self._claimed:
                self._database.record_heartbeat(trial_id)
            self._last_heartbeat = time.monotonic()
