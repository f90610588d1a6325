"""Predictions and evaluations agree with the run's own validation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
from finetune.__main__ import main
from finetune.config.backbones import IMAGENET_MEAN, IMAGENET_STD
from finetune.data.decode import Preprocessing
from finetune.data.pictures import find_pictures
from finetune.data.splits import find_splits
from finetune.inference.evaluate import describe, measure, run_labels
from finetune.inference.predict import Predictor, load_predictor, predict_logits
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir
from finetune.system.errors import ConfigError, DataError, WeightsError
from tests.conftest import ROOT, Train
from tests.support.tiny_network import tiny


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
        model=weights.stem,
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


def test_with_mixed_precision_predict_computes_as_the_validation_did(train: Train) -> None:
    run = train(strategy="partial", epochs=1, precision="bf16-mixed")
    with np.load(run.predictions_path) as recorded:
        logits, paths = recorded["logits"], recorded["paths"]
    predictor = load_predictor(run.path)
    assert predictor.autocast_dtype == torch.bfloat16
    found = np.stack(predict_logits(predictor, [Path(path) for path in paths]))  # type: ignore[arg-type]
    np.testing.assert_allclose(found, logits, atol=1e-5)
    bits = torch.from_numpy(logits).view(torch.int32)
    assert (bits & 0xFFFF).any()  # the head's are not rounded to bfloat16


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
    assert record["macro_f1"] == result.best_val_macro_f1
    main(["evaluate", str(run.path), str(digits / "val")])
    assert f"macro F1 {record['macro_f1']:.4f}, mean over 5 of 5 classes" in capsys.readouterr().out


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


def test_classes_without_pictures_are_said_and_the_others_are_evaluated_exactly(
    run: RunDir, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = evaluated(capsys, run.path, digits / "val")
    for name in "689":  # without the first class, so that every label has another index
        shutil.copytree(digits / "val" / name, tmp_path / "some" / name)
    record = evaluated(capsys, run.path, tmp_path / "some")
    absent = [0, 2]
    expected = [row if i not in absent else [0] * 5 for i, row in enumerate(whole["confusion"])]
    assert record["confusion"] == expected
    assert record["classes_without_pictures"] == ["5", "7"]
    assert record["accuracy"] == sum(expected[i][i] for i in range(5)) / 9
    recalls = [figures["accuracy"] for figures in record["per_class"]]
    assert [recalls[i] for i in absent] == [None, None]
    kept = [figures["accuracy"] for figures in whole["per_class"] if figures["class"] in "689"]
    assert [recall for recall in recalls if recall is not None] == kept
    main(["evaluate", str(run.path), str(tmp_path / "some")])
    shown = capsys.readouterr().out
    assert "no pictures of: 5 and 7\n" in shown
    assert f"accuracy {sum(kept) / 3:.4f}, mean over 3 of 5 classes\n" in shown
    f1s = [figures["f1"] for figures in record["per_class"] if figures["f1"] is not None]
    assert record["macro_f1"] == pytest.approx(sum(f1s) / len(f1s))
    assert f"macro F1 {record['macro_f1']:.4f}, mean over {len(f1s)} of 5 classes\n" in shown
    assert [line.split()[2] for line in shown.splitlines() if line[:2] in ("5 ", "7 ")][:2] == ["-", "-"]  # noqa: E501  # fmt: skip


def test_a_class_whose_name_is_decomposed_is_the_same_class(
    train: Train, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"5": "apple", "6": unicodedata.normalize("NFC", "café"), "7": "zebra"}
    for split in ("train", "val"):
        for digit, name in names.items():
            shutil.copytree(digits / split / digit, tmp_path / "data" / split / name)
    run = train(strategy="freeze", epochs=1, data_dir=tmp_path / "data")
    whole = evaluated(capsys, run.path, tmp_path / "data" / "val")
    decomposed = tmp_path / "mac" / unicodedata.normalize("NFD", "café")
    shutil.copytree(digits / "val" / "6", decomposed)
    record = evaluated(capsys, run.path, tmp_path / "mac")
    assert record["confusion"] == [[0, 0, 0], whole["confusion"][1], [0, 0, 0]]
    assert record["classes_without_pictures"] == ["apple", "zebra"]


def test_two_forms_of_a_name_are_one_class_of_a_run_with_either(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "café") for form in ("NFD", "NFC")]
    for name in ("zebra", *forms):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    pictures = find_pictures(tmp_path)
    assert pictures.class_names == (forms[1], "zebra")
    for form in forms:
        assert run_labels(pictures, ["owl", "zebra", form]).tolist() == [2, 2, 1]


def test_a_class_unknown_to_the_run_is_an_error_with_the_nearest_class(tmp_path: Path) -> None:
    for name in ("Insect", "Mammalia", "xyz"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    with pytest.raises(DataError) as raised:
        run_labels(find_pictures(tmp_path), ["Aves", "Insecta", "Mammalia"])
    unknown = "classes unknown to the run: Insect (did you mean Insecta?) and xyz. Its classes"
    assert unknown in str(raised.value)


def test_an_unknown_class_stops_before_anything_is_recorded(
    run: RunDir, digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits / "val", tmp_path / "odd")
    shutil.copytree(digits / "val" / "5", tmp_path / "odd" / "owl")
    with pytest.raises(DataError, match="classes unknown to the run: owl"):
        main(["evaluate", str(run.path), str(tmp_path / "odd")])
    assert not (run.path / "evaluation.json").exists()


def test_more_than_100_classes_are_recorded_as_pairs_instead_of_a_matrix(digits: Path) -> None:
    names = [f"c{i:03}" for i in range(115)] + list("56789")
    cpu = torch.device("cpu")
    model: Any = tiny(120, seed=1).eval()
    model.mean, model.std = IMAGENET_MEAN, IMAGENET_STD
    predictor = Predictor(model, names, Preprocessing(32), None, cpu, None)
    pictures = find_pictures(digits / "val")
    record = measure(predictor, pictures, run_labels(pictures, names), skip_unreadable=False)
    assert record["confusion"] == []
    assert len(record["per_class"]) == 120
    num_wrong = sum(count for _, _, count in record["most_confused_pairs"])
    assert record["num_pictures"] - num_wrong == round(record["accuracy"] * 15)
    assert {label for label, _, _ in record["most_confused_pairs"]} <= set(range(115, 120))
    shown = describe(record | {"folder": "there"})
    num_pairs = len(record["most_confused_pairs"])
    assert f"{min(num_pairs, 12)} of {num_pairs} pairs" in shown
    assert "mean over 5 of 120 classes" in shown
    matrix = np.zeros((120, 120), dtype=int)
    for label, guess, count in record["most_confused_pairs"]:
        matrix[label, guess] = count
    earlier = {"confusion": matrix.tolist(), "most_confused_pairs": [], "folder": "there"}
    assert describe(record | earlier) == shown


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


def test_the_files_that_predict_leaves_out_of_a_folder_are_counted(
    run: RunDir, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits / "val" / "5", tmp_path / "photos")
    picture = next((tmp_path / "photos").iterdir())
    picture.rename(picture.with_suffix(""))  # read by its content
    for name in ("a.txt", "b.txt", "clip.mp4"):
        (tmp_path / "photos" / name).write_text("not a picture")
    code, answers, error = answers_of(capsys, run.path, tmp_path / "photos")
    assert (code, len(answers)) == (0, 3)
    assert f"left out in {tmp_path / 'photos'}: 2 .txt and 1 .mp4" in error
    for path in (tmp_path / "photos").iterdir():
        if path.suffix not in (".txt", ".mp4"):
            path.unlink()
    code, _, error = answers_of(capsys, run.path, tmp_path / "photos")
    assert code == 1
    assert "holds no pictures (found: 2 .txt and 1 .mp4)" in error
