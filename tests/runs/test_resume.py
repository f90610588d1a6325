"""A run continued: what may differ from its config, and what must be the same."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune
from finetune.__main__ import main
from finetune.config.fields import RunConfig
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.system.errors import ConfigError, DataError, FinetuneError, Stopped, WeightsError
from finetune.training.train import run
from tests.conftest import Train
from tests.support.tiny_network import tiny
from tests.training.test_train import assert_same_run


@pytest.fixture
def fields(fields: dict[str, Any], digits: Path, weights: Path, tmp_path: Path) -> dict[str, Any]:
    """With data and weights of its own, which a test may move."""
    shutil.copytree(digits, tmp_path / "data")
    shutil.copyfile(weights, tmp_path / "weights.pth")
    moved = {"data_dir": tmp_path / "data", "weights": tmp_path / "weights.pth"}
    return fields | moved | {"strategy": "freeze", "epochs": 3, "image_size": 32}


@pytest.fixture
def interrupted(fields: dict[str, Any]) -> RunDir:
    """A run that was stopped after its first epoch."""

    def stop(row: dict[str, float]) -> None:
        raise Stopped(signal.SIGTERM)

    run_dir = RunDir(fields["out"] / "interrupted")
    with pytest.raises(Stopped):
        run(RunConfig.from_fields(fields), run_dir, on_epoch=stop)
    return run_dir


def test_a_run_whose_data_and_weights_were_moved_resumes_to_the_same_bits(
    interrupted: RunDir, train: Train, tmp_path: Path
) -> None:
    whole = train()
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    (tmp_path / "weights.pth").rename(tmp_path / "source.pth")
    with pytest.raises(DataError, match=r"data_dir: .*data does not exist"):
        finetune.train_and_finetune(resume=interrupted.path)
    finetune.train_and_finetune(
        resume=interrupted.path,
        data_dir=tmp_path / "elsewhere",
        weights=tmp_path / "source.pth",
        cache_dir=tmp_path / "another-cache",
    )
    assert_same_run(whole, interrupted)
    config = interrupted.read_config()
    assert config.data_dir == tmp_path / "elsewhere"
    assert config.weights == str(tmp_path / "source.pth")


def test_the_predictions_of_a_resumed_run_name_the_pictures_where_they_are_now(
    interrupted: RunDir, tmp_path: Path
) -> None:
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    finetune.train_and_finetune(resume=interrupted.path, data_dir=tmp_path / "elsewhere")
    paths = interrupted.read_predictions()[2]
    assert all(Path(path).is_file() for path in paths)


def test_a_moved_run_directory_resumes_where_it_is_now(
    interrupted: RunDir, train: Train, tmp_path: Path
) -> None:
    whole = train()
    moved = RunDir(tmp_path / "archive" / "renamed")
    moved.path.parent.mkdir()
    interrupted.path.rename(moved.path)
    finetune.train_and_finetune(resume=moved.path)
    assert [row["val_acc"] for row in read_metrics(moved.metrics_path)] == [
        row["val_acc"] for row in read_metrics(whole.metrics_path)
    ]
    assert RunResult.load(moved.path).config["out"] == str(moved.path.parent)
    assert not interrupted.path.exists()


def other_pictures(folder: Path) -> None:
    picture = next((folder / "val").glob("*/*.png"))
    picture.write_bytes(picture.read_bytes() + b"\0")  # Pillow reads it, but its size has changed


def renamed_picture(folder: Path) -> None:
    picture = next((folder / "train").glob("*/*.png"))
    picture.rename(picture.with_name("another.png"))


@pytest.mark.parametrize("change", [other_pictures, renamed_picture])
@pytest.mark.parametrize("place", ["data", "elsewhere"])
def test_other_pictures_are_refused_and_nothing_is_changed(
    change: Any, place: str, interrupted: RunDir, tmp_path: Path
) -> None:
    before = interrupted.config_path.read_bytes(), interrupted.metrics_path.read_bytes()
    (tmp_path / "data").rename(tmp_path / place)
    change(tmp_path / place)
    with pytest.raises(
        WeightsError, match=r"belongs to pictures \w+; those of .* are \w+ .*--data_dir"
    ):
        finetune.train_and_finetune(resume=interrupted.path, data_dir=tmp_path / place)
    assert before == (interrupted.config_path.read_bytes(), interrupted.metrics_path.read_bytes())


def test_a_refused_resume_leaves_a_finished_run_finished(
    train: Train, fields: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = train(epochs=1, keep_last=True)
    torch.save(tiny(5, seed=99).state_dict(), tmp_path / "other.pth")
    before = run_dir.config_path.read_bytes()
    with pytest.raises(WeightsError, match="Resume with the weights"):
        finetune.train_and_finetune(resume=run_dir.path, epochs=2, weights=tmp_path / "other.pth")
    assert run_dir.finished
    assert run_dir.config_path.read_bytes() == before


@pytest.mark.parametrize(
    "given", [{"precision": "bf16-mixed"}, {"accelerator": "cpu", "precision": "bf16-mixed"}]
)
def test_a_resume_on_another_device_is_said_in_one_line(
    given: dict[str, str], interrupted: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.train_and_finetune(resume=interrupted.path, **given)
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("resuming on"))
    assert line == (
        "resuming on cpu in bf16-mixed; the epochs so far were computed on cpu in 32-true, so the "
        "result is not, to the bit, that of an uninterrupted run"
    )
    assert interrupted.read_config().precision == "bf16-mixed"


def test_the_same_device_is_not_said(
    interrupted: RunDir, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train()
    finetune.train_and_finetune(resume=interrupted.path, accelerator="cpu", precision="auto")
    assert "resuming on" not in capsys.readouterr().out
    assert_same_run(whole, interrupted)


@pytest.mark.parametrize(
    "given", [{"batch_size": 7}, {"seed": 3}, {"cache_format": "float16"}, {"val_fraction": 0.2}]
)
def test_another_value_of_any_other_field_is_refused(
    given: dict[str, Any], interrupted: RunDir
) -> None:
    allowed = (
        "only epochs may increase, and data_dir, labels, weights, cache_dir, out, accelerator, "
    )
    with pytest.raises(ConfigError, match=f"has another config: .* {allowed}precision may differ"):
        finetune.train_and_finetune(resume=interrupted.path, **given)


def test_a_requeued_run_may_find_its_data_at_another_place(
    interrupted: RunDir, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's requeue: the same id, on a machine that mounts the data elsewhere."""
    monkeypatch.setenv("WANDB_RUN_ID", interrupted.path.name)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    finetune.train_and_finetune(**fields | {"data_dir": tmp_path / "elsewhere"})
    assert interrupted.finished


def test_evaluate_of_a_run_whose_data_was_moved_names_its_own_option(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train(epochs=1, val_fraction=0.25)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    for empty_folder_left in (False, True):
        if empty_folder_left:
            (tmp_path / "data").mkdir()
        with pytest.raises(FinetuneError) as caught:
            main(["evaluate", str(run_dir.path)])
        assert f"python -m finetune evaluate {run_dir.path} FOLDER" in str(caught.value)
        assert "--data_dir" not in str(caught.value)
    assert not main(["evaluate", str(run_dir.path), str(tmp_path / "elsewhere" / "val")])
    assert "accuracy" in capsys.readouterr().out
