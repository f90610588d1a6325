"""Networks as data: names, parts, registration, and what the config checks of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import finetune
from finetune.config import backbones
from finetune.config.backbones import BACKBONES, Backbone, find_backbone, register_model
from finetune.config.fields import RunConfig
from finetune.config.strategies import STRATEGIES
from finetune.system.errors import ConfigError
from tests.conftest import ROOT
from tests.support.tiny_backbone import TINY


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_registered", {})


def test_a_registered_network_is_a_model(registry: None) -> None:
    entry = Backbone("mine:build", {"body": "conv", "top": "linear"}, mean=(0.5, 0.5, 0.5))
    register_model("mine", entry)
    config = RunConfig.from_fields({"model": "mine", "strategy": "freeze"})
    assert config.backbone == entry
    assert config.plan.start_epochs == {"top": 0}
    assert config.name == "mine-freeze-lr0.001-bs32-aug"


def test_a_name_is_registered_once_and_is_a_word(registry: None) -> None:
    register_model("mine", TINY)
    register_model("mine", TINY)
    with pytest.raises(ConfigError, match="mine is taken"):
        register_model("mine", BACKBONES["resnet18"])
    with pytest.raises(ConfigError, match="resnet18 is taken"):
        register_model("resnet18", TINY)
    with pytest.raises(ConfigError, match="a name of letters"):
        register_model("timm:mine", TINY)


def test_an_entry_point_makes_a_network_known_in_every_process() -> None:
    assert find_backbone("tiny") == TINY
    code = "from finetune.config.backbones import find_backbone; print(find_backbone('tiny').head)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "fc\n"


def test_an_unknown_network_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"got 'resnet51'; must be one of resnet18.*tiny.*timm:"):
        RunConfig.from_fields({"model": "resnet51"})


def test_all_fields_that_are_wrong_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"epochs: .*; .*learning_rate: "):
        RunConfig.from_fields({"model": "resnet51", "epochs": 0, "learning_rate": -1})


@pytest.mark.parametrize("model", BACKBONES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_mean_the_same_depth_in_every_network(model: str, strategy: str) -> None:
    plan = RunConfig.from_fields({"model": model, "strategy": strategy}).plan
    ours = RunConfig.from_fields({"strategy": strategy}).plan
    depths = [len(p.parts) - p.parts.index(part) for p in (plan, ours) for part in p.start_epochs]
    assert depths[: len(depths) // 2] == depths[len(depths) // 2 :]
    assert [*plan.start_epochs.values()] == [*ours.start_epochs.values()]


def test_the_parts_are_named_by_the_network() -> None:
    config = RunConfig.from_fields({"model": "vit_b_16", "image_size": 224})
    assert config.unfreeze_from == "stage3"
    with pytest.raises(ConfigError, match="'layer3'; vit_b_16 has the parts stem, stage1, stage2"):
        RunConfig.from_fields({"model": "vit_b_16", "unfreeze_from": "layer3"})


def test_a_vision_transformer_takes_multiples_of_its_patches() -> None:
    with pytest.raises(ConfigError, match="got 100; vit_b_16 needs at least 32 and a multiple of"):
        RunConfig.from_fields({"model": "vit_b_16", "image_size": 100})


def test_weights_may_name_the_model() -> None:
    given = {"weights": "/w/{model}-imagenet.pth"}
    assert RunConfig.from_fields(given).weights == "/w/resnet18-imagenet.pth"
    timm = RunConfig.from_fields({**given, "model": "timm:vit_tiny_patch16_224"})
    assert timm.weights == "/w/vit_tiny_patch16_224-imagenet.pth"


def test_a_config_with_a_network_of_timm_is_made_without_importing_it() -> None:
    code = (
        "import sys; from finetune.config.fields import RunConfig\n"
        "RunConfig.from_fields({'model': 'timm:resnet26', 'strategy': 'gradual'})\n"
        "assert not {'timm', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_public_names_are_those_of_the_package() -> None:
    assert finetune.register_model is register_model
    assert finetune.Backbone is Backbone
    assert Path(finetune.__file__).parent == ROOT / "finetune"
