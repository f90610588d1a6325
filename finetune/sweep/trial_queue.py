"""The trials of one sweep, shared by every process that works on it.

Turns a sweep into trials in an Optuna storage, each claimed by one process and ended with exactly
one accepted result. A trial has a key, its cell or draw; one that was cut off fails and a copy with
its key waits in its place. Of the trials of a key, a later one is claimed only when all earlier
ones have failed: they are totally ordered, so no two processes can both hold the key. Knows nothing
about processes, torch or the terminal.

    >>> queue = TrialQueue.open(sweep, "sqlite:///runs/grid.db", num_trials=48)  # doctest: +SKIP
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, fail_stale_trials, get_storage
from optuna.trial import FrozenTrial, TrialState, create_trial

from finetune.sweep import sampling
from finetune.sweep.distributions import Value
from finetune.sweep.spec import Sweep
from finetune.sweep.storage import (
    HEARTBEAT_SECONDS,
    experimental,
    is_gone,
    machine,
    open_storage,
    this_process,
)
from finetune.sweep.study import join
from finetune.sweep.trials import DONE, TrialStatus, copy, copy_stale, decided, key_of, number_of

LOOK_SECONDS = 2.0
"""How often other processes' trials are looked at, at the most."""

UNOWNED_SECONDS = 60.0
"""A running trial that nobody has signed for so long was cut off while it was claimed."""

MAX_DEATHS = 3
"""A trial whose worker died so often has failed: out of memory, perhaps, or a crash."""

_REPLACING_SECONDS = 5.0  # between a trial's end and its copy, while its process lives


@dataclass(frozen=True)
class Claim:
    """A trial that this process holds."""

    trial_id: int
    key: str
    run_id: str
    values: dict[str, Value]
    """The fields that vary in the sweep."""
    attributes: dict[str, Any]


