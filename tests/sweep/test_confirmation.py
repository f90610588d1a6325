"""Which settings `confirm` repeats, and in which environment."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.__main__ import main
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir
from finetune.sweep.confirmation import confirmation, described, spread_table
from finetune.sweep.storage import sqlite_url
from finetune.sweep.trial_queue import TrialQueue
from finetune.sweep.trials import TrialResult
from tests.conftest import ROOT
from tests.support.synthetic import write_run

HERE, ELSEWHERE = "/here", "/elsewhere"


def repeated(runs_dir: Path) -> dict[str, Any]:
    """The single setting that is repeated."""
    (setting,) = confirmation(runs_dir, 1).source["settings"].values()
    return dict(setting)


def change_result(run_dir: Path, **changed: Any) -> None:
    path = RunDir(run_dir).result_path
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def write_two_machines(runs_dir: Path) -> None:
    """Two settings with two seeds each, from two machines; learning rate 0.1 has the best mean."""
    accuracies = {(0.1, HERE): 0.78, (0.1, ELSEWHERE): 0.82}
    accuracies |= {(0.01, HERE): 0.85, (0.01, ELSEWHERE): 0.55}
    for seed, ((learning_rate, machine), accuracy) in enumerate(accuracies.items()):
        write_run(
            runs_dir,
            f"run{seed}",
            accuracy,
            seed=seed,
            learning_rate=learning_rate,
            data_dir=f"{machine}/data",
            cache_dir=f"{machine}/cache",
            accelerator="cuda" if machine == ELSEWHERE else "cpu",
            precision="32-true",
        )


def write_tie(runs_dir: Path) -> None:
    """Two settings with equal accuracies; learning rate 0.001 has the lower validation loss."""
    for name, learning_rate, loss in (("a", 0.1, 0.5), ("b", 0.001, 0.4)):
        run_dir = write_run(runs_dir, name, 0.8, learning_rate=learning_rate)
        change_result(run_dir, best_val_acc=0.8, best_val_loss=loss)


def test_runs_of_two_machines_with_one_setting_are_one_setting(tmp_path: Path) -> None:
    write_two_machines(tmp_path)
    assert repeated(tmp_path)["learning_rate"] == 0.1


def test_a_tie_goes_to_the_lower_validation_loss(tmp_path: Path) -> None:
    write_tie(tmp_path)
    assert repeated(tmp_path)["learning_rate"] == 0.001


def test_an_environment_that_the_runs_do_not_share_is_not_repeated(tmp_path: Path) -> None:
    write_two_machines(tmp_path)
    sweep = confirmation(tmp_path, 1)
    (cell,) = sweep.cells()
    config = sweep.config(cell)
    assert config.accelerator == "auto"
    assert config.cache_dir == Path.cwd() / ".cache"
    assert config.precision == "32-true", "all runs had it"


def test_the_data_of_this_machine_is_used(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_run(tmp_path / "runs", name, seed=ord(name), data_dir=tmp_path / name)
    (tmp_path / "b").mkdir()
    assert confirmation(tmp_path / "runs", 1).fixed["data_dir"] == str(tmp_path / "b")


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_each_strategy_has_the_same_fresh_seeds(tmp_path: Path, num_seeds: int) -> None:
    for strategy in ("freeze", "partial"):
        for seed in (3, 7):
            write_run(tmp_path, f"{strategy}{seed}", strategy=strategy, seed=seed)
    cells = [(cell["strategy"], cell["seed"]) for cell in confirmation(tmp_path, num_seeds).cells()]
    fresh = range(8, 8 + num_seeds)
    assert sorted(cells) == [
        (strategy, seed) for strategy in ("freeze", "partial") for seed in fresh
    ]


def test_confirm_says_which_settings_it_repeats(tmp_path: Path) -> None:
    write_run(tmp_path, "a", 0.7, strategy="freeze", learning_rate=0.1, weight_decay=0.01)
    write_run(tmp_path, "b", 0.8, strategy="freeze", learning_rate=0.01, image_size=64)
    write_run(tmp_path, "c", 0.7, strategy="gradual", data_aug="n")
    freeze, gradual = described(confirmation(tmp_path, 1))
    assert freeze == (
        "  freeze: learning rate 0.01, batch size 32, augmentation flip, image size 64"
    )
    assert gradual == "  gradual: learning rate 0.001, batch size 32, augmentation none"


@pytest.mark.parametrize("write_runs", [write_two_machines, write_tie])
def test_report_and_confirm_choose_the_same_setting(
    write_runs: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(tmp_path)
    assert not main(["report", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith(("partial ", "learning rate ")))
    assert re.search(rf"partial-lr{repeated(tmp_path)['learning_rate']:g}\b", row)


def test_the_table_of_fresh_seeds_has_the_mean_macro_f1() -> None:
    outcomes = [
        TrialResult(f"{s}{i}", Path(), s, {}, "finished", best_val_acc=acc, best_val_macro_f1=f1)
        for s, pairs in {
            "freeze": [(0.5, 0.4), (0.7, 0.5)],
            "partial": [(0.9, 0.8), (0.8, None)],  # one trained by an older version
            "scratch": [(0.1, None)],
        }.items()
        for i, (acc, f1) in enumerate(pairs)
    ]
    cells = {column.header: list(column.cells) for column in spread_table(outcomes).columns}
    assert cells["strategy"] == ["partial", "freeze", "scratch"]
    assert cells["mean"] == ["0.8500", "0.6000", "0.1000"]
    assert cells["macro F1"] == ["0.8000", "0.4500", "-"]


def test_a_confirmation_of_version_0_1_0_is_continued(tmp_path: Path) -> None:
    runs_dir = tmp_path / "swept"
    shutil.copytree(ROOT / "tests/old_formats/v0_1_0/swept", runs_dir)
    sweep = confirmation(runs_dir, num_seeds=4)
    # Of two equal accuracies it had chosen another than this version does.
    assert [c["learning_rate"] for c in sweep.cells()] == [0.001] * 4
    storage = sqlite_url(sweep.out_dir / f"{sweep.slug}.db")
    (done, *waiting) = TrialQueue(sweep, storage, 4).results()
    assert [RunDir(done.run_dir).finished, done.state, done.best_val_acc] == [
        True,
        "finished",
        1 / 3,
    ]
    seeds = [sweep.config(cell).seed for cell in sweep.cells()]
    assert seeds == [RunResult.load(done.run_dir).seed + i for i in range(4)]
    assert [(trial.run_id, trial.state) for trial in waiting] == [
        (f"confirm-b38fe1-5a9826-{i:03d}", "waiting") for i in (1, 2, 3)
    ]
    assert [trial.setting for trial in waiting] == [{"seed": seed} for seed in seeds[1:]]


def test_a_confirmation_of_runs_of_version_0_1_0_that_it_has_not_started_is_new(
    tmp_path: Path,
) -> None:
    runs_dir = tmp_path / "swept"
    shutil.copytree(ROOT / "tests/old_formats/v0_1_0/swept", runs_dir)
    shutil.rmtree(runs_dir / "confirm")
    assert repeated(runs_dir)["learning_rate"] == 0.01
    assert "data_dir" not in repeated(runs_dir)


def test_each_network_with_each_strategy_is_repeated_equally_often(tmp_path: Path) -> None:
    for model in ("resnet50", "resnet18"):
        for strategy in ("partial", "freeze"):
            for rate in (0.1, 0.01):
                fields = {"model": model, "strategy": strategy, "learning_rate": rate}
                is_best = (rate == 0.1) == (model == "resnet18")
                write_run(tmp_path, f"{model}{strategy}{rate}", 0.8 if is_best else 0.7, **fields)
    cells = list(confirmation(tmp_path, 2).cells())
    found = [(c["seed"], c["model"], c["strategy"], c["learning_rate"]) for c in cells]
    assert found == [
        (seed, model, strategy, rate)
        for seed in (43, 44)
        for model, rate in (("resnet18", 0.1), ("resnet50", 0.01))
        for strategy in ("freeze", "partial")
    ]


def test_the_table_of_fresh_seeds_has_a_row_per_network_and_strategy() -> None:
    outcomes = [
        TrialResult(f"{m}{i}", Path(), "partial", {"model": m}, "finished", best_val_acc=accuracy)
        for m, accuracy in {"resnet18": 0.7, "resnet50": 0.8}.items()
        for i in range(2)
    ]
    cells = {column.header: list(column.cells) for column in spread_table(outcomes).columns}
    assert cells["network, strategy"] == ["resnet50 partial", "resnet18 partial"]
    assert cells["seeds"] == ["2", "2"]
