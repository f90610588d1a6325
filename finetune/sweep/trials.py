"""Optuna's trials in the terms of a sweep.

The user attributes of a trial are a format: `key`, `values` (of a grid's cell), `owner` (the
process that runs it), `record` or `failure` (how it ended), `deaths` (how often its worker has
crashed), `copy_of`, and `surplus` (the trial does not count).
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from finetune.sweep import sampling
from finetune.sweep.distributions import Value
from finetune.sweep.spec import Sweep, cell_key

RECORD_FIELDS = ("best_val_acc", "best_val_macro_f1", "best_epoch", "seconds", "reason")
"""The fields of `TrialResult` that are stored when a trial ends."""

_DONE = (TrialState.COMPLETE, TrialState.PRUNED)
_PRECEDENCE = (_DONE, (TrialState.RUNNING,), (TrialState.WAITING,))


@dataclass(frozen=True)
class TrialResult:
    """One trial of a sweep, its attempts taken together."""

    run_id: str
    run_dir: Path
    strategy: str
    setting: dict[str, Value]
    """The fields that vary in the sweep and apply to the strategy, without the strategy itself."""
    state: str
    """finished, pruned or failed; in an unfinished sweep also running, waiting or interrupted."""
    value: float | None = None
    """The last value of the sweep's metric."""
    best_val_acc: float | None = None
    best_val_macro_f1: float | None = None
    """Of the best epoch; None if an older version trained it."""
    best_epoch: int | None = None
    seconds: float | None = None
    """Wall time of the last attempt."""
    reason: str = ""


@dataclass(frozen=True)
class Claim:
    """A trial that this process has claimed."""

    trial_id: int
    key: str
    values: dict[str, Value]
    result: TrialResult
    """The trial as it was claimed: running, without a value."""

    @property
    def run_id(self) -> str:
        return self.result.run_id


@dataclass(frozen=True)
class TrialGroup:
    """The trials of one grid cell or one draw, in the order of their creation."""

    sweep: Sweep
    trials: list[FrozenTrial]

    @property
    def decisive(self) -> FrozenTrial:
        """The trial that determines the state: one that is done, else running, else waiting.

        If all have failed, it is the last. Waiting duplicates of a trial that is done don't count.
        """
        ranked = (t for states in _PRECEDENCE for t in self.trials if t.state in states)
        return next(ranked, self.trials[-1])

    @property
    def state(self) -> str:
        """As in `TrialResult`."""
        trial = self.decisive
        if trial.state == TrialState.FAIL:
            return "failed" if "failure" in trial.user_attrs else "interrupted"
        return "finished" if trial.state == TrialState.COMPLETE else trial.state.name.lower()

    @property
    def value(self) -> float | None:
        """The metric of a trial that is done."""
        trial = self.decisive
        return trial.values[0] if trial.state in _DONE and trial.values else None

    @property
    def values(self) -> dict[str, Value]:
        """The values of the fields that vary; none if they have not all been drawn yet."""
        return _values(self.decisive, self.sweep)

    def result(self, values: dict[str, Value], token: str) -> TrialResult:
        """The trial with these values, in a study with this token."""
        config = self.sweep.config(values)
        varied = [n for n in self.sweep.varied if n in values and n not in ("strategy", "name")]
        attributes = self.decisive.user_attrs
        record = attributes.get("record") or attributes.get("failure") or {}
        name = re.sub(r"[^\w-]", "-", self.sweep.name, flags=re.ASCII).strip("-")[:60] or "sweep"
        old_number = _old_number(self.trials[0])  # of the first, so that the id never changes
        number = self.trials[0].number if old_number is None else old_number
        run_id = f"{name}-{token}-{number:03d}"
        return TrialResult(
            run_id=run_id,
            run_dir=self.sweep.out_dir / run_id,
            strategy=config.strategy,
            setting={n: v for n in varied if (v := getattr(config, n)) is not None},
            state=self.state,
            value=self.value,
            **{name: record[name] for name in RECORD_FIELDS if name in record},
        )


def group_trials(trials: Iterable[FrozenTrial], sweep: Sweep) -> dict[str, TrialGroup]:
    """The trials by their key, without those that do not count.

    An older version has enqueued repeated combinations of a grid too.
    """
    groups: dict[str, list[FrozenTrial]] = defaultdict(list)
    for trial in trials:
        if "surplus" not in trial.user_attrs:
            is_old = _old_number(trial) is not None
            groups[cell_key(_values(trial, sweep)) if is_old else _key(trial)].append(trial)
    is_cell = sweep.cell_keys.__contains__ if sweep.has_repeats else lambda key: True
    return {key: TrialGroup(sweep, members) for key, members in groups.items() if is_cell(key)}


def _key(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get("key") or f"draw-{trial.number}")


def _old_number(trial: FrozenTrial) -> int | None:
    """The number of a grid's cell in the order of the file, which was its key in version 0.1.0."""
    _, _, number = _key(trial).partition("cell-")
    return int(number) if number else None


def _values(trial: FrozenTrial, sweep: Sweep) -> dict[str, Value]:
    if sweep.method != "grid":
        is_drawn = len(trial.params) == len(sweep.dimensions)
        return sampling.meaning(trial.params, sweep.dimensions) if is_drawn else {}
    old_number = _old_number(trial)
    if old_number is None:
        return dict(trial.user_attrs["values"])
    # Version 0.1.0 stored a cell's values as parameters, and only the number of a listed cell.
    return dict(trial.params or dict(enumerate(sweep.listed or ())).get(old_number, {}))


def enqueue_copy(study: optuna.Study, trial: FrozenTrial, **attributes: Any) -> None:
    """Add a waiting trial with the key and values of one that failed."""
    dropped = ("owner", "record", "failure", "surplus")
    kept = {k: v for k, v in trial.user_attrs.items() if k not in dropped}
    copied = {"key": _key(trial), "copy_of": trial.number}
    copy = create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=kept | copied | attributes,
        system_attrs=trial.system_attrs,
    )
    study.add_trial(copy)
