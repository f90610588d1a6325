"""Stratified folds: which picture validates in which fold, and what comparisons over folds say."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from finetune.__main__ import main
from finetune.config.fields import RunConfig
from finetune.data.division import split_folds
from finetune.data.pictures import find_pictures
from finetune.data.splits import find_splits
from finetune.runs.folds import fold_difference
from finetune.runs.result import RunResult
from finetune.sweep.confirmation import over_folds
from finetune.system.errors import ConfigError
from tests.conftest import Train


def pictures_of(folder: Path, sizes: dict[str, int]) -> Path:
    for name, size in sizes.items():
        (folder / name).mkdir(parents=True)
        for i in range(size):
            (folder / name / f"{i}.png").touch()
    return folder


def test_each_picture_validates_once_and_classes_are_spread_evenly(tmp_path: Path) -> None:
    sizes = {"a": 23, "b": 10, "c": 6, "d": 1}
    pictures = find_pictures(pictures_of(tmp_path, sizes), "train")
    folds = split_folds(pictures, 5)
    per_class = [np.bincount(folds[pictures.labels == i], minlength=6) for i in range(4)]
    assert [sorted(counts[1:]) for counts in per_class[:3]] == [
        [4, 4, 5, 5, 5],
        [2, 2, 2, 2, 2],
        [1, 1, 1, 1, 2],
    ]
    assert per_class[3].tolist() == [1, 0, 0, 0, 0, 0]  # it always trains
    assert np.ptp(np.bincount(folds[folds > 0])[1:]) <= 1
    assert (split_folds(pictures, 5) == folds).all()


def test_equal_pictures_are_in_one_fold(tmp_path: Path) -> None:
    pictures = find_pictures(pictures_of(tmp_path, {"a": 9, "b": 9}), "train")
    hashes = ["same" if i in (0, 4, 11) else str(i) for i in range(18)]
    folds = split_folds(pictures, 3, hashes)
    assert len({int(folds[i]) for i in (0, 4, 11)}) == 1
    assert Counter(folds.tolist()).keys() == {1, 2, 3}


def test_the_folds_of_a_run_leave_the_test_pictures_alone(digits: Path) -> None:
    def divided(**fields: Any) -> list[set[str]]:
        config = RunConfig.from_fields({"data_dir": digits, "image_size": 32, **fields})
        splits = find_splits(config)
        assert splits.test is not None
        return [set(part.names) for part in (splits.train, splits.val, splits.test)]

    _, _, test = divided()
    folds = [divided(fold=f"{i}/4") for i in range(1, 5)]
    everything = folds[0][0] | folds[0][1]
    assert Counter(name for _, val, _ in folds for name in val) == Counter(everything)
    assert all(train == everything - val and kept == test for train, val, kept in folds)
    _, _, own_test = divided(data_dir=digits / "train")
    whole = [divided(data_dir=digits / "train", fold=f"{i}/4") for i in range(1, 5)]
    assert all(kept == own_test for _, _, kept in whole)
    assert all(not own_test & (train | val) for train, val, _ in whole)


@pytest.mark.parametrize("value", ["0/5", "6/5", "1/1", "2", "a/b", "-1/5"])
def test_a_wrong_fold_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=f"fold: got '{value}'; must be K/N"):
        RunConfig.from_fields({"fold": value})


def test_other_divisions_of_train_compute_no_activations_anew(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train(strategy="freeze", epochs=1, val_fraction=0.2)
    entries = sorted(Path(train(strategy="freeze", epochs=1).path.parents[1]).rglob(".cache*"))
    cache = train(strategy="probe", fold="1/3").path.parents[1] / "cache"
    before = sorted(cache.rglob("*"))
    for fold in ("2/3", "3/3"):
        result = RunResult.load(train(strategy="freeze", epochs=1, fold=fold).path)
        assert (result.num_train + result.num_val, result.config["fold"]) == (20, fold)
    assert sorted(cache.rglob("*")) == before and not entries


def test_the_interval_is_nadeau_and_bengio_s() -> None:
    rng = np.random.default_rng(0)
    first = [rng.random(40) < rate for rate in (0.9, 0.8, 0.7, 0.95, 0.6)]
    second = [rng.random(40) < 0.6 for _ in range(5)]
    found = fold_difference(first, second)
    means = [float(a.mean() - b.mean()) for a, b in zip(first, second, strict=True)]
    error = np.sqrt(np.var(means, ddof=1) * (1 / 5 + 1 / 4))
    half = stats.t.ppf(0.975, 4) * error
    assert found.estimate == pytest.approx(np.mean(means))
    assert (found.low, found.high) == pytest.approx((np.mean(means) - half, np.mean(means) + half))
    assert found.p_value == pytest.approx(2 * stats.t.sf(np.mean(means) / error, 4))
    corrected = fold_difference(first, second, num_comparisons=3)
    assert corrected.p_value == pytest.approx(min(1, 3 * found.p_value))
    assert corrected.low < found.low


def test_equal_folds_still_have_an_interval_of_some_width() -> None:
    right = [np.ones(10, dtype=bool)] * 5
    found = fold_difference(right, right)
    assert found.low < -0.05 < 0.05 < found.high
    assert found.p_value == 1


@pytest.mark.slow
def test_confirm_over_folds(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    runs_dir = train(strategy="freeze", epochs=1, val_fraction=0.25).path.parent
    train(strategy="probe", val_fraction=0.25)
    cells = list(over_folds(runs_dir, 2).cells())
    assert [(c["strategy"], c["fold"]) for c in cells] == [
        ("probe", "1/2"),
        ("freeze", "1/2"),
        ("probe", "2/2"),
        ("freeze", "2/2"),
    ]
    capsys.readouterr()
    assert not main(["confirm", str(runs_dir), "--folds", "2"])
    printed = capsys.readouterr().out
    assert re.search(r"points better than (probe|freeze) \(-?[\d.]+ to [\d.]+\), p \d", printed)
    results = [RunResult.load(path.parent) for path in (runs_dir / "folds").glob("*/result.json")]
    assert {r.num_val for r in results} == {10} and len({r.seed for r in results}) == 1
    assert not main(["report", str(runs_dir)])
    assert "4 runs" in (printed := capsys.readouterr().out) and "validated on folds" in printed
