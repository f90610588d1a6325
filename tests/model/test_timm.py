"""Networks of timm, divided by what timm says about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finetune
from finetune.config.backbones import find_backbone
from finetune.config.timm_backbones import create
from finetune.model.network import build, on_meta
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.system.errors import ConfigError, MissingPackage, WeightsError
from tests.conftest import carry_out

pytestmark = pytest.mark.slow

MODEL = "timm:tf_mobilenetv3_small_minimal_100"


@pytest.mark.parametrize(
    "name", ["resnet26", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "convnext_atto", MODEL]
)
def test_the_parts_give_the_networks_logits_to_the_bit(name: str) -> None:
    model = name if name.startswith("timm:") else f"timm:{name}"
    chain = build(model, num_classes=3, image_size=96, seed=1)
    chain.network.eval()
    x = torch.linspace(-2, 2, 2 * 3 * 96 * 96).reshape(2, 3, 96, 96)
    with torch.inference_mode():
        halfway = chain.forward(x, chain.parts[0], chain.parts[3])
        assert torch.equal(chain.forward(halfway, chain.parts[3], None), chain.network(x))


def test_normalisation_and_head_are_timms() -> None:
    entry = find_backbone("timm:tf_efficientnet_lite0")
    assert (entry.mean, entry.std) == ((0.5,) * 3, (0.5,) * 3)
    assert entry.parts["head"] == "classifier"
    assert list(entry.parts)[:3] == ["stem", "blocks_0", "blocks_1"]


def test_what_timm_groups_with_the_head_belongs_to_the_part_before_it() -> None:
    chain = on_meta("timm:mobilenetv3_small_050", num_classes=3, image_size=64)
    assert chain.state(["head"]).keys() == {"classifier.weight", "classifier.bias"}
    assert chain.part_of_key["conv_head.weight"] == chain.parts[-2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hrnet_w18_small", "hrnet_w18_small can't be divided into a chain of parts: 2 tensors go"),
        ("resnet27", r"timm [\d.]+ has no resnet27; did you mean .*resnet26"),
    ],
)
def test_other_networks_are_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        on_meta(f"timm:{name}", num_classes=3, image_size=64)


def test_a_missing_timm_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(MissingPackage, match="pip install timm"):
        create("timm:resnet26", num_classes=2)


def test_weights_that_timm_cannot_download_are_an_error_with_advice(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(WeightsError, match=r"timm can't provide those of timm:resnet26.*--weights"):
        carry_out(**fields | {"model": "timm:resnet26", "weights": "imagenet"})


@pytest.fixture
def settings(fields: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    torch.save(create(MODEL, num_classes=9).state_dict(), tmp_path / "source.pth")
    return fields | {"model": MODEL, "weights": tmp_path / "source.pth", "epochs": 3}


def test_a_run_records_its_parts_and_is_loaded_and_resumed(settings: dict[str, Any]) -> None:
    whole = carry_out(**settings, strategy="gradual")
    config = whole.read_config()
    assert config.unfreeze_from == find_backbone(MODEL).part_names[-4]
    rows = read_metrics(whole.metrics_path)
    assert {name for name in rows[0] if name.startswith("lr/")} == {
        f"lr/{part}" for part in find_backbone(MODEL).part_names
    }
    stopped = carry_out(**settings | {"epochs": 2}, strategy="gradual", keep_last=True)
    finetune.train_and_finetune(resume=stopped.path, epochs=3)
    keys = ("train_loss", "val_loss")
    resumed = read_metrics(stopped.metrics_path)
    assert [[row[k] for k in keys] for row in resumed] == [[row[k] for k in keys] for row in rows]
    model: Any = finetune.load_best(whole.path)
    assert model.model_name == MODEL
    assert not model.training


def test_stored_activations_give_the_same_losses(settings: dict[str, Any]) -> None:
    runs = [carry_out(**settings, strategy="freeze", cache=cache) for cache in ("off", "auto")]
    losses = [[row["val_loss"] for row in read_metrics(run.metrics_path)] for run in runs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_an_unknown_part_is_refused_with_the_networks_own(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'layer3'; timm:.* has the parts stem, blocks_0"):
        carry_out(**settings, strategy="partial", unfreeze_from="layer3")
    assert not list(Path(settings["out"]).glob("*/config.yaml"))


def test_a_run_directory_is_a_source_of_weights(settings: dict[str, Any]) -> None:
    first = carry_out(**settings, strategy="partial")
    second = RunDir(carry_out(**settings | {"weights": first.path}, strategy="freeze").path)
    before, after = (torch.load(run.best_path, weights_only=True) for run in (first, second))
    for key, value in before["state_dict"].items():
        if not key.startswith("classifier."):
            assert torch.equal(value, after["state_dict"][key]), key
