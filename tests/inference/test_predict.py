"""Predictions and evaluations agree with the run's own validation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import finetune
from finetune.__main__ import main
from finetune.data.splits import find_splits
from finetune.inference.predict import load_predictor, predict_logits
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir
from finetune.system.errors import ConfigError, DataError, WeightsError
from tests.conftest import ROOT, Train


@pytest.fixture(scope="module")
def finished(digits: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run whose test set is val/."""
    place = tmp_path_factory.mktemp("finished")
    model = finetune.train_and_finetune(
        strategy="freeze",
        epochs=2,
        val_fraction=0.25,
        batch_size=5,
        learning_rate=0.01,
        image_size=64,
        data_dir=digits,
        weights=weights,
        out=place / "runs",
        cache_dir=place / "cache",
        accelerator="cpu",
    )
    assert isinstance(model.result, RunResult)
    return place / "runs" / model.result.run_id


@pytest.fixture
def run(finished: Path) -> Iterator[RunDir]:
    yield RunDir(finished)
    (finished / "evaluation.json").unlink(missing_ok=True)


def answers_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    """Exit code, parsed JSON and standard error of one `predict --json`."""
    capsys.readouterr()
    code = main(["predict", *map(str, arguments), "--json"])
    output = capsys.readouterr()
    return code or 0, json.loads(output.out), output.err


