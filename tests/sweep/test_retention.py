"""Checkpoints that a sweep keeps: of the best trials, and never fewer than the report needs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from finetune.__main__ import main
from finetune.analysis.by_strategy import summarize_strategies
from finetune.analysis.read_runs import read_runs
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir
from finetune.sweep.retention import Retention
from finetune.sweep.runner import run_sweep
from finetune.sweep.trials import TrialResult
from finetune.system.errors import WeightsError
from tests.support.synthetic import write_run

CHECKPOINTS = ("best.ckpt", "last.ckpt")
STRATEGIES = ("freeze", "partial", "scratch")


def trial(
    runs: Path, run_id: str, accuracy: float, state: str = "finished", **fields: Any
) -> TrialResult:
    """A trial that has ended, with checkpoints."""
    path = runs / run_id
    value = accuracy
    if state == "finished":
        write_run(runs, run_id, accuracy, num_val=100, **fields)
        value = RunResult.load(path).best_val_acc
    path.mkdir(parents=True, exist_ok=True)
    for name in CHECKPOINTS:
        (path / name).touch()
    return TrialResult(run_id, path, fields.get("strategy", "partial"), {}, state, value)


def best_first(trials: list[TrialResult]) -> list[TrialResult]:
    return sorted(trials, key=lambda t: (-(t.value or 0), t.run_id))


def kept(runs: Path) -> set[str]:
    found = {path.parent.name for path in runs.glob("*/best.ckpt")}
    assert found == {path.parent.name for path in runs.glob("*/last.ckpt")}
    return found


def winners(runs: Path) -> set[str]:
    """The runs that the report shows as each strategy's best."""
    records = read_runs(runs)
    return {s.best.run_dir.name for s in summarize_strategies(records, records)}


@pytest.mark.parametrize("num_best", [1, 3, 100])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_trials_and_every_strategys_best_are_kept_in_any_order_of_endings(
    seed: int, num_best: int, tmp_path: Path
) -> None:
    chance, ended, retention = random.Random(seed), [], Retention(num_best)
    for i in range(12):
        rate, strategy = 0.001 * (i + 1), chance.choice(STRATEGIES)
        accuracy = round(chance.uniform(0.3, 0.9), 1)  # there are ties
        ended.append(
            trial(tmp_path, f"run-{i:02}", accuracy, strategy=strategy, learning_rate=rate)
        )
        retention.apply(best_first(ended))
    expected = winners(tmp_path) | {t.run_id for t in best_first(ended)[:num_best]}
    assert kept(tmp_path) == expected
    assert len(list(tmp_path.glob("*/result.json"))) == 12
    assert len(list(tmp_path.glob("*/predictions.npz"))) == 12


def test_of_repeated_settings_the_runs_of_the_best_mean_are_kept(tmp_path: Path) -> None:
    trials = [
        trial(tmp_path, "lucky", 0.9, seed=1),
        trial(tmp_path, "unlucky", 0.3, seed=2),
        trial(tmp_path, "steady-1", 0.8, seed=1, learning_rate=0.01),
        trial(tmp_path, "steady-2", 0.8, seed=2, learning_rate=0.01),
    ]
    Retention(1).apply(best_first(trials))
    assert winners(tmp_path) < kept(tmp_path)
    assert kept(tmp_path) == {"lucky", "steady-1", "steady-2"}


def test_each_networks_best_setting_is_kept(tmp_path: Path) -> None:
    trials = [
        trial(tmp_path, f"{model}-{rate}", accuracy + rate, model=model, learning_rate=rate)
        for model, accuracy in (("resnet18", 0.5), ("resnet50", 0.8))
        for rate in (0.01, 0.1)
    ]
    Retention(1).apply(best_first(trials))
    assert kept(tmp_path) == winners(tmp_path) == {"resnet18-0.1", "resnet50-0.1"}


def test_pruned_trials_lose_their_checkpoints_and_others_are_not_touched(tmp_path: Path) -> None:
    trials = [trial(tmp_path, "good", 0.8), trial(tmp_path, "bad", 0.4, learning_rate=0.1)]
    states = ("pruned", "failed", "running", "waiting", "interrupted")
    trials += [trial(tmp_path, state, 0.9, state) for state in states]
    Retention(1).apply(best_first(trials))
    assert kept(tmp_path) == {"good", *states[1:]}


def test_a_trial_whose_result_cannot_be_read_keeps_its_checkpoints(tmp_path: Path) -> None:
    trials = [trial(tmp_path, "good", 0.8), trial(tmp_path, "odd", 0.4, learning_rate=0.1)]
    (tmp_path / "odd" / "result.json").write_text("{")
    Retention(1).apply(best_first(trials))
    assert kept(tmp_path) == {"good", "odd"}


@pytest.mark.parametrize("varied", [{"learning_rate": [0.1, 0.00001]}, {"seed": [1, 2, 3]}])
@pytest.mark.slow
def test_a_sweep_keeps_the_best_and_predict_explains_what_is_missing(
    varied: dict[str, list[Any]],
    digits: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = {
        "data_dir": str(digits), "model": weights.stem, "weights": str(weights),
        "val_fraction": 0, "image_size": 32,
        "batch_size": 10, "epochs": 1, "accelerator": "cpu", "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    parameters = {name: {"value": value} for name, value in fields.items()}
    parameters |= {name: {"values": values} for name, values in varied.items()}
    parameters |= {"strategy": {"values": ["freeze", "partial"]}}
    sweep = {
        "name": "small",
        "method": "grid",
        "program": "agent.py",
        "metric": {"name": "best_val_acc", "goal": "maximize"},
        "parameters": parameters,
    }
    runs = tmp_path / "runs"
    results = run_sweep(sweep, out=runs, workers=2, keep_best=1)
    assert {r.state for r in results} == {"finished"}
    having = {path.parent.name for path in runs.glob("*/best.ckpt")}
    assert having == winners(runs) | {results[0].run_id} or "seed" in varied
    assert winners(runs) <= having
    if "seed" in varied:  # all of a strategy's runs have its best setting
        assert len(having) == 6
        return
    removed = next(r.run_dir for r in results if r.run_id not in having)
    with pytest.raises(WeightsError, match=r"best\.ckpt: it was removed, as `sweep --keep_best`"):
        main(["predict", str(removed), str(digits)])
    assert RunDir(removed).read_predictions()[0].shape == (15, 5)
    assert not main(["report", str(runs)])
    assert "report.html" in capsys.readouterr().out
