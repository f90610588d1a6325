"""The package as Python and notebooks use it."""

from __future__ import annotations

import copy
import inspect
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
from finetune.config.fields import RunConfig
from finetune.inference.predict import load_predictor, predict_logits
from finetune.runs.predictions import softmax
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.system.errors import ConfigError, DataError, FinetuneError
from tests.conftest import Train


@pytest.fixture(scope="module")
def run_dir(train_once: Train) -> RunDir:
    return train_once(epochs=2)


def test_a_model_predicts_paths_images_arrays_and_lists(run_dir: RunDir) -> None:
    path = Path(str(run_dir.read_predictions()[2][0]))
    model: Any = finetune.load_best(run_dir.path)
    found = model.predict(path)
    (logits,) = predict_logits(load_predictor(run_dir.path), [path])
    assert not isinstance(logits, DataError)
    expected = dict(zip(model.class_names, softmax(logits), strict=True))
    assert found.probabilities == pytest.approx(expected, abs=1e-6)
    assert found.class_name == next(iter(found.probabilities)) == max(expected, key=expected.get)
    assert repr(found) == f"Prediction({found.class_name} {100 * found.probability:.1f} %)"
    with Image.open(path) as image:
        given = [str(path), image, np.array(image), np.array(image.convert("RGB"))]
        listed = model.predict(given)
        assert [one.class_name for one in listed] == [found.class_name] * 4
        for one in listed:
            assert one.probabilities == pytest.approx(found.probabilities, abs=1e-6)
    assert model.predict([]) == []
    assert len(model.predict([path] * 40)) == 40
    assert finetune.predict(run_dir.path, path) == found
    for wrong in (np.zeros((3, 3)), 7, path.parent / "none.png"):
        with pytest.raises(DataError):
            model.predict(wrong)


def test_a_loaded_model_can_be_copied_and_saved(run_dir: RunDir) -> None:
    model: Any = finetune.load_best(run_dir.path)
    path = run_dir.read_predictions()[2][0]
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model), buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert again.predict(path).probabilities == model.predict(path).probabilities


def test_a_result_shows_itself_in_a_line_and_in_a_notebook_with_its_curve(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    result: Any = finetune.load_best(run_dir.path).result
    assert result.run_dir == run_dir.path
    assert len(repr(result)) < 250 and "best_val_acc=" in repr(result)
    assert result._repr_html_().count("<polyline") == 2
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it were not installed
    assert [row["epoch"] for row in result.history] == [0, 1]


def test_the_history_is_a_data_frame_where_pandas_is_installed(run_dir: RunDir) -> None:
    pytest.importorskip("pandas")
    history = RunResult.load(run_dir.path).history
    rows = read_metrics(run_dir.metrics_path)
    assert history.index.name == "epoch" and [*history.index] == [0, 1]
    assert [*history.val_acc] == [row["val_acc"] for row in rows]
    shown = history.to_string()
    assert f" {rows[0]['trainable_parameters']:.0f} " in shown  # whole numbers without a fraction
    assert shown.splitlines()[2].startswith("0 ")


def test_the_package_lists_its_names_and_its_functions_show_their_fields() -> None:
    assert {*finetune.__all__} <= {*dir(finetune)}
    for name in finetune.__all__:
        assert callable(getattr(finetune, name)), name
    parameters = inspect.signature(finetune.train_and_finetune).parameters
    assert [*parameters] == [*RunConfig.model_fields, "config", "resume"]
    assert parameters["epochs"].default == 10


def test_errors_are_one_line_in_a_notebook() -> None:
    error: Any = ConfigError("epochs: got 0")
    assert error._render_traceback_() == ["ConfigError: epochs: got 0"]


@pytest.mark.slow
def test_the_commands_are_functions(run_dir: RunDir, digits: Path, tmp_path: Path) -> None:
    config = run_dir.read_config()
    names = ("model", "weights", "image_size", "accelerator", "val_fraction")
    fields = {name: getattr(config, name) for name in names}
    parameters = {"strategy": {"values": ["freeze"]}, "learning_rate": {"values": [0.01, 0.1]}}
    content = {"method": "grid", "parameters": parameters}
    sweep: Any = finetune.sweep
    found = sweep(content, out=tmp_path, data_dir=digits, epochs=1, cache="off", **fields)
    assert [result.state for result in found] == ["finished", "finished"]
    assert found[0].setting.keys() == {"learning_rate"}
    assert [one.state for one in finetune.confirm(tmp_path, num_seeds=1)] == ["finished"]
    comparison = finetune.report(tmp_path)
    assert [*comparison.varied] == ["learning_rate"]
    assert repr(comparison) == f"Comparison({comparison.headline})"
    assert (tmp_path / "report.html").exists()
    assert finetune.evaluate(found[0].run_dir)["num_pictures"] == 15
    with pytest.raises(FinetuneError, match="does not exist"):
        sweep(content, out=tmp_path / "other", data_dir=tmp_path / "none")
