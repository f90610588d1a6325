"""What trials tell: their key, how the key stands, and the copy that takes a failed one's place.

Turns Optuna's trials into a sweep's terms. Knows nothing about who holds a trial or why it ended.

    >>> number_of("cell-3")
    3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from finetune.sweep.distributions import Value

DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class TrialStatus:
    """What is known of a key: its state, and what its accepted or last trial left."""

    key: str
    state: str
    """finished, pruned, failed, running, waiting or lost (cut off, not waiting again yet)."""
    run_id: str
    values: dict[str, Value]
    value: float | None
    record: dict[str, Any]
    """Whatever `finish` was given."""


def key_of(trial: FrozenTrial) -> str:
    """Its cell, or its draw: what it shares with its copies."""
    return str(trial.user_attrs.get("key") or f"draw-{trial.number}")


def number_of(key: str) -> int:
    return int(key.rpartition("-")[2])


def decided(trials: list[FrozenTrial]) -> tuple[str, FrozenTrial]:
    """The key's state, as in `TrialStatus`, and the trial that decides it."""
    done = [t for t in trials if t.state in DONE]
    live = [t for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    trial = (done or live or trials[-1:])[0]
    if done:
        return "finished" if trial.state == TrialState.COMPLETE else "pruned", trial
    if live:
        return trial.state.name.lower(), trial
    return "failed" if "failure" in trial.user_attrs else "lost", trial


def copy(storage: BaseStorage, study_id: int, trial: FrozenTrial, **attributes: Any) -> None:
    """A waiting trial with the same key and values as one that failed."""
    left_behind = ("owner", "record", "failure", "surplus")
    kept = {k: v for k, v in trial.user_attrs.items() if k not in left_behind}
    storage.create_new_trial(
        study_id,
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={**kept, "key": key_of(trial), "copy_of": trial.number, **attributes},
            system_attrs=trial.system_attrs,
        ),
    )


def copy_stale(study: optuna.Study, trial: FrozenTrial) -> None:
    """What Optuna calls for a trial that lost its heartbeat."""
    storage = study._storage
    copy(storage, storage.get_study_id_from_name(study.study_name), trial)
