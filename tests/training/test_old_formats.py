"""Checkpoints of other versions: 0.1.0 is read and resumed; unknown entries are ignored."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finetune
from finetune.__main__ import main
from finetune.config.backbones import BACKBONES
from finetune.inference.predict import load_predictor, predict_logits
from finetune.model.network import load_best
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.system.errors import WeightsError
from tests.conftest import ROOT
from tests.support.tiny_backbone import TINY


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what version 0.1.0 wrote, with its paths replaced."""
    monkeypatch.setitem(BACKBONES, "resnet18", TINY)  # that of the small network of these files
    folder = tmp_path / "v0_1_0"
    shutil.copytree(ROOT / "tests" / "old_formats" / "v0_1_0", folder)
    for path in [*folder.glob("*/*/config.yaml"), *folder.glob("*/*/result.json")]:
        path.write_text(path.read_text().replace("/srv/v0_1_0", str(folder)))
    return folder


@pytest.fixture
def finished(old: Path) -> RunDir:
    return RunDir(old / "runs" / "freeze")


def test_the_best_model_gives_the_recorded_logits(finished: RunDir, old: Path) -> None:
    model: Any = load_best(finished.path)
    assert model.result.best_epoch == RunResult.load(finished.path).best_epoch
    recorded, _, paths = finished.read_predictions()
    moved = [Path(str(path).replace("/srv/v0_1_0", str(old))) for path in paths]
    logits = predict_logits(load_predictor(finished.path), moved)
    np.testing.assert_allclose(np.stack(logits), recorded, atol=1e-5)  # type: ignore[arg-type]


def test_evaluate_gives_the_accuracy_of_the_result(
    finished: RunDir, old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not main(["evaluate", str(finished.path), str(old / "data" / "val"), "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["accuracy"] == RunResult.load(finished.path).best_val_acc


def test_export_writes_the_state_dict(finished: RunDir) -> None:
    assert not main(["export", str(finished.path), "--format", "state_dict"])
    exported = torch.load(finished.path / "model.pth", weights_only=True)["state_dict"]
    recorded = torch.load(finished.best_path, weights_only=True)["state_dict"]
    assert exported.keys() == recorded.keys()
    assert all(torch.equal(exported[key], recorded[key]) for key in recorded)


def test_an_interrupted_run_resumes_to_the_result_of_the_whole_one(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted, whole = RunDir(old / "runs" / "interrupted"), RunDir(old / "runs" / "whole")
    assert len(read_metrics(interrupted.metrics_path)) == 2
    with interrupted.config_path.open("a") as file:  # its config is older than this field
        file.write("keep_last: true\n")
    finetune.train_and_finetune(resume=interrupted.path)
    assert (
        f"{interrupted.last_path} was written by an older version, without dataset_fingerprint and "
        "split_fingerprint; whether these are the same is not checked"
    ) in capsys.readouterr().out
    rows, expected = (read_metrics(run.metrics_path) for run in (interrupted, whole))
    assert [math.isnan(row.pop("val_macro_f1")) for row in rows] == [True, True, False, False]
    assert all(math.isnan(row.pop("val_macro_f1")) for row in expected)
    for row in (*rows, *expected):
        del row["images_per_second"]
    # The bits depend on the processor; the run was recorded on another machine.
    assert rows == [pytest.approx(row, abs=1e-4) for row in expected]
    logits, expected_logits = (run.read_predictions()[0] for run in (interrupted, whole))
    np.testing.assert_allclose(logits, expected_logits, atol=1e-3)
    resumed = torch.load(interrupted.last_path, weights_only=True)
    assert list(resumed["callbacks"]) == ["recorder"]
    assert resumed["format_version"] == 2


def test_a_finished_run_goes_on_with_its_last_checkpoint(old: Path) -> None:
    run = RunDir(old / "runs" / "whole")
    assert run.last_path.exists()
    epochs = run.read_config().epochs
    finetune.train_and_finetune(resume=run.path, epochs=epochs + 1)
    assert len(read_metrics(run.metrics_path)) == epochs + 1


def test_unknown_entries_of_a_newer_version_are_ignored(old: Path) -> None:
    run = RunDir(old / "runs" / "interrupted")
    for path in (run.best_path, run.last_path):
        content = torch.load(path, weights_only=True)
        torch.save(content | {"format_version": 99, "added_later": [1, 2]}, path)
    finetune.train_and_finetune(resume=run.path)
    assert run.finished


def test_an_unknown_model_is_refused_by_name(finished: RunDir) -> None:
    content = torch.load(finished.best_path, weights_only=True)
    torch.save(content | {"model": "resnet19"}, finished.best_path)
    with pytest.raises(WeightsError, match=r"best\.ckpt.* got 'resnet19'; must be one of"):
        load_best(finished.path)
