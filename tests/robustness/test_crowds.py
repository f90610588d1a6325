"""Many processes and many crashes: everything is built once, counted once, and nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir
from finetune.sweep.spec import cell_key
from finetune.sweep.sweep_file import read_sweep
from finetune.sweep.trial_queue import MAX_CRASHES, TrialQueue
from finetune.system import array_store as cache
from finetune.training.train import run
from tests.conftest import ROOT
from tests.robustness.test_interrupted import outcome
from tests.support.tiny_training import CRASHES
from tests.sweep.test_runner import base, content
from tests.sweep.test_trial_queue import grid, trials

__all__ = ["base"]

NUM_CELLS = 16
_START_SECONDS = 120  # if one of them fails, the others end too


def take_part(given: dict[str, Any], where: str, folder: Path, ready: Any) -> None:
    """One of the eight processes: joins the sweep, runs its trials, and records what it builds."""
    os.environ["WANDB_MODE"] = "disabled"
    torch.set_num_threads(1)
    allocate = cache._allocate

    def noted(path: Path, *shape: Any) -> Any:
        with (folder / "built").open("a") as file:
            file.write(f"{path.parent.name.split('.')[1]}\n")
        return allocate(path, *shape)

    cache._allocate = noted
    sweep = read_sweep(given)
    ready.wait(_START_SECONDS)
    trial_queue = TrialQueue(sweep, where, 8)
    while claim := trial_queue.claim():
        config = sweep.config(claim.values)
        result = run(config, RunDir(config.out / claim.run_id))
        trial_queue.finish(claim, "finished", result.best_val_acc, {})
    trial_queue.close()


def claim_all(where: str, folder: Path, ready: Any) -> None:
    trial_queue = TrialQueue(grid(NUM_CELLS), where, NUM_CELLS)
    ready.wait(_START_SECONDS)
    keys = []
    while claim := trial_queue.claim():
        keys.append(claim.key)
        trial_queue.finish(claim, "finished", 0.5, {})
    trial_queue.close()
    (folder / f"{os.getpid()}.claims").write_text("\n".join(keys))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["sqlite:///{}/sweep.db", "journal:{}/sweep.journal"])
def test_eight_processes_that_claim_simultaneously_get_different_cells(
    where: str, tmp_path: Path
) -> None:
    eight_at_once(claim_all, where.format(tmp_path), tmp_path)
    claims = [key for path in tmp_path.glob("*.claims") for key in path.read_text().split()]
    assert Counter(claims) == {cell_key({"seed": i}): 1 for i in range(NUM_CELLS)}


def eight_at_once(target: Any, *arguments: Any) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune.sweep.preload", "tests.robustness.test_crowds"])
    ready = context.Barrier(8)
    eight = [context.Process(target=target, args=(*arguments, ready)) for _ in range(8)]
    for process in eight:
        process.start()
    for process in eight:
        process.join()
    assert [process.exitcode for process in eight] == [0] * 8


@pytest.mark.slow
def test_eight_simultaneous_runs_build_the_cache_once_and_have_equal_results(
    base: Any, tmp_path: Path
) -> None:
    base |= {"strategy": "partial", "epochs": 2, "keep_last": True}
    base["out"] = str(tmp_path / "runs")
    # The field matters on a GPU alone, so the eight cells are the same run.
    given = content(base, gpu_cache_fraction=[i / 10 for i in range(1, 9)])
    where = f"sqlite:///{tmp_path / 'sweep.db'}"
    eight_at_once(take_part, given, where, tmp_path)
    done = Counter(t.user_attrs["key"] for t in trials(where, "small") if t.state.name == "COMPLETE")  # noqa: E501  # fmt: skip
    assert done == {cell_key({"gpu_cache_fraction": i / 10}): 1 for i in range(1, 9)}
    ends = [outcome(path) for path in (tmp_path / "runs").iterdir()]
    assert len(ends) == 8 and all(end == ends[0] for end in ends)
    built = Counter((tmp_path / "built").read_text().splitlines())
    kept = [path.parent.name for path in (tmp_path / "cache").glob("*/manifest.json")]
    assert built == dict.fromkeys(kept, 1) and len(kept) >= 2
    assert not list((tmp_path / "cache").glob(".*"))


SWEEP_OF_TINY_TRIALS = """
import json, multiprocessing, sys
from pathlib import Path
from finetune.sweep import runner, worker_pool
from finetune.sweep.runner import run_sweep
preload = multiprocessing.set_forkserver_preload
worker_pool._start_fork_server = lambda: preload(["tests.support.preload_tiny"])
given, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
outcomes = run_sweep(given, out=folder / "runs", workers=4)
(folder / "outcomes.json").write_text(json.dumps([[o.run_id, o.state, o.reason] for o in outcomes]))
"""


@pytest.mark.parametrize(
    "num_trials",
    [pytest.param(80, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.long)],
)
def test_all_trials_have_a_result_if_one_in_ten_crashes(
    num_trials: int, base: Any, tmp_path: Path
) -> None:
    given = content(base, seed=range(num_trials))
    words = [json.dumps(given), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", SWEEP_OF_TINY_TRIALS, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    runs = tmp_path / "runs"
    crashes = Counter((runs / CRASHES).read_text().splitlines())
    assert num_trials / 50 < crashes.total() < num_trials / 4
    found = trials(f"sqlite:///{runs / 'small.db'}", "small")
    assert Counter(t.state.name for t in found).keys() <= {"COMPLETE", "FAIL"}
    assert Counter(t.user_attrs["key"] for t in found if "copy_of" not in t.user_attrs) == {
        cell_key({"seed": i}): 1 for i in range(num_trials)
    }
    assert sum(t.state.name == "FAIL" for t in found) == crashes.total()
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert len({run_id for run_id, *_ in outcomes}) == len(outcomes) == num_trials
    for run_id, state, reason in outcomes:
        if state == "finished":
            assert RunResult.load(runs / run_id).config["seed"] == int(run_id.rpartition("-")[2])
            assert crashes[run_id] < MAX_CRASHES
        else:
            assert state == "failed" and crashes[run_id] == MAX_CRASHES
            assert f"it happened {MAX_CRASHES} times" in reason
