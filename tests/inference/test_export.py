"""Exported files: they give the model's logits, and describe their input and output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torchvision.models import resnet18

from finetune.__main__ import main
from finetune.data.decode import Preprocessing, decode
from finetune.inference.predict import load_predictor, predict_logits
from finetune.model.network import build, load_source
from finetune.model.weights import write_checkpoint
from finetune.system.errors import ConfigError, MissingPackage, WeightsError


def resnet(seed: int) -> Any:
    return build("resnet18", 5, 64, seed).network


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with only a best.ckpt, which is all that an export needs."""
    content = {
        "state_dict": resnet(seed=3).state_dict(),
        "class_names": list("56789"),
        "image_size": 64,
    }
    place = tmp_path / "run"
    place.mkdir()
    write_checkpoint(content, place / "best.ckpt")
    return place


@pytest.mark.slow
def test_onnx_gives_the_models_logits_from_pixels(run_dir: Path, digits: Path) -> None:
    assert not main(["export", str(run_dir), "--format", "onnx"])
    session = onnxruntime.InferenceSession(str(run_dir / "model.onnx"))
    paths = sorted((digits / "val").glob("*/*.png"))
    pictures = np.stack([decode(path, Preprocessing(64)).image.numpy() for path in paths])
    (found,) = session.run(["logits"], {"pictures": pictures})
    expected: Any = predict_logits(load_predictor(run_dir), paths)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == list("56789")
    assert about["image_size"] == "64"
    assert json.loads(about["mean"]) == [0.485, 0.456, 0.406]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "opset", "ir_version"), [([], 18, 8), (["20"], 20, 9)])
def test_an_onnx_file_needs_no_newer_runtime_than_its_operators(
    options: list[str], opset: int, ir_version: int, run_dir: Path
) -> None:
    """onnxruntime reads opset 18 and IR 8 in 1.15, opset 20 and IR 9 in 1.17."""
    more = ["--opset", *options] if options else []
    assert not main(["export", str(run_dir), "--format", "onnx", *more])
    written = onnx.load(run_dir / "model.onnx")
    assert [entry.version for entry in written.opset_import] == [opset]
    assert written.ir_version == ir_version


@pytest.mark.parametrize("opset", ["17", "99"])
def test_an_opset_that_cannot_be_written_is_refused(opset: str, run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=rf"opset: got {opset}; must be 18 to \d+"):
        main(["export", str(run_dir), "--format", "onnx", "--opset", opset])
    assert not (run_dir / "model.onnx").exists()


def test_an_opset_of_another_format_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="opset: got 18 with --format state_dict; only onnx"):
        main(["export", str(run_dir), "--format", "state_dict", "--opset", "18"])


def test_a_state_dict_loads_into_torchvisions_resnet18_and_describes_its_input(
    run_dir: Path,
) -> None:
    out = run_dir / "elsewhere" / "exported.pth"
    assert not main(["export", str(run_dir), "--format", "state_dict", "--out", str(out)])
    content = torch.load(out, weights_only=True)
    resnet18(num_classes=5).load_state_dict(content["state_dict"])
    assert content["class_names"] == list("56789")
    assert "resized to 64x64" in content["preprocessing"]
    load_source(build("resnet18", 5, 64, seed=0), "resnet18", str(out), print)


def test_a_file_with_other_logits_is_refused_and_removed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {"state_dict": resnet(seed=4).state_dict()}
    monkeypatch.setattr("finetune.inference.export.read_checkpoint", lambda path: read)
    with pytest.raises(WeightsError, match="differ from the model's"):
        main(["export", str(run_dir), "--format", "state_dict"])
    assert not (run_dir / "model.pth").exists()


def test_a_missing_package_is_named_with_its_pip_line(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingPackage, match="pip install onnx onnxscript onnxruntime"):
        main(["export", str(run_dir), "--format", "onnx"])


def test_the_formats_are_listed(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"onnx.*state_dict"):
        main(["export", str(run_dir), "--format", "tflite"])
