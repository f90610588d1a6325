"""Runs that Slurm, torchrun or another launcher starts, with its variables in the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.runs.run_dir import read_metrics
from tests.conftest import ROOT
from tests.test_agent import agent, as_flags
from tests.tracking.conftest import Place, assert_history_is_complete, fixed
from tests.tracking.test_offline import read_offline


@pytest.mark.slow
def test_four_tasks_of_a_slurm_job_give_four_complete_runs(
    place: Place, fields: dict[str, Any]
) -> None:
    sweep = place.sweep(fixed(fields, strategy="freeze", epochs=2, seed=[1, 2, 3, 4]))
    job = {
        # Lightning reads the rank at its import, so this needs processes that import it.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "finetune", "SLURM_STEP_ID": "0"},
        **{"SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_TASKS_PER_NODE": "4"},
        **{"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node1"},
    }
    tasks = [
        place.agent(sweep, "-f", "--count=1", SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **job)
        for i in range(4)
    ]
    assert [task.wait(240) for task in tasks] == [0] * 4
    runs = place.server.sweep_runs(sweep)
    assert len(runs) == 4
    for run in runs:
        assert (run.state, run.summary["state"]) == ("finished", "finished")
        assert_history_is_complete(run, place.run_dir(run))
        model = run.artifact("model").files["best.ckpt"]
        assert model == (place.run_dir(run) / "best.ckpt").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [{"SLURM_PROCID": "1"}, {"RANK": "1", "LOCAL_RANK": ""}], ids=str)
def test_an_offline_run_has_every_row_whatever_its_rank(
    ranks: dict[str, str], fields: dict[str, Any], tmp_path: Path
) -> None:
    flags = as_flags(fields | {"strategy": "freeze", "epochs": 2})
    # Lightning reads the rank at its import, so this needs a process that imports it.
    done = agent(*flags, python=sys.executable, WANDB_MODE="offline", **ranks)
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "runs").glob("*/wandb/offline-run-*/run-*.wandb")
    rows = [row for row in read_offline(log)[0] if "val_acc" in row]
    assert [row["epoch"] for row in rows] == [0, 1]
    recorded = read_metrics(next(tmp_path.glob("runs/*/metrics.csv")))
    assert [{key: row[key] for key in recorded[0]} for row in rows] == recorded


@pytest.mark.slow
def test_several_processes_of_torchrun_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    flags = as_flags(fields | {"strategy": "freeze", "epochs": 1})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node=2", "agent.py", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ,
        check=False,
        timeout=120,
    )
    assert done.returncode != 0
    assert "error: torchrun: started 2 processes" in done.stderr
    assert "exitcode  : 2 " in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("num_processes", "code"), [("2", 2), ("1", 0)])
def test_several_processes_of_torchrun_are_refused_by_code_2(
    num_processes: str, code: int, fields: dict[str, Any]
) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "0", "WORLD_SIZE": num_processes}
    done = agent(*as_flags(fields | {"strategy": "freeze", "epochs": 1}), **torchrun)
    assert done.returncode == code
    assert done.stderr.startswith("error: torchrun: started 2 processes") == (code == 2)
    assert "Traceback" not in done.stderr
