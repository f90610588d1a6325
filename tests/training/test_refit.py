"""A run's setting, trained again on training and validation pictures together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.__main__ import main
from finetune.analysis.read_runs import read_runs
from finetune.model.network import load_best
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.system.errors import DataError, RunDirError
from tests.conftest import Train, carry_out


@pytest.mark.parametrize("val_fraction", [0, 0.25])
@pytest.mark.parametrize("strategy", ["probe", "gradual"])
def test_a_refit_trains_on_all_pictures_and_is_tested(
    strategy: str, val_fraction: float, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(strategy=strategy, val_fraction=val_fraction, lr_schedule="cosine")
    source = RunResult.load(run.path)
    capsys.readouterr()
    assert not main(["refit", str(run.path)])
    printed = capsys.readouterr().out
    again = RunDir(run.path / "refit")
    result, rows = RunResult.load(again.path), read_metrics(again.metrics_path)
    assert result.num_train == source.num_train + source.num_val
    assert (result.num_val, result.refit_of) == (0, source.run_id)
    assert result.best_val_acc == source.best_val_acc
    assert f"{source.best_val_acc:.4f}, of a single run, not confirmed" in printed
    assert len(rows) == result.epochs_run == source.best_epoch + 1
    kept = [name for name in rows[0] if name.startswith("lr/")]
    theirs = read_metrics(run.metrics_path)
    if strategy == "gradual":  # the same schedule, over a few more steps
        assert [rows[0][name] > 0 for name in kept] == [theirs[0][name] > 0 for name in kept]
    assert result.solved_head == source.solved_head
    weights = [load_best(path).state_dict() for path in (run.path, again.path)]
    assert not torch.equal(weights[0]["fc.weight"], weights[1]["fc.weight"])
    if val_fraction:
        assert f"evaluate {again.path}" in printed
        assert not main(["evaluate", str(again.path)])
    assert len(read_runs(run.path.parent)) == 1
    with pytest.raises(RunDirError, match="is finished; remove it to train it again"):
        main(["refit", str(run.path)])


def test_the_accuracy_is_that_of_the_confirmation(train: Train, fields: dict[str, Any]) -> None:
    run = train(strategy="freeze", epochs=1)
    out = run.path.parent / "confirm"
    seeds = [
        RunResult.load(
            carry_out(**fields | {"out": out, "seed": i, "epochs": 1}, strategy="freeze").path
        )
        for i in (50, 51)
    ]
    assert not main(["refit", str(run.path)])
    mean = sum(result.best_val_acc for result in seeds) / 2
    assert RunResult.load(run.path / "refit").best_val_acc == pytest.approx(mean)


def test_a_refit_on_other_pictures_is_refused(digits: Path, train: Train, tmp_path: Path) -> None:
    data_dir = Path(shutil.copytree(digits, tmp_path / "data"))
    run = train(strategy="freeze", epochs=1, data_dir=data_dir)
    next((data_dir / "train").glob("*/*")).unlink()
    with pytest.raises(DataError, match="are not those of the run"):
        main(["refit", str(run.path)])
    assert not (run.path / "refit").exists()
