"""W&B runs of version 0.1.0 are fetched, reported and resumed."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.runs.result import METRICS, read_failure
from finetune.runs.run_dir import read_metrics
from tests.conftest import ROOT
from tests.support.wandb_server import Artifact, Run, Sweep, WandbServer
from tests.tracking.conftest import PROJECT, Place
from tests.tracking.test_wandb import assert_reports_agree

FOLDER = "finetune"  # of a run's W&B files in version 0.1.0
UPLOADED = ("metrics.csv", "predictions.npz", "result.json")
# agent.py with the small network of these files, which was a ResNet18 by name.
AGENT = """
import runpy
from finetune.config.backbones import BACKBONES
from tests.support.tiny_network import TINY
BACKBONES["resnet18"] = TINY
runpy.run_path("agent.py", run_name="__main__")
"""


@pytest.fixture
def old(place: Place) -> Path:
    """The run directories of version 0.1.0, with their paths replaced."""
    folder, runs_dir = place.path / "old", place.path / "runs"
    shutil.copytree(ROOT / "tests/old_formats/v0_1_0", folder)
    shutil.copytree(folder / "runs", runs_dir)
    for path in (*runs_dir.glob("*/config.yaml"), *runs_dir.glob("*/result.json")):
        text = path.read_text().replace("/srv/v0_1_0/runs", str(runs_dir))
        path.write_text(text.replace("/srv/v0_1_0", str(folder)))
    return runs_dir


def as_stored(values: dict[str, Any]) -> dict[str, Any]:
    """Values as W&B's server stores them: a whole number has no fraction."""
    return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in values.items()}


