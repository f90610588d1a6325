"""Trials of a local sweep that train their heads together have a W&B run each."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from finetune.runs.run_dir import RunDir
from tests.tracking.conftest import Place, assert_history_is_complete
from tests.tracking.test_wandb import fixed


@pytest.mark.slow
def test_each_trial_has_its_history_result_and_model_on_the_server(
    place: Place, fields: dict[str, Any]
) -> None:
    given = fields | {"strategy": "freeze", "epochs": 3}
    content = {
        **{"program": "agent.py", "method": "grid", "name": "heads"},
        "metric": {"name": "best_val_acc", "goal": "maximize"},
        "parameters": fixed(given, learning_rate=[0.1, 0.01, 3e38]),
    }
    file = place.path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    command = ["-m", "finetune", "sweep", str(file), "--out", str(place.path / "runs")]
    assert place.start(*command).wait(120) == 1
    runs = {run.config["learning_rate"]["value"]: run for run in place.server.runs.values()}
    assert {rate: run.state for rate, run in runs.items()} == {
        0.1: "finished",
        0.01: "finished",
        3e38: "failed",
    }
    for rate in (0.1, 0.01):
        run = runs[rate]
        assert (run.group, run.summary["state"]) == ("heads", "finished")
        assert_history_is_complete(run, place.run_dir(run))
        best = (place.run_dir(run) / "best.ckpt").read_bytes()
        assert run.artifact("model").files["best.ckpt"] == best
    assert "diverged in epoch 0" in runs[3e38].summary["reason"]
    assert not RunDir(place.run_dir(runs[3e38])).finished
