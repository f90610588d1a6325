"""The main job, as a newcomer runs it, and its page in a real browser."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.analysis.read_runs import read_runs
from finetune.demo import HONEST_LINE
from tests.analysis.test_report import EMPTY_FIGURES
from tests.conftest import ROOT
from tests.support.chromium import Browser


@pytest.mark.slow
def test_transfer_shows_and_the_page_is_drawn(tmp_path: Path) -> None:
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
    assert HONEST_LINE in done.stdout
    outcomes = read_runs(tmp_path / "demo" / "runs")
    assert len(outcomes) == 8
    best = {}
    for one in outcomes:
        assert one.result is not None
        best[one.strategy] = max(best.get(one.strategy, 0.0), one.result.best_val_acc)
        if one.strategy == "scratch":
            assert max(row["train_acc"] for row in one.rows) >= 0.95
    assert best["freeze"] >= best["scratch"] + 0.1
    assert best["partial"] >= best["scratch"] + 0.1
    with Browser() as browser:
        browser.open(tmp_path / "demo" / "runs" / "report.html", width=1280, height=900)
        assert browser.run(EMPTY_FIGURES) == []
        assert browser.complaints == []
