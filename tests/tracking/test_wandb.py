"""W&B's real client and agents against a server on loopback."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetune.model.network import build
from finetune.runs.result import read_failure
from finetune.runs.run_dir import read_metrics
from tests.conftest import ROOT
from tests.support.wandb_server import ENTITY, KEY
from tests.test_agent import as_flags
from tests.tracking.conftest import (
    PROJECT,
    Place,
    assert_history_is_complete,
    fixed,
    the_run,
    wait_until,
)
from tests.tracking.test_workspace import assert_panels_name_what_is_logged

STOP_SECONDS = 30
"""The time between SIGTERM and SIGKILL of W&B's agent."""


def assert_reports_agree(place: Place, sweep: str) -> None:
    """A report on runs fetched from W&B equals one on the run directories."""
    address = f"{ENTITY}/{PROJECT}/{sweep}"
    fetched = place.path / "fetched"
    command = ["-m", "finetune", "report", str(fetched), "--wandb", address]
    assert place.start(*command).wait(60) == 0
    runs = place.path / "runs"
    assert place.start("-m", "finetune", "report", str(runs)).wait(60) == 0
    tables = []
    for folder in (fetched, runs):
        assert (folder / "report.html").exists()
        with (folder / "runs.csv").open() as file:
            tables.append({row["run_id"]: row for row in csv.DictReader(file)})
    for row in [*tables[0].values(), *tables[1].values()]:
        del row["run_dir"]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_two_agents_run_each_cell_of_a_sweep_once(place: Place, fields: dict[str, Any]) -> None:
    sweep = place.sweep(
        fixed(fields, strategy=["freeze", "partial"], data_aug=[True, "n"], epochs=2)
    )
    agents = [place.agent(sweep) for _ in range(2)]
    assert [agent.wait(240) for agent in agents] == [0, 0]

    runs = place.server.sweep_runs(sweep)
    assert len(runs) == 4
    for run in runs:
        assert (run.state, run.num_starts) == ("finished", 1)
        result = json.loads((place.run_dir(run) / "result.json").read_text())
        assert run.values("best_val_acc")[-1] == result["best_val_acc"]
        assert result["strategy"] == run.args["strategy"]
        assert result["config"]["data_aug"] == {True: "y", "n": "n"}[run.args["data_aug"]]
        assert_history_is_complete(run, place.run_dir(run))
        assert (run.group, run.tags) == ("strategies", [run.args["strategy"]])
        assert run.display_name.startswith(f"tiny-{run.args['strategy']}-lr0.01-bs5")
    assert len({(r.args["strategy"], r.args["data_aug"]) for r in runs}) == 4
    assert "locked by" not in place.output()
    assert_reports_agree(place, sweep)
    assert_panels_name_what_is_logged(place, sweep)


def test_the_dashboard_has_the_best_model_and_its_mistakes(
    place: Place, fields: dict[str, Any]
) -> None:
    done = place.start("agent.py", *as_flags(fields | {"epochs": 2, "project": PROJECT}))
    assert done.wait(120) == 0
    run = the_run(place.server)
    result = json.loads((place.run_dir(run) / "result.json").read_text())
    assert run.project == PROJECT
    assert run.summary["best_val_acc"] == result["best_val_acc"]
    assert run.summary["best_val_loss"] == result["best_val_loss"]
    assert run.summary["best_val_macro_f1"] == result["best_val_macro_f1"]
    assert run.summary["state"] == "finished"
    assert run.config["strategy"]["value"] == "partial"
    model = run.artifact("model")
    assert "best" in model.aliases
    assert model.metadata["best_val_acc"] == result["best_val_acc"]
    assert model.files["best.ckpt"] == (place.run_dir(run) / "best.ckpt").read_bytes()
    tables = {name.split("/")[-1].rpartition("_")[0]: json.loads(content)
              for name, content in run.files.items() if name.endswith(".table.json")}  # fmt: skip
    per_class = next(v for k, v in tables.items() if k.startswith("per_class_accuracy"))
    num_right = sum(accuracy * number for _, accuracy, number in per_class["data"])
    assert num_right / 15 == pytest.approx(result["best_val_acc"])
    confusion = next(v for k, v in tables.items() if k.startswith("confusion_matrix"))
    assert sum(row[-1] for row in confusion["data"]) == 15
    mistakes = next(a for a in run.artifacts if "confident_mistakes" in a.name)
    pictures = [name for name in mistakes.files if name.endswith(".png")]
    assert len(pictures) == 15 - round(num_right)