class TrialQueue:
    """The trials of one sweep; made by `open`."""

    def __init__(
        self,
        sweep: Sweep,
        storage: BaseStorage,
        num_trials: int,
        say: Callable[[str], None],
        owner: dict[str, Any],
    ) -> None:
        self.sweep = sweep
        self.num_trials = num_trials
        self._storage = storage
        self._shared = get_storage(storage)  # for a database, with a cache of ended trials
        self._study, self._token = join(sweep, self._shared, num_trials, owner)
        self._study_id = storage.get_study_id_from_name(sweep.name)
        self._say = say
        self._owner = owner
        self._cells = list(sweep.cells()) if sweep.method == "grid" else []
        self._held: dict[int, Claim] = {}
        self._groups: dict[str, list[FrozenTrial]] = {}
        self._first_seen: dict[tuple[int, str], float] = {}
        self._looked = self._beaten = -1e9
        self._pause = LOOK_SECONDS

    @classmethod
    def open(
        cls,
        sweep: Sweep,
        where: str,
        num_trials: int,
        say: Callable[[str], None] = print,
        owner: dict[str, Any] | None = None,
        **heartbeats: int,
    ) -> TrialQueue:
        """Start the sweep in its storage, or join it there. Raises `ConfigError` if the storage
        holds another sweep of this name."""
        storage = open_storage(where, copy_stale, **heartbeats)
        trial_queue = cls(sweep, storage, num_trials, say, owner or this_process())
        trial_queue._look()
        trial_queue._recover_lost()
        return trial_queue

    def close(self) -> None:
        """Let go of the storage's connections."""
        if isinstance(self._storage, RDBStorage):
            self._storage.remove_session()
            self._storage.engine.dispose()

    # what is known

    def _look(self) -> None:
        """Read the trials, and those of processes that are gone again.

        Reading thousands of waiting trials takes a while, so the next look comes the later.
        """
        started = time.monotonic()
        groups: dict[str, list[FrozenTrial]] = {}
        for trial in self._study.get_trials(deepcopy=False):
            key = key_of(trial)
            beyond = self._cells and number_of(key) >= self.num_trials
            if not beyond and "surplus" not in trial.user_attrs:
                groups.setdefault(key, []).append(trial)
        self._groups = groups
        self._looked = time.monotonic()
        self._pause = max(LOOK_SECONDS, 20 * (self._looked - started))

    def look(self) -> None:
        """Look at other processes' trials if it is time, and take up those that were cut off."""
        if time.monotonic() - self._looked >= self._pause:
            self._look()
            self._recover_lost()

    def _standing(self, key: str, trials: list[FrozenTrial]) -> TrialStatus:
        state, trial = decided(trials)
        return TrialStatus(
            key,
            state,
            self._run_id(key),
            self._values(key, trial),
            trial.values[0] if trial.state in DONE and trial.values else None,
            trial.user_attrs.get("record") or trial.user_attrs.get("failure") or {},
        )

    def _values(self, key: str, trial: FrozenTrial) -> dict[str, Value]:
        if self._cells:
            return dict(self._cells[number_of(key)])
        if len(trial.params) < len(self.sweep.dimensions):
            return {}
        return sampling.meaning(trial.params, self.sweep.dimensions)

    def _run_id(self, key: str) -> str:
        """Stable: whoever takes the trial up finds its directory. The token tells apart two sweeps
        of one name."""
        name = "".join(
            c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in self.sweep.name
        )
        return f"{name.strip('-')[:60] or 'sweep'}-{self._token}-{int(key.rpartition('-')[2]):03d}"

    def standings(self) -> list[TrialStatus]:
        """Every key's standing, as last looked at."""
        return [self._standing(key, trials) for key, trials in self._groups.items()]

    def settled(self) -> bool:
        """Whether nothing is left to do, here or elsewhere, by a fresh look."""
        self._look()
        self._recover_lost()
        standings = self.standings()
        open_states = {s.state for s in standings} & {"running", "waiting", "lost"}
        return not open_states and (self._target_reached() or len(standings) >= self.num_trials)

    def held_elsewhere(self) -> list[str]:
        """Machines that hold running trials and that can't be seen from here: no heartbeats."""
        if isinstance(self._storage, RDBStorage):
            return []
        owners = [
            t.user_attrs.get("owner", {}).get("machine")
            for trials in self._groups.values()
            for t in trials
            if t.state == TrialState.RUNNING
        ]
        return sorted({owner.split("/")[0] for owner in owners if owner and owner != machine()})

    def _target_reached(self) -> bool:
        if self.sweep.metric.target is None:
            return False
        return any(self.sweep.metric.reached(s.value) for s in self.standings())

    # claims

    def claim(self) -> Claim | None:
        """The next trial, now held by this process; None when nothing is left to claim."""
        if self._target_reached():
            return None
        if claim := self._claim_waiting():
            return claim
        draws = self.sweep.method != "grid"
        if draws and time.monotonic() - self._looked < self._pause:
            return self._draw()  # which looks before it has drawn
        self._look()
        return self._claim_waiting() or (self._draw() if draws else None)

    def _claim_waiting(self) -> Claim | None:
        for key, trials in list(self._groups.items()):
            earlier_failed = True
            for trial in trials:
                if trial.state == TrialState.WAITING and earlier_failed and self._hold(trial):
                    return self._held_claim(key, trial)
                earlier_failed = earlier_failed and trial.state == TrialState.FAIL
        return None

    def _hold(self, trial: FrozenTrial) -> bool:
        """Try to make a waiting trial ours; one process alone succeeds."""
        trial_id = trial._trial_id
        if trial_id in self._held:
            return False
        try:
            if not self._storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                trial.state = TrialState.RUNNING  # somebody else's; the next look tells more
                return False
            self._storage.set_trial_user_attr(trial_id, "owner", self._owner)
        except UpdateFinishedTrialError:
            return False
        trial.state = TrialState.RUNNING
        return True

    def _held_claim(self, key: str, trial: FrozenTrial) -> Claim:
        values = self._values(key, trial)
        if len(values) < len(self.sweep.dimensions):  # cut off before all its values were drawn
            values = self._sample(trial._trial_id, trial.number)
        claim = Claim(trial._trial_id, key, self._run_id(key), values, dict(trial.user_attrs))
        self._held[claim.trial_id] = claim
        self._beat(claim.trial_id)
        return claim

    def _draw(self) -> Claim | None:
        """A new trial with values drawn, unless there are enough.

        Two processes may both see the last place free; the later trial is then withdrawn.
        """
        if len(self._groups) >= self.num_trials:
            return None
        template = create_trial(state=TrialState.RUNNING, user_attrs={"owner": self._owner})
        trial_id = self._storage.create_new_trial(self._study_id, template)
        self._look()
        trial = self._storage.get_trial(trial_id)
        key = key_of(trial)
        rank = sum(number_of(k) < trial.number for k in self._groups)
        if rank >= self.num_trials:
            self._storage.set_trial_user_attr(trial_id, "surplus", True)
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
            self._groups.pop(key, None)
            return None
        values = self._sample(trial_id, rank)
        claim = Claim(trial_id, key, self._run_id(key), values, {})
        self._held[trial_id] = claim
        self._beat(trial_id)
        return claim

    def _sample(self, trial_id: int, draw: int) -> dict[str, Value]:
        # A study of its own: one that has sampled before would go by the trials that it saw then.
        study = optuna.load_study(
            study_name=self.sweep.name,
            storage=self._shared,
            sampler=sampling.sampler(self.sweep, draw),
        )
        return sampling.draw(optuna.trial.Trial(study, trial_id), self.sweep.dimensions)

    # a held trial's course

    def report(self, claim: Claim, iteration: int, value: float, judge: bool) -> str | None:
        """Record a value of the metric; why the trial should end, if it should.

        Iterations count from 1, as W&B counts them: one logged value each.
        """
        try:
            self._storage.set_trial_intermediate_value(claim.trial_id, iteration, value)
        except UpdateFinishedTrialError:
            return None
        if not judge or self.sweep.early_termination is None:
            return None
        trial = self._storage.get_trial(claim.trial_id)
        if not self._study.pruner.prune(self._study, trial):
            return None
        name, eta = self.sweep.metric.name, self.sweep.early_termination.eta
        return f"{name} {value:.4f} after {iteration} epochs is not among the best 1 in {eta}"

    def finish(self, claim: Claim, state: str, value: float | None, record: dict[str, Any]) -> bool:
        """End a held trial: `finished`, `pruned` or `failed`. False if it was no longer held: its
        result came too late and is discarded."""
        ends = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
        attribute = "record" if state in ends else "failure"
        values = None if value is None or state not in ends else [value]
        self._held.pop(claim.trial_id, None)
        try:
            self._storage.set_trial_user_attr(claim.trial_id, attribute, record)
            self._storage.set_trial_state_values(
                claim.trial_id, ends.get(state, TrialState.FAIL), values
            )
        except UpdateFinishedTrialError:
            self._study.set_user_attr(f"discarded-{claim.key}-{claim.trial_id}", record)
            self._say(
                f"{claim.run_id}: its trial was given to another process meanwhile; this result "
                "is discarded"
            )
            return False
        self._note_locally(claim)
        return True

    def requeue(self, claim: Claim, died: bool = False) -> bool:
        """End a trial that was cut off and let a copy wait in its place.

        False when its worker has died too often: then it has failed.
        """
        deaths = int(claim.attributes.get("deaths", 0)) + died
        if deaths >= MAX_DEATHS:
            return False
        self._held.pop(claim.trial_id, None)
        self._replace(self._storage.get_trial(claim.trial_id), deaths=deaths)
        return True

    def _note_locally(self, claim: Claim) -> None:
        trials = self._groups.setdefault(claim.key, [])
        trial = self._storage.get_trial(claim.trial_id)
        trials[:] = [t for t in trials if t._trial_id != claim.trial_id] + [trial]
        trials.sort(key=lambda t: t.number)

    def _replace(self, trial: FrozenTrial, **attributes: Any) -> None:
        """Fail a trial and enqueue its copy, unless somebody else has."""
        try:
            self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return
        self._enqueue_copy(trial, **attributes)

    def _enqueue_copy(self, trial: FrozenTrial, **attributes: Any) -> None:
        copy(self._storage, self._study_id, trial, **attributes)
        self._looked = -1e9

    # trials of processes that are gone

    def _recover_lost(self) -> None:
        """Let trials wait again whose process is gone, or that nobody has put back."""
        if isinstance(self._storage, RDBStorage):
            with experimental():
                fail_stale_trials(self._study)
        changed = False
        for trials in list(self._groups.values()):
            for trial in trials:
                if trial.state == TrialState.RUNNING and self._is_cut_off(trial):
                    self._replace(trial)
                    changed = True
            lost = decided(trials)[0] == "lost"
            if lost and self._seen_for(trials[-1]) > _REPLACING_SECONDS:
                self._enqueue_copy(trials[-1])
                changed = True
            self._discard_later(trials)
        if changed:
            self._look()

    def _is_cut_off(self, trial: FrozenTrial) -> bool:
        if trial._trial_id in self._held:
            return False
        owner = trial.user_attrs.get("owner")
        if owner is None:
            return self._seen_for(trial) > UNOWNED_SECONDS
        return is_gone(owner)

    def _seen_for(self, trial: FrozenTrial) -> float:
        """Seconds since this process first saw a trial in its state; other clocks may differ."""
        now = time.monotonic()
        return now - self._first_seen.setdefault((trial._trial_id, trial.state.name), now)

    def _discard_later(self, trials: list[FrozenTrial]) -> None:
        """Of a key that is done, a waiting trial is one too many."""
        done = next((i for i, t in enumerate(trials) if t.state in DONE), len(trials))
        for trial in trials[done + 1 :]:
            if trial.state == TrialState.WAITING:
                try:
                    self._storage.set_trial_user_attr(trial._trial_id, "surplus", True)
                    self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                except UpdateFinishedTrialError:
                    pass

    def retry_failed(self) -> int:
        """Let failed trials wait again, and, in a journal, those that other machines hold.

        How many there are.
        """
        self._look()
        again = [ts[-1] for ts in self._groups.values() if decided(ts)[0] == "failed"]
        for trial in again:
            self._enqueue_copy(trial, deaths=0)
        if not isinstance(self._storage, RDBStorage):
            held = [t for ts in self._groups.values() for t in ts if t.state == TrialState.RUNNING]
            foreign = [t for t in held if t.user_attrs.get("owner", {}).get("machine") != machine()]
            for trial in foreign:
                self._replace(trial)
            again += foreign
        self._look()
        return len(again)

    # heartbeats

    def beat(self) -> None:
        """Tell the storage that the held trials are alive, when it is time."""
        if time.monotonic() - self._beaten >= self._beat_seconds:
            for trial_id in self._held:
                self._beat(trial_id)
            self._beaten = time.monotonic()

    @property
    def _beat_seconds(self) -> float:
        if not isinstance(self._storage, RDBStorage):
            return float("inf")
        return float(self._storage.get_heartbeat_interval() or HEARTBEAT_SECONDS)

    def _beat(self, trial_id: int) -> None:
        if isinstance(self._storage, RDBStorage):
            self._storage.record_heartbeat(trial_id)
