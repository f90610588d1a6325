"""Every network and strategy: the numbers are those of a plain loop on torchvision's network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

import finetune
from finetune.__main__ import main
from finetune.config.backbones import BACKBONES
from finetune.config.fields import RunConfig
from finetune.config.strategies import STRATEGIES
from finetune.data.decode import Preprocessing, decode
from finetune.data.pictures import find_pictures
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir, read_metrics
from tests.conftest import carry_out
from tests.support import plain_loop

COMPARED = ("train_loss", "val_loss", "val_acc")
SIZE = 64

OTHERS = [
    *((model, "partial") for model in ("resnet50", "convnext_tiny", "efficientnet_b0")),
    ("vit_b_16", "freeze"),
]


def pairs(*quick: tuple[str, str]) -> pytest.MarkDecorator:
    """All networks with all strategies; those that are not `quick` only in the long tests."""
    everything = [(model, strategy) for model in BACKBONES for strategy in STRATEGIES]
    marked = [
        pytest.param(*pair, marks=pytest.mark.slow if pair in quick else pytest.mark.long)
        for pair in everything
    ]
    return pytest.mark.parametrize(("model", "strategy"), marked)


@pytest.fixture(scope="module")
def sources(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes source weights of a network, with statistics of BatchNorm that fit its activations."""
    folder = tmp_path_factory.mktemp("sources")

    def source(model: str) -> Path:
        path = folder / f"{model}.pth"
        if not path.exists():
            with torch.random.fork_rng():
                torch.manual_seed(3)
                network = plain_loop.create(model, num_classes=7, image_size=SIZE).train()
                for module in network.modules():
                    if isinstance(module, Bottleneck):  # else small differences grow in its depth
                        nn.init.constant_(module.bn3.weight, 0.2)
                    if isinstance(module, nn.BatchNorm2d):
                        module.momentum = 1.0
                pictures = find_pictures(digits / "train", "train")
                with torch.no_grad():
                    pixels = plain_loop.pixels(pictures, RunConfig(image_size=SIZE))
                    noise = (torch.rand_like(pixels) - 0.45) / 0.225  # as `export` compares with
                    network(torch.cat([pixels, noise]))
            torch.save(network.state_dict(), path)
        return path

    return source


@pytest.fixture
def settings(
    model: str, strategy: str, sources: Callable[[str], Path], digits: Path, tmp_path: Path
) -> dict[str, Any]:
    """Three epochs, in which gradual opens two parts below the head."""
    *_, second, _, _ = BACKBONES[model].part_names
    return {
        "model": model,
        "strategy": strategy,
        "unfreeze_from": second if strategy == "gradual" else None,
        "weights": None if strategy == "scratch" else sources(model),
        "data_dir": digits,
        "val_fraction": 0,
        "image_size": SIZE,
        "batch_size": 10,
        "learning_rate": 0.00001,  # more would amplify the last bits of stored activations
        "epochs": 3,
        "patience": 0,
        "out": tmp_path / "runs",
        "cache_dir": tmp_path / "cache",
        "accelerator": "cpu",
    }


def losses(run: RunDir) -> list[list[float]]:
    return [[row[name] for name in COMPARED] for row in read_metrics(run.metrics_path)]


@pairs(*OTHERS[1:], *(("mobilenet_v3_large", name) for name in list(STRATEGIES)[2:]))
def test_a_run_equals_a_plain_loop_and_its_frozen_parts_keep_their_bits(
    model: str, strategy: str, settings: dict[str, Any]
) -> None:
    run = carry_out(**settings)
    config = RunConfig.from_fields(settings)
    network, before = plain_loop.create(model, 5, SIZE), plain_loop.first_weights(config)
    if config.solves_head:
        probe = carry_out(**{**settings, "strategy": "probe", "unfreeze_from": None})
        before = torch.load(probe.best_path, weights_only=True)["state_dict"]
    network.load_state_dict(before)
    expected = [[row[name] for name in COMPARED] for row in plain_loop.run(config, network)]
    np.testing.assert_allclose(losses(run), expected, rtol=1e-5, atol=1e-5)
    after = torch.load(run.best_path, weights_only=True)["state_dict"]
    starts = plain_loop.start_epochs(config)
    frozen = [k for k in before if starts[plain_loop.part_of(model, k) or ""] == float("inf")]
    assert bool(frozen) == (strategy in ("probe", "freeze", "partial", "gradual"))
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert (strategy == "probe") == all(torch.equal(before[key], after[key]) for key in before)


OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.05},
    "mixup": {"mixup": 0.4},
    "class weights": {"class_weights": "balanced"},
    "all": {"optimizer": "adamw", "mixup": 0.2, "class_weights": "balanced", "lr_decay": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mobilenet_v3_large"])
@pytest.mark.parametrize("strategy", ["partial"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_with_other_options_equals_a_plain_loop_and_resumes_to_the_same_bits(
    model: str, strategy: str, options: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= options | {"data_dir": unbalanced(settings["data_dir"], tmp_path / "data")}
    run = carry_out(**settings)
    network = plain_loop.create(model, 5, SIZE)
    network.load_state_dict(plain_loop.first_weights(RunConfig.from_fields(settings)))
    rows = plain_loop.run(RunConfig.from_fields(settings), network)
    expected = [[row[name] for name in COMPARED] for row in rows]
    np.testing.assert_allclose(losses(run), expected, rtol=1e-5, atol=1e-5)
    interrupted = carry_out(**{**settings, "epochs": 2}, keep_last=True)
    finetune.train_and_finetune(resume=interrupted.path, epochs=3)
    assert losses(interrupted) == losses(run)


def unbalanced(data_dir: Path, copy: Path) -> Path:
    """A copy of the data with fewer training pictures of the first class."""
    shutil.copytree(data_dir, copy)
    for path in sorted((copy / "train" / "5").iterdir())[2:]:
        path.unlink()
    return copy


@pairs(*OTHERS[2:3], ("mobilenet_v3_large", "gradual"))
def test_a_run_gives_the_same_without_a_cache_and_the_same_bits_when_resumed(
    model: str, strategy: str, settings: dict[str, Any]
) -> None:
    whole = carry_out(**settings, keep_last=True)
    uncached = carry_out(**settings, cache="off")
    np.testing.assert_allclose(losses(uncached), losses(whole), rtol=1e-5, atol=1e-5)
    if strategy == "probe":
        return  # it has no epochs
    interrupted = carry_out(**{**settings, "epochs": 2}, keep_last=True)
    finetune.train_and_finetune(resume=interrupted.path, epochs=3)
    assert losses(interrupted) == losses(whole)
    last = [torch.load(run.last_path, weights_only=True) for run in (whole, interrupted)]
    ours, theirs = (content["state_dict"] for content in last)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pairs(*OTHERS[2:3], ("mobilenet_v3_large", "lp-ft"))
def test_the_best_model_predicts_its_accuracy_and_is_exported(
    model: str, strategy: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = carry_out(**settings)
    result = RunResult.load(run.path)
    folder = Path(result.config["data_dir"]) / "val"
    capsys.readouterr()
    assert not main(["predict", str(run.path), str(folder), "--json"])
    answers = json.loads(capsys.readouterr().out)
    hits = [answer["class"] == Path(answer["path"]).parent.name for answer in answers]
    assert sum(hits) / len(hits) == result.best_val_acc
    assert not main(["export", str(run.path), "--format", "onnx"])
    session = onnxruntime.InferenceSession(str(run.path / "model.onnx"))
    recorded, _, paths = run.read_predictions()
    decoded = [decode(Path(path), Preprocessing(SIZE)).image.numpy() for path in paths]
    (logits,) = session.run(["logits"], {"pictures": np.stack(decoded)})
    largest = max(1.0, float(np.abs(recorded).max()))
    np.testing.assert_allclose(logits, recorded, atol=1e-4 * largest)