@pytest.mark.long
def test_an_agent_runs_each_network_of_networks_yaml(
    place: Place, fields: dict[str, Any], tmp_path: Path
) -> None:
    given = yaml.safe_load((ROOT / "sweeps/networks.yaml").read_text())["parameters"]
    models = ["tiny", "tiny2"]
    for model in models:
        torch.save(build(model, 9, 64, seed=1).network.state_dict(), tmp_path / f"{model}.pth")
    strategies = given["strategy"]["values"][-2:]
    changed = {"weights": str(tmp_path / "{model}.pth"), "epochs": 4, "lr_schedule": "cosine"}
    parameters = fixed(fields, **changed, model=models, strategy=strategies)
    sweep = place.sweep(given | parameters | {"learning_rate": {"value": 0.03}})
    assert place.agent(sweep).wait(300) == 0
    runs = list(place.server.runs.values())
    assert {run.state for run in runs} == {"finished"}
    found = [(run.config["model"]["value"], run.config["strategy"]["value"]) for run in runs]
    assert sorted(found) == sorted((m, s) for m in models for s in strategies)
    assert all(any("lr/fc" in row for row in run.history) for run in runs)


def test_parameters_without_flags_come_from_the_sweep(place: Place, fields: dict[str, Any]) -> None:
    sweep = place.sweep(
        fixed(fields, strategy="freeze", epochs=1, momentum=0.5),
        command=["${env}", "${interpreter}", "${program}"],
    )
    assert place.agent(sweep).wait(120) == 0
    (run,) = place.server.sweep_runs(sweep)
    result = json.loads((place.run_dir(run) / "result.json").read_text())
    assert (result["strategy"], result["config"]["momentum"]) == ("freeze", 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "${env} ${interpreter} -m agent ${args_no_hyphens} ${args_json} ${args_json_file}",
        "${interpreter} ${program} --patience=${envvar:WAIT} ${args_dict} ${args_no_equals} "
        "${args_append_hydra} ${args_override_hydra} ${args_no_boolean_flags}",
    ],
    ids=["module", "program"],
)
def test_the_real_agent_starts_runs_with_every_macro(
    place: Place, fields: dict[str, Any], command: str
) -> None:
    changed = {"strategy": "freeze", "epochs": 1, "data_aug": True, "skip_unreadable": False}
    sweep = place.sweep(fixed(fields, **changed, name="two words"), command=command.split())
    check = place.start("-m", "finetune", "sweep", "--check", f"{place.path}/sweep.yaml", WAIT="7")
    assert check.wait(60) == 0
    assert place.agent(sweep, WAIT="7").wait(120) == 0
    (run,) = place.server.sweep_runs(sweep)
    assert run.state == "finished"
    result = json.loads((place.run_dir(run) / "result.json").read_text())
    made = {name: result["config"][name] for name in (*changed, "name", "learning_rate")}
    assert made == changed | {"data_aug": "y", "name": "two words", "learning_rate": 0.01}
    assert result["config"]["patience"] == (7 if "WAIT" in command else 3)


