"""`train_and_finetune` in Python code that uses W&B itself: agents' functions, active runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.runs.run_dir import read_metrics
from tests.support.wandb_server import ENTITY, Run
from tests.tracking.conftest import PROJECT, Place, assert_history_is_complete, fixed, the_run
from tests.tracking.test_offline import read_offline

PREAMBLE = """
import json, sys
import wandb
from finetune import train_and_finetune
fields = json.loads(sys.argv[1])
"""

FUNCTION = """
def function():
    train_and_finetune(**fields)
"""

FUNCTION_WITH_INIT = """
def function():
    with wandb.init():
        train_and_finetune(**fields)
"""

AGENT = "wandb.agent(sys.argv[2], function=function)"


def call(place: Place, code: str, fields: dict[str, Any], *more: str, **environment: str) -> int:
    described = json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in fields.items()})
    process = place.start("-c", PREAMBLE + code, described, *more, **environment)
    return process.wait(120)


def by_agent(place: Place, code: str, fields: dict[str, Any], **parameters: Any) -> list[Run]:
    """The runs of a sweep of these parameters, whose agent calls the code's function."""
    sweep = place.sweep(fixed({}, **parameters))
    assert call(place, code + AGENT, fields, f"{ENTITY}/{PROJECT}/{sweep}") == 0
    return place.server.sweep_runs(sweep)


@pytest.mark.slow
@pytest.mark.parametrize("code", [FUNCTION, FUNCTION_WITH_INIT], ids=["plain", "wandb.init"])
def test_an_agent_s_function_trains_what_the_sweep_sets(
    place: Place, fields: dict[str, Any], code: str
) -> None:
    runs = by_agent(place, code, fields | {"epochs": 2}, strategy=["freeze", "scratch"])
    assert len(runs) == 2
    for run in runs:
        assert (run.state, run.summary["state"]) == ("finished", "finished")
        result = json.loads((place.run_dir(run) / "result.json").read_text())
        assert result["strategy"] == run.args["strategy"]
        assert run.config["strategy"]["value"] == run.args["strategy"]
        assert run.config["epochs"]["value"] == 2
        assert_history_is_complete(run, place.run_dir(run))
        model = run.artifact("model").files["best.ckpt"]
        assert model == (place.run_dir(run) / "best.ckpt").read_bytes()
    assert "locked by" not in place.output()


@pytest.mark.slow
@pytest.mark.parametrize("code", [FUNCTION, FUNCTION_WITH_INIT], ids=["plain", "wandb.init"])
def test_a_value_that_contradicts_the_sweep_s_is_refused(
    place: Place, fields: dict[str, Any], code: str
) -> None:
    given = fields | {"strategy": "scratch"}
    (run,) = by_agent(place, code, given, strategy="freeze", epochs=2)
    assert run.state == "failed"
    reason = "strategy: got scratch, but the W&B sweep sets freeze"
    assert reason in run.summary["reason"]
    assert not (place.path / "runs").exists()


ACTIVE = """
with wandb.init(project="mine", config={"epochs": 9, "other": 1}, mode=sys.argv[2]) as run:
    run.log({"before": 1})
    result = train_and_finetune(**fields).result
    assert wandb.run is run
    assert result.run_id == run.id
    run.log({"after": 1})
"""


def test_an_active_run_gets_config_and_rows_and_goes_on(
    place: Place, fields: dict[str, Any]
) -> None:
    assert call(place, ACTIVE, fields | {"epochs": 2}, "online") == 0
    run = the_run(place.server)
    assert (run.project, run.state, run.summary["state"]) == ("mine", "finished", "finished")
    assert run.values("before") == run.values("after") == [1]
    assert_history_is_complete(run, place.run_dir(run))
    assert run.config["epochs"]["value"] == 2
    assert run.config["other"]["value"] == 1
    assert run.config["learning_rate"]["value"] == 0.01
    assert run.tags == ["partial"]
    assert f"W&B: logging into the active run {run.name}; its files are in" in place.output()
    assert "W&B: epochs was 9 in the active run's config; it is now 2" in place.output()
    model = run.artifact("model").files["best.ckpt"]
    assert model == (place.run_dir(run) / "best.ckpt").read_bytes()


def test_the_folder_of_an_active_offline_run_is_printed(
    place: Place, fields: dict[str, Any]
) -> None:
    given = fields | {"epochs": 2}
    assert call(place, ACTIVE, given, "offline", WANDB_DIR=str(place.path / "mine")) == 0
    (log,) = place.path.glob("mine/wandb/offline-run-*/run-*.wandb")
    assert f"its files are in {log.parent} (`wandb sync` with it sends the run)" in place.output()
    rows = [row for row in read_offline(log)[0] if "val_acc" in row]
    recorded = read_metrics(next(place.path.glob("runs/*/metrics.csv")))
    assert [{key: row[key] for key in recorded[0]} for row in rows] == recorded
    assert len(rows) == 2


def test_a_disabled_active_run_disables_wandb(place: Place, fields: dict[str, Any]) -> None:
    code = """
with wandb.init(mode="disabled"):
    for _ in range(2):
        train_and_finetune(**fields)
"""
    assert call(place, code, fields | {"strategy": "freeze", "epochs": 1}) == 0
    assert not place.server.runs
    assert len(list(place.path.glob("runs/*/result.json"))) == 2


FAILING = """
from finetune.system.errors import FinetuneError
with wandb.init() as run:
    try:
        train_and_finetune(**fields, learning_rate=1e30)
    except FinetuneError:
        run.log({"after": 1})
"""


def test_a_failure_within_an_active_run_has_its_reason_and_the_run_goes_on(
    place: Place, fields: dict[str, Any]
) -> None:
    del fields["learning_rate"]
    assert call(place, FAILING, fields | {"strategy": "scratch", "patience": 0}) == 0
    run = the_run(place.server)
    assert run.summary["state"] == "failed"
    assert "diverged in epoch 0 at learning_rate 1e+30" in run.summary["reason"]
    assert run.values("after") == [1]


RESUMING = """
with wandb.init() as first:
    done = train_and_finetune(**fields).result
run_dir = f"{fields['out']}/{done.run_id}"
with wandb.init(id=first.id, resume="must"):
    train_and_finetune(resume=run_dir, epochs=3)
with wandb.init():
    train_and_finetune(resume=run_dir, epochs=4)
"""


@pytest.mark.slow
def test_a_run_resumed_within_an_active_run_has_each_row_once(
    place: Place, fields: dict[str, Any]
) -> None:
    given = {"strategy": "freeze", "epochs": 2, "patience": 0, "keep_last": True}
    assert call(place, RESUMING, fields | given) == 0
    first, second = place.server.runs.values()
    for run, num_epochs in ((first, 3), (second, 4)):
        assert run.state == "finished"
        assert run.values("epoch")[:num_epochs] == list(range(num_epochs))
        assert len(run.values("val_acc")) == num_epochs
