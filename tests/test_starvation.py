"""Memory, disk and file handles that run out: a clear message, and going on once there is room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config import RunConfig
from finetune.errors import FinetuneError
from finetune.result import RunDir, RunResult, read_failure
from finetune.train import run

from .conftest import ROOT
from .test_agent import as_flags

WITH_LITTLE_MEMORY = """
import resource, sys
import agent, finetune.train
from finetune.errors import run_door
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv.pop(1)) * 1_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run_door(agent.main)
"""


def with_little_memory(num_mb: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """agent.py with so much memory beyond what it holds after its imports."""
    return subprocess.run(
        [sys.executable, "-c", WITH_LITTLE_MEMORY, str(num_mb), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_too_little_memory_names_the_batch_size_and_the_run_goes_on_with_more(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    changed = {"strategy": "scratch", "image_size": 256, "batch_size": 20, "epochs": 1}
    done = with_little_memory(300, *as_flags(fields | changed))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "out of memory at batch_size 20" in done.stderr
    (place,) = (tmp_path / "runs").iterdir()
    failure = read_failure(place / "failure.json")
    assert failure and "--batch_size" in failure["reason"]
    assert with_little_memory(8000, f"--resume={place}").returncode == 0
    assert RunResult.load(place).epochs_run == 1
    assert not (place / "failure.json").exists()


def test_a_full_gpu_is_told_in_the_same_words(config: RunConfig, tmp_path: Path) -> None:
    def run_out(row: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(FinetuneError, match="out of memory at batch_size 5"):
        run(config, RunDir(tmp_path / "run"), run_out)
    failure = read_failure(tmp_path / "run" / "failure.json")
    assert failure and failure["state"] == "failed"
    assert "pass a smaller --batch_size" in failure["reason"]
