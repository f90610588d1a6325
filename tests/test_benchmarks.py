"""The benchmarks' own pipelines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PLAIN = """
import sys
from pathlib import Path
from benchmarks import plain

data_dir, weights = map(Path, sys.argv[1:])
plain.train("resnet18", data_dir, weights, "freeze", epochs=1, image_size=32, batch_size=5)
"""


@pytest.mark.slow
@pytest.mark.real_network
def test_the_plain_pipeline_prints_no_advice_of_lightning(digits: Path, weights: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(digits), str(weights)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