@pytest.mark.slow
def test_a_stopped_run_is_complete_on_the_server_in_time(
    place: Place, fields: dict[str, Any]
) -> None:
    sweep = place.sweep(fixed(fields, strategy="scratch", epochs=500, patience=0))
    agent = place.agent(sweep)
    (run,) = place.server.sweep_runs(sweep)
    wait_until(lambda: len(run.history) > 2)
    place.server.stop(run.name)
    stopped = time.monotonic()
    wait_until(lambda: run.exit_code is not None, STOP_SECONDS + 10)
    assert time.monotonic() - stopped < STOP_SECONDS + 5  # a heartbeat tells the agent
    assert agent.wait(60) == 0
    assert (run.state, run.exit_code) == ("failed", 128 + signal.SIGTERM)
    assert (run.summary["state"], run.summary["reason"]) == ("stopped", "stopped by SIGTERM")
    assert_history_is_complete(run, place.run_dir(run))
    model = run.artifact("model").files["best.ckpt"]
    assert model == (place.run_dir(run) / "best.ckpt").read_bytes()
    failure = read_failure(place.run_dir(run) / "failure.json")
    assert failure and failure["state"] == "stopped"


@pytest.mark.long
def test_ten_stops_in_a_row_do_not_end_the_agent(place: Place, fields: dict[str, Any]) -> None:
    changed = {"strategy": "scratch", "image_size": 32, "epochs": 500, "patience": 0}
    sweep = place.sweep(fixed(fields, **changed, seed=list(range(11))))
    agent = place.agent(sweep)
    runs = place.server.sweep_runs(sweep)
    for run in runs:
        wait_until(lambda run=run: len(run.history) > 0)
        assert agent.poll() is None
        place.server.stop(run.name)
        wait_until(lambda run=run: run.exit_code is not None, STOP_SECONDS + 10)
    assert agent.wait(60) == 0
    assert [run.summary["state"] for run in runs] == ["stopped"] * 11


@pytest.mark.slow
@pytest.mark.real_network  # whose epochs take long enough to be interrupted
def test_a_preempted_run_is_queued_again_and_gives_the_uninterrupted_result(
    place: Place, fields: dict[str, Any], tmp_path: Path
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho called > {tmp_path}/scontrol-was-called\n")
    scontrol.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NAME": "finetune",
        "PATH": f"{scontrol.parent}{os.pathsep}{place.environment['PATH']}",
    }
    changed = {"strategy": "gradual", "epochs": 15, "patience": 0}
    sweep = place.sweep(fixed(fields, **changed))
    (run,) = place.server.sweep_runs(sweep)
    first = place.agent(sweep, "-f", "--count", "1", **slurm)
    half_written = place.run_dir(run)
    wait_until((half_written / "last.ckpt").exists)
    wait_until(lambda: any(half_written.glob(".last.ckpt.*.tmp")), look=0.001)
    first.send_signal(signal.SIGUSR1)
    first.wait(60)
    assert (run.state, run.exit_code, run.num_starts) == ("preempted", 128 + signal.SIGUSR1, 1)
    assert place.server.sweeps[sweep].waiting == [run.name]
    failure = read_failure(place.run_dir(run) / "failure.json")
    assert failure and failure["state"] == "preempted"
    assert not (tmp_path / "scontrol-was-called").exists()

    second = place.agent(sweep, "-f", "--count", "1", **slurm)
    assert second.wait(120) == 0
    assert (run.state, run.num_starts) == ("finished", 2)
    assert (run.summary["state"], run.summary["reason"]) == ("finished", "")
    assert_history_is_complete(run, place.run_dir(run))
    assert not (place.run_dir(run) / "failure.json").exists()

    flags = as_flags(fields | changed | {"out": tmp_path / "uninterrupted"})
    assert place.start("agent.py", *flags, WANDB_MODE="disabled").wait(120) == 0
    (other,) = (tmp_path / "uninterrupted").iterdir()
    ours, theirs = (read_metrics(d / "metrics.csv") for d in (place.run_dir(run), other))
    for row in ours + theirs:
        del row["images_per_second"]
    assert ours == theirs


