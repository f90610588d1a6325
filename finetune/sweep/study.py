"""A sweep's study in its storage: made by one process, found by the others.

Turns a sweep and a storage into a study that all who join agree on, and in which every cell of a
grid is enqueued. Knows nothing about claims.

    >>> study, token = join(sweep, storage, num_trials=48, owner=this_process())  # doctest: +SKIP
"""

from __future__ import annotations

import json
import secrets
import time
from itertools import islice
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from finetune.sweep import sampling
from finetune.sweep.spec import Sweep
from finetune.sweep.storage import is_gone
from finetune.sweep.trials import key_of
from finetune.system.errors import ConfigError

DIRECTIONS = {"maximize": StudyDirection.MAXIMIZE, "minimize": StudyDirection.MINIMIZE}

_PATIENCE_SECONDS = 15.0


def join(
    sweep: Sweep, storage: BaseStorage, num_trials: int, owner: dict[str, Any]
) -> tuple[optuna.Study, str]:
    """The sweep's study, and the token that tells it from others of its name.

    Who makes it enqueues a grid's cells; the others wait. Raises `ConfigError` if the storage holds
    another sweep of this name.
    """
    made = True
    try:
        study = optuna.create_study(
            storage=storage, study_name=sweep.name, direction=DIRECTIONS[sweep.metric.goal]
        )
    except DuplicatedStudyError:
        made = False
        study = optuna.load_study(study_name=sweep.name, storage=storage)
    study.pruner = sampling.pruner(sweep.early_termination)
    if made:
        _sign(study, sweep, owner)
    token = _agree(study, sweep, owner)
    if sweep.method == "grid":
        if not made:
            _wait_for_cells(study)
        if _num_enqueued(study) < num_trials:
            _enqueue_missing(study, sweep, storage, num_trials)
    return study, token


def _sign(study: optuna.Study, sweep: Sweep, owner: dict[str, Any]) -> None:
    signature = {
        "token": secrets.token_hex(3),
        "source": _canonical(sweep.source),
        "owner": owner,
    }
    study.set_user_attr("sweep", signature)


def _agree(study: optuna.Study, sweep: Sweep, owner: dict[str, Any]) -> str:
    """Compare this sweep with the one in the storage; the study's token."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (signature := study.user_attrs.get("sweep")) is None:
        if time.monotonic() > deadline:  # who made it is gone
            _sign(study, sweep, owner)
        time.sleep(0.05)
    theirs, ours = json.loads(signature["source"]), json.loads(_canonical(sweep.source))
    changed = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
    if changed:
        raise ConfigError(
            f"sweep {sweep.name!r} is in this storage already, with other "
            f"{', '.join(changed)}; pass another --name to start a new one"
        )
    return str(signature["token"])


def _enqueue_missing(
    study: optuna.Study, sweep: Sweep, storage: BaseStorage, num_trials: int
) -> None:
    """Have every cell enqueued once: by the study's maker, or if it is gone, by somebody else.

    A cell that is enqueued twice all the same is harmless: the later trial is discarded.
    """
    trials = study.get_trials(deepcopy=False)
    there = {key_of(trial) for trial in trials if "surplus" not in trial.user_attrs}
    distributions = {d.name: sampling.cell_distribution(d) for d in sweep.dimensions}
    study_id = storage.get_study_id_from_name(sweep.name)
    for index, cell in enumerate(islice(sweep.cells(), num_trials)):
        key = f"cell-{index}"
        if key not in there:
            storage.create_new_trial(
                study_id,
                create_trial(
                    state=TrialState.WAITING,
                    params=cell if distributions else {},
                    distributions=distributions,
                    user_attrs={"key": key},
                ),
            )
    study.set_user_attr("num_enqueued", num_trials)


def _wait_for_cells(study: optuna.Study) -> None:
    """Until the study's maker has enqueued them, is gone, or has long not gone on."""
    maker = study.user_attrs["sweep"]["owner"]
    count, since = -1, time.monotonic()
    while _num_enqueued(study) < 0 and not is_gone(maker):
        now_there = len(study.get_trials(deepcopy=False))
        if now_there != count:
            count, since = now_there, time.monotonic()
        elif time.monotonic() - since > _PATIENCE_SECONDS:
            return
        time.sleep(0.1)


def _num_enqueued(study: optuna.Study) -> int:
    """How many cells were enqueued by somebody who got to the end of it; -1 for nobody yet."""
    return int(study.user_attrs.get("num_enqueued", -1))


def _canonical(source: object) -> str:
    return json.dumps(source, sort_keys=True, default=str)
