"""The checks for machines with a GPU, as far as a CPU can make them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT


@pytest.mark.slow
def test_checks_that_need_no_gpu_pass_on_a_cpu_and_the_others_are_skipped(tmp_path: Path) -> None:
    command = ["-m", "benchmarks.gpu_check", "--out", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *command, "--only", "1", "2", "3", "9"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    outcomes = {number: check["outcome"] for number, check in checks.items()}
    assert outcomes == {"1": "PASS", "2": "SKIP", "3": "PASS", "9": "SKIP"}