def test_predicting_the_validation_pictures_gives_the_accuracy_of_the_result(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(strategy="gradual", epochs=3)
    result = RunResult.load(run.path)
    code, answers, _ = answers_of(capsys, run.path, Path(result.config["data_dir"]) / "val")
    hits = [answer["class"] == Path(answer["path"]).parent.name for answer in answers]
    assert code == 0
    assert len(hits) == result.num_val
    assert sum(hits) / len(hits) == result.best_val_acc
    with np.load(run.predictions_path) as recorded:
        assert [answer["path"] for answer in answers] == recorded["paths"].tolist()
        guesses = [result.class_names[i] for i in recorded["logits"].argmax(axis=1)]
    assert [answer["class"] for answer in answers] == guesses


def test_logits_equal_those_in_predictions_npz(run: RunDir) -> None:
    with np.load(run.predictions_path) as recorded:
        logits, paths = recorded["logits"], recorded["paths"]
    found = predict_logits(load_predictor(run.path), [Path(path) for path in paths])
    np.testing.assert_allclose(np.stack(found), logits, atol=1e-4)  # type: ignore[arg-type]


def test_a_bad_picture_is_reported_and_the_others_are_predicted(
    run: RunDir, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted((digits / "val" / "7").iterdir())[0]
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    (tmp_path / "empty").mkdir()
    code, answers, errors = answers_of(
        capsys, run.path, bad, good, tmp_path / "gone.jpg", tmp_path / "empty", good
    )
    assert code == 1
    assert [answer["path"] for answer in answers] == [
        str(path) for path in (bad, good, tmp_path / "gone.jpg", tmp_path / "empty", good)
    ]
    assert [answer["class"] is None for answer in answers] == [True, False, True, True, False]
    assert answers[1] == answers[4]
    assert "3 of 5 could not be predicted" in errors
    assert str(bad) in errors
    assert "holds no pictures" in answers[3]["error"]


def test_an_unreadable_folder_is_reported_and_the_others_are_predicted(
    run: RunDir, digits: Path, locked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted((digits / "val" / "7").iterdir())[0]
    (locked.parent / "good.png").write_bytes(good.read_bytes())
    code, answers, _ = answers_of(capsys, run.path, locked.parent)
    assert code == 1
    assert [Path(a["path"]).name for a in answers if a["class"]] == ["good.png"]
    (refused,) = (a for a in answers if a["path"] == str(locked))
    assert "can't be read: Permission denied" in refused["error"]


def test_probabilities_of_all_classes_are_ranked_and_sum_to_one(
    run: RunDir, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, answers, _ = answers_of(capsys, run.path, digits / "val" / "5", "--top", 99)
    for answer in answers:
        shares = [entry["probability"] for entry in answer["top"]]
        assert sorted(shares, reverse=True) == shares
        assert sum(shares) == pytest.approx(1)
        assert sorted(entry["class"] for entry in answer["top"]) == list("56789")
        assert (answer["class"], answer["probability"]) == (answer["top"][0]["class"], shares[0])


def test_the_table_has_one_line_per_picture(
    run: RunDir, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert not main(["predict", str(run.path), str(digits / "val" / "5"), "--top", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("%") and "/val/5/" in line for line in lines)


def test_logits_do_not_depend_on_the_other_pictures_of_a_batch(run: RunDir, digits: Path) -> None:
    predictor = load_predictor(run.path)
    paths = sorted((digits / "val").glob("*/*.png"))
    together = predict_logits(predictor, paths)
    alone = [predict_logits(predictor, [path])[0] for path in paths]
    np.testing.assert_allclose(np.stack(together), np.stack(alone), atol=1e-4)  # type: ignore[arg-type]


def test_load_best_gives_the_model_with_its_result_and_classes(run: RunDir) -> None:
    model = finetune.load_best(run.path)
    assert not model.training
    assert model.result == RunResult.load(run.path)
    assert model.class_names == list("56789")


def test_a_directory_without_a_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no best\.ckpt"):
        main(["predict", str(tmp_path), "picture.png"])


@pytest.mark.parametrize("top", ["0", "many"])
def test_top_must_be_a_positive_integer(top: str) -> None:
    with pytest.raises(ConfigError, match="--top"):
        main(["predict", "run", "picture.png", "--top", top])


# evaluate


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert not main(["evaluate", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_evaluating_the_validation_pictures_gives_the_accuracy_of_the_result(
    train: Train, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(strategy="partial", epochs=2)
    record = evaluated(capsys, run.path, digits / "val")
    result = RunResult.load(run.path)
    assert record["accuracy"] == result.best_val_acc
    assert record["accuracy_interval"][0] < record["accuracy"] < record["accuracy_interval"][1]
    with np.load(run.predictions_path) as recorded:
        guesses, labels = recorded["logits"].argmax(axis=1), recorded["labels"]
    expected = [[int(sum((labels == i) & (guesses == j))) for j in range(5)] for i in range(5)]
    assert record["confusion"] == expected
    for i, figures in enumerate(record["per_class"]):
        assert figures["accuracy"] == expected[i][i] / sum(expected[i])


def test_the_default_test_set_is_the_one_the_run_kept(
    run: RunDir, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = evaluated(capsys, run.path)
    test = find_splits(run.read_config()).test
    assert test is not None
    assert record["folder"] == str(digits / "val") == str(test.folder)
    assert record["num_pictures"] == len(test)


def test_a_second_evaluation_shows_the_record(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluated(capsys, run.path)
    monkeypatch.setattr("finetune.inference.evaluate.measure", None)
    assert evaluated(capsys, run.path) == first
    main(["evaluate", str(run.path)])
    shown = capsys.readouterr().out
    assert f"recorded {first['recorded_at']}" in shown
    assert f"accuracy {first['accuracy']:.4f} on 15 pictures" in shown


def test_other_pictures_are_evaluated_and_recorded_separately(
    run: RunDir, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluated(capsys, run.path, digits / "val")
    other = evaluated(capsys, run.path, digits / "train")
    assert (first["num_pictures"], other["num_pictures"]) == (15, 20)
    recorded = json.loads((run.path / "evaluation.json").read_text())
    assert recorded["evaluations"] == [first, other]


@pytest.mark.parametrize(("drop", "add"), [("5", None), (None, "owl"), ("5", "owl")])
def test_a_folder_of_other_classes_is_an_error_that_names_them(
    run: RunDir, digits: Path, tmp_path: Path, drop: str | None, add: str | None
) -> None:
    for name in (*(c for c in "56789" if c != drop), *([add] if add else [])):
        (tmp_path / "odd" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "odd" / name / "a.png")
    with pytest.raises(DataError, match="its classes are not the run's") as raised:
        main(["evaluate", str(run.path), str(tmp_path / "odd")])
    assert ("missing: 5" in str(raised.value)) == bool(drop)
    assert ("unknown to the run: owl" in str(raised.value)) == bool(add)
    assert not (run.path / "evaluation.json").exists()


def test_a_run_without_a_test_set_is_refused(train: Train) -> None:
    run = train(strategy="freeze", epochs=1)
    with pytest.raises(DataError, match="has no test set"):
        main(["evaluate", str(run.path)])


# start-up


@pytest.mark.slow
def test_neither_lightning_nor_wandb_is_imported(run: RunDir, digits: Path) -> None:
    heavy = ("pytorch_lightning", "lightning_fabric", "wandb", "torchmetrics", "plotly", "sklearn")
    script = (
        "import sys; from finetune.__main__ import main; "
        f"main(['predict', {str(run.path)!r}, {str(digits / 'val' / '5')!r}]); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