@pytest.mark.slow
def test_a_stop_while_the_result_is_sent_changes_nothing(
    place: Place, fields: dict[str, Any]
) -> None:
    place.server.delay("CommitArtifact", seconds=10)
    process = place.start("agent.py", *as_flags(fields | {"epochs": 1}))
    wait_until(lambda: any(r.summary.get("state") for r in place.server.runs.values()))
    process.terminate()
    # The client may send the summary last; then the stop comes after the end.
    assert process.wait(STOP_SECONDS) in (-signal.SIGTERM, 0)
    run = the_run(place.server)
    assert (run.state, run.summary["state"]) == ("finished", "finished")
    assert (place.run_dir(run) / "result.json").exists()
    assert not (place.run_dir(run) / "failure.json").exists()
    assert run.artifact("model").files


@pytest.mark.slow
def test_a_stopped_run_ends_in_time_if_the_server_is_silent(
    place: Place, fields: dict[str, Any]
) -> None:
    process = place.start("agent.py", *as_flags(fields | {"epochs": 5000, "patience": 0}))
    wait_until(lambda: any(run.history for run in place.server.runs.values()))
    place.server.be_silent(90)
    process.terminate()
    assert process.wait(STOP_SECONDS) == -signal.SIGTERM
    failure = read_failure(place.run_dir(the_run(place.server)) / "failure.json")
    assert failure and failure["state"] == "stopped"
    assert "wandb sync" in place.output()


@pytest.mark.slow
def test_a_run_finishes_if_the_sweep_s_name_is_unavailable(
    place: Place, fields: dict[str, Any]
) -> None:
    sweep = place.sweep(fixed(fields, strategy="freeze", epochs=1))
    place.server.fail("GetSweep", times=1000)
    assert place.agent(sweep).wait(120) == 0
    (run,) = place.server.sweep_runs(sweep)
    assert (run.state, run.group) == ("finished", sweep)


@pytest.mark.slow
def test_no_data_is_lost_in_server_faults(place: Place, fields: dict[str, Any]) -> None:
    server = place.server
    server.fail("UpsertBucket", times=2)
    server.fail("/upload/", status=503, times=3)
    server.drop("file_stream", times=2)
    server.delay("file_stream|CreateArtifact", seconds=2, times=3)
    done = place.start("agent.py", *as_flags(fields))
    assert done.wait(240) == 0
    assert not any(fault.times for fault in server.faults)
    run = the_run(server)
    assert run.state == "finished"
    assert_history_is_complete(run, place.run_dir(run))
    model = run.artifact("model").files["best.ckpt"]
    assert model == (place.run_dir(run) / "best.ckpt").read_bytes()


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(10, marks=pytest.mark.slow), pytest.param(60, marks=pytest.mark.long)],
)
def test_no_data_is_lost_while_the_server_is_silent(
    seconds: int, place: Place, fields: dict[str, Any]
) -> None:
    done = place.start("agent.py", *as_flags(fields | {"epochs": 12, "patience": 0}))
    wait_until(lambda: any(run.history for run in place.server.runs.values()))
    place.server.be_silent(seconds)
    assert done.wait(300) == 0
    run = the_run(place.server)
    assert run.state == "finished"
    assert_history_is_complete(run, place.run_dir(run))


@pytest.mark.parametrize(
    ("changed", "seconds"),
    [
        pytest.param({"WANDB_INIT_TIMEOUT": "5"}, 45, marks=pytest.mark.slow),
        pytest.param({}, 90, marks=pytest.mark.long),
    ],
)
def test_a_server_that_is_unreachable_at_the_start_is_reported(
    place: Place, fields: dict[str, Any], changed: dict[str, str], seconds: float
) -> None:
    started = time.monotonic()
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", **changed}
    gone = place.start("agent.py", *as_flags(fields), **nobody)
    assert gone.wait(120) == 1
    assert time.monotonic() - started < seconds
    assert "error: W&B: " in place.output()
    assert "WANDB_MODE=offline" in place.output()
    assert "Traceback" not in place.output()


