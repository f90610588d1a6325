"""A sweep's Optuna study: created by one process, joined by the others."""

import json
import math
import secrets
import time
from itertools import islice
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial

from finetune.sweep import sampling
from finetune.sweep.spec import Sweep, cell_key
from finetune.sweep.storage import has_ended
from finetune.sweep.trials import group_trials
from finetune.system.errors import ConfigError

_TIMEOUT_SECONDS = 15.0


def join_study(
    sweep: Sweep, storage: BaseStorage, num_trials: int, owner: dict[str, Any]
) -> tuple[optuna.Study, str]:
    """The sweep's study, and the token that distinguishes it from other studies of this name.

    The process that creates it enqueues a grid's cells; the others wait for that. Another sweep of
    this name is replaced if none of its trials is running, finished or pruned; else raises
    `ConfigError`.
    """
    study, is_creator = _create_or_load(sweep, storage, owner)
    if (changed := _changes(study, sweep, owner)) and _has_no_result(study):
        optuna.delete_study(study_name=sweep.name, storage=storage)
        study, is_creator = _create_or_load(sweep, storage, owner)
        changed = _changes(study, sweep, owner)
    if changed:
        problem = f"this storage has a sweep {sweep.name!r} with other {', '.join(changed)}"
        raise ConfigError(f"{problem}; pass another --name to start a new one")
    token = str(study.user_attrs["sweep"]["token"])
    study.pruner = sampling.pruner(sweep.early_termination)
    if sweep.method == "grid":
        if not is_creator:
            _wait_for_cells(study)
        if _num_enqueued(study) < num_trials:
            _enqueue_missing_cells(study, sweep, num_trials)
    return study, token


def _create_or_load(
    sweep: Sweep, storage: BaseStorage, owner: dict[str, Any]
) -> tuple[optuna.Study, bool]:
    """The study of the sweep's name, and whether this process has created it."""
    direction = optuna.study.StudyDirection[sweep.metric.goal.upper()]
    try:
        study = optuna.create_study(study_name=sweep.name, storage=storage, direction=direction)
    except DuplicatedStudyError:
        return optuna.load_study(study_name=sweep.name, storage=storage), False
    _describe(study, sweep, owner)
    return study, True


def _has_no_result(study: optuna.Study) -> bool:
    """Whether no trial is finished or pruned, nor running in a process that is alive."""
    for trial in study.get_trials(deepcopy=False):
        is_running = trial.state == TrialState.RUNNING
        if is_running and not has_ended(trial.user_attrs.get("owner", {})):
            return False
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            return False
    return True


def _describe(study: optuna.Study, sweep: Sweep, owner: dict[str, Any]) -> None:
    source = json.dumps(sweep.source, sort_keys=True, default=str)
    token = secrets.token_hex(3)
    study.set_user_attr("sweep", {"token": token, "source": source, "owner": owner})


def _changes(study: optuna.Study, sweep: Sweep, owner: dict[str, Any]) -> list[str]:
    """What differs between this sweep and the one in the storage, by name."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while (description := study.user_attrs.get("sweep")) is None:
        if time.monotonic() > deadline:  # the process that created the study has ended
            _describe(study, sweep, owner)
        time.sleep(0.05)
    stored = json.loads(description["source"])
    given = json.loads(json.dumps(sweep.source, default=str))
    changed = _different(stored, given)
    if "parameters" in changed:
        pair = [source.get("parameters") or {} for source in (stored, given)]
        names = ", ".join(_different(*pair))
        changed[changed.index("parameters")] = f"parameters ({names})"
    return changed


def _different(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    return sorted(k for k in first.keys() | second.keys() if first.get(k) != second.get(k))


def _enqueue_missing_cells(study: optuna.Study, sweep: Sweep, num_trials: int) -> None:
    """Enqueue cells that have no trial yet, in the order of the file, up to `num_trials` in all.

    Two processes may enqueue the same cell; its later trial is discarded once the first is done.
    """
    keys = set(group_trials(study.get_trials(deepcopy=False), sweep))
    dimensions = sweep.dimensions
    steps: dict[str, Any] = {d.name: CategoricalDistribution(d.steps or ()) for d in dimensions}
    missing = ((key, cell) for cell in sweep.cells() if (key := cell_key(cell)) not in keys)
    for key, cell in islice(missing, max(0, num_trials - len(keys))):
        keys.add(key)
        trial = create_trial(
            state=TrialState.WAITING,
            params=cell if steps else {},  # for other tools that read the study
            distributions=steps,
            user_attrs={"key": key, "values": cell},
        )
        study.add_trial(trial)
    study.set_user_attr("num_enqueued", num_trials)


def _wait_for_cells(study: optuna.Study) -> None:
    """Wait until the creator has enqueued all cells, has ended, or enqueues no more of them."""
    creator = study.user_attrs["sweep"]["owner"]
    num_trials, deadline = -1, math.inf
    while _num_enqueued(study) < 0 and not has_ended(creator) and time.monotonic() < deadline:
        if (found := len(study.get_trials(deepcopy=False))) != num_trials:
            num_trials, deadline = found, time.monotonic() + _TIMEOUT_SECONDS
        time.sleep(0.1)


def _num_enqueued(study: optuna.Study) -> int:
    """How many cells a process has enqueued; -1 if none has enqueued all of its own yet."""
    return int(study.user_attrs.get("num_enqueued", -1))
