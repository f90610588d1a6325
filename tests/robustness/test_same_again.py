"""The same config gives the same bits for any number of workers, folder and cache content."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir, read_metrics
from tests.support.process_server import fast_python


def swept(
    place: Path, cache_dir: Path, fields: dict[str, Any], workers: int, num_threads: int
) -> dict[str, Any]:
    """The result of each strategy's run in a sweep, without times."""
    place.mkdir()
    shared = fields | {"epochs": 3, "image_size": 32, "cache_dir": cache_dir, "out": place / "runs"}
    parameters: dict[str, Any] = {
        k: {"value": str(v) if isinstance(v, Path) else v} for k, v in shared.items()
    }
    parameters["strategy"] = {"values": ["gradual", "scratch"]}
    content = {"program": "agent.py", "method": "grid", "parameters": parameters}
    (place / "small.yaml").write_text(yaml.safe_dump(content))
    subprocess.run(
        [fast_python(), "-m", "finetune", "sweep", "small.yaml", "--workers", str(workers)],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
        capture_output=True,
        timeout=300,
        check=True,
    )
    found = {}
    for path in (place / "runs").glob("*/result.json"):
        run, result = RunDir(path.parent), RunResult.load(path.parent)
        assert result.num_threads == 1
        rows = read_metrics(run.metrics_path)
        best = torch.load(run.best_path, weights_only=True)["state_dict"]
        found[result.strategy] = {
            "rows": [{k: v for k, v in r.items() if k != "images_per_second"} for r in rows],
            "best": {k: v.numpy().tobytes() for k, v in best.items()},
            "logits": run.read_predictions()[0].tobytes(),
            "fingerprints": (result.dataset_fingerprint, result.split_fingerprint),
        }
    assert len(found) == 2
    return found


@pytest.mark.slow
def test_results_do_not_depend_on_workers_caches_or_folders(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    one = swept(tmp_path / "one", tmp_path / "cache", fields, workers=1, num_threads=1)
    two_warm = swept(tmp_path / "two", tmp_path / "cache", fields, workers=2, num_threads=1)
    two_cold = swept(tmp_path / "cold", tmp_path / "cold-cache", fields, workers=2, num_threads=2)
    assert one == two_warm == two_cold