@pytest.mark.slow
def test_failed_runs_have_a_reason_and_the_next_one_starts(
    place: Place, fields: dict[str, Any]
) -> None:
    sweep = place.sweep(fixed(fields, learning_rate=["fast", 1e30, 0.01], epochs=2))
    assert place.agent(sweep).wait(240) == 0
    wrong, diverged, good = place.server.sweep_runs(sweep)
    assert (wrong.state, wrong.exit_code) == ("failed", 2)
    assert "learning_rate: got 'fast'" in wrong.summary["reason"]
    assert (diverged.state, diverged.exit_code) == ("failed", 1)
    assert "diverged in epoch 0 at learning_rate 1e+30" in diverged.summary["reason"]
    failure = read_failure(place.run_dir(diverged) / "failure.json")
    assert failure and failure["reason"] == diverged.summary["reason"]
    assert good.state == "finished"


def test_a_killed_and_resumed_run_has_a_complete_history(
    place: Place, fields: dict[str, Any]
) -> None:
    killed = place.start("agent.py", *as_flags(fields | {"epochs": 30, "patience": 0}))
    runs = place.path / "runs"
    wait_until(lambda: any(len(read_metrics(p)) >= 3 for p in runs.glob("*/metrics.csv")))
    killed.kill()
    killed.wait()
    run = the_run(place.server)
    moved = shutil.copytree(fields["data_dir"], place.path / "moved")
    resume = [f"--resume={place.run_dir(run)}", f"--data_dir={moved}"]
    assert place.start("agent.py", *resume).wait(120) == 0
    assert run.config["data_dir"]["value"] == str(moved)
    assert run.state == "finished"
    assert_history_is_complete(run, place.run_dir(run))


@pytest.mark.skipif(
    version("wandb").startswith("0.21."), reason="its sync replaces an earlier attempt's rows"
)
def test_a_resumed_offline_run_is_synced_completely(place: Place, fields: dict[str, Any]) -> None:
    flags = as_flags(fields | {"epochs": 12, "patience": 0, "group": "apart"})
    interrupted = place.start("agent.py", *flags, WANDB_MODE="offline")
    runs = place.path / "runs"
    wait_until(lambda: any(len(read_metrics(p)) >= 3 for p in runs.glob("*/metrics.csv")))
    interrupted.terminate()
    assert interrupted.wait(STOP_SECONDS) == -signal.SIGTERM
    (run_dir,) = runs.iterdir()
    assert place.start("agent.py", f"--resume={run_dir}", WANDB_MODE="offline").wait(120) == 0
    attempts = sorted(map(str, run_dir.glob("wandb/offline-run-*")))
    assert len(attempts) == 2
    assert place.start("-m", "wandb", "sync", *attempts).wait(120) == 0
    run = the_run(place.server)
    assert (run.state, run.group, run.summary["state"]) == ("finished", "apart", "finished")
    assert_history_is_complete(run, run_dir)


@pytest.mark.slow
@pytest.mark.real_network  # whose epochs take long enough to be interrupted
def test_the_stop_button_ends_a_run_with_its_state_and_model(
    place: Place, fields: dict[str, Any]
) -> None:
    process = place.start("agent.py", *as_flags(fields | {"epochs": 500, "patience": 0}))
    wait_until(lambda: any(run.history for run in place.server.runs.values()))
    run = the_run(place.server)
    place.server.stop(run.name)
    assert process.wait(60) == -signal.SIGINT
    assert (run.state, run.summary["state"]) == ("failed", "stopped")
    assert_history_is_complete(run, place.run_dir(run))
    assert run.artifact("model").files


