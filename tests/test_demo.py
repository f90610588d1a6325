"""The demo, complete and cut to two epochs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.analysis.read_runs import read_runs
from finetune.config.strategies import STRATEGIES
from finetune.demo import CAUTION, PHOTOS, demo
from finetune.model.network import build
from finetune.system.errors import ConfigError
from tests.analysis.test_report import EMPTY_FIGURES
from tests.conftest import ROOT
from tests.support.chromium import Browser


@pytest.mark.slow
def test_a_demo_of_two_epochs_compares_the_strategies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert demo(out, epochs=2, model="tiny") == 0
    runs = read_runs(out / "runs")
    assert [(run.state, len(run.rows)) for run in runs] == [("finished", 2)] * 8
    assert {run.strategy for run in runs} == {"freeze", "partial", "gradual", "scratch"}
    weights = str(out / "digits-0-4.pth")
    assert {run.config["weights"] for run in runs} == {weights, None}
    assert (out / "runs" / "report.html").exists()
    shown = capsys.readouterr().out
    assert "Best validation accuracy: " in shown and CAUTION in shown


@pytest.mark.slow
def test_the_photographs_are_swept_tested_and_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    weights = tmp_path / "tiny.pth"
    torch.save(build("tiny", 1000, 32, seed=1).network.state_dict(), weights)
    fields = {"epochs": 1, "model": "tiny", "image_size": 32}
    assert demo(tmp_path / "demo", photos=True, weights=str(weights), **fields) == 0
    runs = read_runs(tmp_path / "demo" / "photos")
    assert {run.strategy for run in runs} == set(STRATEGIES)
    assert {run.finished_result.num_train + run.finished_result.num_val for run in runs} == {200}
    shown = capsys.readouterr().out
    assert "on 60 pictures" in shown and shown.count("/00.jpg") == 10
    with pytest.raises(ConfigError, match="pass --photos too"):
        demo(tmp_path, weights="x.pth")


def test_the_photographs_are_small_and_their_licence_is_beside_them() -> None:
    files = [path for path in PHOTOS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2e6
    assert "CC0 1.0 Universal" in (PHOTOS / "LICENSE").read_text()


@pytest.mark.long
@pytest.mark.real_network
def test_in_the_full_demo_transfer_wins_and_the_page_is_drawn(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "demo", "--out", str(tmp_path / "demo")],
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert CAUTION in done.stdout
    runs = read_runs(tmp_path / "demo" / "runs")
    assert len(runs) == 8
    best: dict[str, float] = {}
    for run in runs:
        assert run.result is not None
        best[run.strategy] = max(best.get(run.strategy, 0.0), run.result.best_val_acc)
        if run.strategy == "scratch":
            assert max(row["train_acc"] for row in run.rows) >= 0.95
    assert best["freeze"] >= best["scratch"] + 0.1
    assert best["partial"] >= best["scratch"] + 0.1
    with Browser() as browser:
        browser.open(tmp_path / "demo" / "runs" / "report.html", width=1280, height=900)
        assert browser.run(EMPTY_FIGURES) == []
        assert browser.complaints == []