def end_of(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What version 0.1.0 added to the summary at a run's end, and the model's metadata."""
    if (failure := read_failure(run_dir / "failure.json")) is not None:
        state = {"state": failure["state"]}
        return state | {"reason": failure["reason"]}, state
    result = json.loads((run_dir / "result.json").read_text())
    names = ("best_val_acc", "best_val_loss", "best_epoch", "stopped_early")
    best = {name: result[name] for name in names}
    classes = {"strategy": result["strategy"], "class_names": result["class_names"]}
    return best | {"state": "finished", "reason": ""}, best | classes


def put_run(
    server: WandbServer, run_dir: Path, sweep: str | None = None, num_sent: int | None = None
) -> Run:
    """Give the server what version 0.1.0 sent of this run; of the epochs the first `num_sent`."""
    fields = yaml.safe_load((run_dir / "config.yaml").read_text())
    end, metadata = end_of(run_dir)
    run = server.runs[run_dir.name] = Run(run_dir.name, PROJECT, sweep, num_starts=1)
    run.display_name, run.tags = fields["name"], [fields["strategy"]]
    run.config = {name: {"value": value} for name, value in as_stored(fields).items()}
    run.config["_wandb"] = {"value": {"cli_version": "0.31.0"}}
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [as_stored({k: float(v) for k, v in row.items()}) for row in csv.DictReader(file)]
    run.history = [row | {"_step": i, "_runtime": i + 0.5} for i, row in enumerate(rows[:num_sent])]
    run.summary = (dict(run.history[-1]) if run.history else {}) | end
    run.state, run.exit_code = "failed", 143
    if end["state"] == "finished":
        run.state, run.exit_code = "finished", 0
        run.history.append({"_step": len(rows), "per_class_accuracy": {"_type": "table-file"}})
    for name in UPLOADED:
        if (run_dir / name).exists():
            run.files[f"{FOLDER}/{name}"] = (run_dir / name).read_bytes()
    model = Artifact(
        f"model-{run.name}", f"finetune-{run.name}", "model", metadata, ["best"], run.name,
        state="COMMITTED", files={"best.ckpt": (run_dir / "best.ckpt").read_bytes()},
    )  # fmt: skip
    server.artifacts[model.id] = model
    run.artifacts.append(model)
    return run


def put_sweep(server: WandbServer) -> Sweep:
    """A sweep without runs of its own."""
    content = {
        "method": "grid",
        "parameters": {"strategy": {"values": []}},
        "command": ["${env}", "python", "-c", AGENT, "${args}"],
    }
    return server.add_sweep(content, PROJECT)


def rows_without_f1(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    names = [name for name in METRICS if name != "val_macro_f1"]
    return [{name: row[name] for name in names} for row in rows]


def assert_resumed(run: Run, run_dir: Path) -> None:
    """The server has each of the run's epochs once, and its end."""
    assert (run.state, run.num_starts) == ("finished", 2)
    assert (run.summary["state"], run.summary["reason"]) == ("finished", "")
    logged = [row for row in run.history if "val_acc" in row]
    assert [row["epoch"] for row in logged] == [0, 1, 2, 3]
    assert ["val_macro_f1" in row for row in logged] == [False, False, True, True]
    assert rows_without_f1(logged) == rows_without_f1(read_metrics(run_dir / "metrics.csv"))
    assert [row["_step"] for row in run.history] == [0, 1, 2, 3, 4]
    result = json.loads((run_dir / "result.json").read_text())
    assert run.summary["best_val_acc"] == result["best_val_acc"]
    assert json.loads(run.files[f"{FOLDER}/result.json"]) == result
    before, after = (artifact for artifact in run.artifacts if artifact.kind == "model")
    assert (before.name, before.metadata) == (after.name, {"state": "stopped"})
    assert after.files["best.ckpt"] == (run_dir / "best.ckpt").read_bytes()


def test_a_sweep_of_version_0_1_0_is_fetched_and_reported(place: Place, old: Path) -> None:
    sweep = put_sweep(place.server).name
    for run_dir in old.iterdir():
        put_run(place.server, run_dir, sweep)
    assert_reports_agree(place, sweep)
    with (place.path / "fetched" / "runs.csv").open(newline="") as file:
        rows = {row["run_id"]: row for row in csv.DictReader(file)}
    interrupted = rows.pop("interrupted")
    assert (interrupted["state"], interrupted["reason"]) == ("stopped", "stopped by SIGTERM")
    assert rows.keys() == {"freeze", "gradual", "whole"}
    for name, row in rows.items():
        result = json.loads((old / name / "result.json").read_text())
        assert (row["state"], row["strategy"]) == ("finished", result["strategy"])
        assert float(row["best_val_acc"]) == result["best_val_acc"]


@pytest.mark.parametrize("num_sent", [0, 1, 2])
def test_an_interrupted_run_of_version_0_1_0_is_resumed(
    num_sent: int, place: Place, old: Path
) -> None:
    run = put_run(place.server, old / "interrupted", num_sent=num_sent)
    assert place.start("-c", AGENT, f"--resume={old / 'interrupted'}").wait(120) == 0
    assert list(place.server.runs) == ["interrupted"]
    assert_resumed(run, old / "interrupted")


def test_a_preempted_run_of_version_0_1_0_is_resumed_by_an_agent(place: Place, old: Path) -> None:
    sweep = put_sweep(place.server)
    run = put_run(place.server, old / "interrupted", sweep.name)
    run.args = {name: field["value"] for name, field in run.config.items() if name[0] != "_"}
    assert run.args["cache"] == "on"
    run.state = "preempted"
    sweep.waiting.append(run.name)
    assert place.agent(sweep.name).wait(120) == 0
    assert list(place.server.runs) == ["interrupted"]
    assert_resumed(run, old / "interrupted")


def test_epochs_that_were_added_to_a_finished_run_without_wandb_are_logged_later(
    place: Place, old: Path
) -> None:
    run, run_dir = put_run(place.server, old / "whole"), old / "whole"
    with (run_dir / "config.yaml").open("a") as file:
        file.write("keep_last: true\n")
    resume = ("-c", AGENT, f"--resume={run_dir}")
    assert place.start(*resume, "--epochs=5", WANDB_MODE="disabled").wait(120) == 0
    assert place.start(*resume, "--epochs=6").wait(120) == 0
    logged = [row for row in run.history if "val_acc" in row]
    assert rows_without_f1(logged) == rows_without_f1(read_metrics(run_dir / "metrics.csv"))
    assert len(logged) == 6