@pytest.mark.slow
@pytest.mark.parametrize("after", ["imports", "W&B's start"])
def test_a_stop_before_the_first_epoch_is_reported(
    place: Place, fields: dict[str, Any], after: str
) -> None:
    sweep = place.server.add_sweep(
        {"method": "grid", "parameters": {}, "program": "agent.py"}, PROJECT
    )
    (run,) = place.server.sweep_runs(sweep.name)
    by_agent = {"WANDB_SWEEP_ID": sweep.name, "WANDB_RUN_ID": run.name, "WANDB_PROJECT": PROJECT}
    if after == "W&B's start":
        place.server.delay("UpsertBucket", seconds=5)
    python = sys.executable if after == "imports" else ""  # whose imports take seconds
    process = place.start("agent.py", *as_flags(fields), python=python, **by_agent)
    if after == "imports":
        time.sleep(1.5)
    else:
        wait_until(lambda: not place.server.faults[0].times)
        time.sleep(0.5)
    process.terminate()
    assert process.wait(STOP_SECONDS) == -signal.SIGTERM
    assert (run.state, run.history) == ("failed", [])


@pytest.mark.slow
def test_gpus_starts_an_agent_on_each_device(place: Place, fields: dict[str, Any]) -> None:
    sweep = place.sweep(fixed(fields, strategy="freeze", epochs=1, seed=[1, 2]))
    address = f"{ENTITY}/{PROJECT}/{sweep}"
    done = place.start("-m", "finetune", "gpus", address, "--count=1", CUDA_VISIBLE_DEVICES="3,5")
    assert done.wait(180) == 0
    assert [run.state for run in place.server.sweep_runs(sweep)] == ["finished"] * 2
    for name in ("[gpu 3]", "[gpu 5]"):
        lines = [line for line in place.output().splitlines() if line.startswith(name)]
        assert any("best val_acc" in line for line in lines)
        assert lines[-1] == f"{name} the agent has ended"


@pytest.mark.slow
def test_ctrl_c_ends_the_runs_of_all_gpus_with_their_state(
    place: Place, fields: dict[str, Any]
) -> None:
    sweep = place.sweep(fixed(fields, strategy="freeze", epochs=5000, patience=0, seed=[1, 2]))
    address = f"{ENTITY}/{PROJECT}/{sweep}"
    process = place.start("-m", "finetune", "gpus", address, CUDA_VISIBLE_DEVICES="0,1")
    runs = place.server.sweep_runs(sweep)
    wait_until(lambda: all(run.history for run in runs))
    process.send_signal(signal.SIGINT)
    assert process.wait(STOP_SECONDS + 15) == -signal.SIGINT
    for run in runs:
        assert run.summary["state"] == "stopped"
        assert_history_is_complete(run, place.run_dir(run))


@pytest.mark.slow
def test_runs_of_a_preempted_machine_are_queued_again(place: Place, fields: dict[str, Any]) -> None:
    sweep = place.sweep(fixed(fields, strategy="freeze", epochs=5000, patience=0))
    process = place.start("-m", "finetune", "gpus", f"{ENTITY}/{PROJECT}/{sweep}")
    (run,) = place.server.sweep_runs(sweep)
    wait_until(lambda: len(run.history) > 0)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(STOP_SECONDS + 15) == -signal.SIGUSR1
    assert (run.state, run.summary["state"]) == ("preempted", "preempted")
    assert place.server.sweeps[sweep].waiting == [run.name]


def test_an_agent_that_fails_is_reported(place: Place) -> None:
    gone = place.start("-m", "finetune", "gpus", f"{ENTITY}/{PROJECT}/nosuchsweep")
    assert gone.wait(60) == 1
    assert "[cpu] the agent has failed: exit code" in place.output()


def test_the_key_is_in_no_file_and_no_request_body(place: Place, fields: dict[str, Any]) -> None:
    done = place.start("agent.py", *as_flags(fields | {"epochs": 1}), A_SECRET="hush-hush")
    assert done.wait(120) == 0
    run = the_run(place.server)
    sent = b"".join([*place.server.bodies, *run.files.values()])
    sent += b"".join(content for a in run.artifacts for content in a.files.values())
    kept = b"".join(p.read_bytes() for p in place.path.rglob("*") if p.is_file())
    for secret in (KEY.encode(), b"hush-hush"):
        assert secret not in sent
        assert secret not in kept


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm-offline.sbatch"])
def test_slurm_scripts_have_valid_syntax(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "sweeps" / script], check=True)
