"""Which parts train at which rate, and that the losses equal those of a plain training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from finetune.config.backbones import find_backbone
from finetune.config.fields import RunConfig
from finetune.data.splits import find_splits
from finetune.features.loader import EpochLoader
from finetune.model.chain import Chain
from finetune.runs.run_dir import read_metrics
from finetune.training.module import FineTuning
from tests.conftest import Train
from tests.support import plain_loop

STRATEGIES = ("freeze", "partial", "gradual", "scratch")
ORDER = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
FIRST_TRAINED = {"freeze": "fc", "partial": "layer3", "gradual": "layer2", "scratch": "conv1"}


def is_frozen(key: str, strategy: str) -> bool:
    return ORDER.index(key.partition(".")[0]) < ORDER.index(FIRST_TRAINED[strategy])


@pytest.mark.parametrize("strategy", ["freeze", "partial", "gradual"])
def test_frozen_parts_are_bit_identical_after_a_run_and_the_others_are_not(
    strategy: str, train: Train, weights: Path
) -> None:
    run_dir = train(strategy=strategy, keep_last=True)
    before = torch.load(weights, weights_only=True)
    after = torch.load(run_dir.best_path, weights_only=True)["state_dict"]
    # In the last epoch everything has trained; the best may be an earlier one.
    last = torch.load(run_dir.last_path, weights_only=True)["state_dict"]
    for key, tensor in before.items():
        if is_frozen(key, strategy):
            assert torch.equal(tensor, after[key]), key
            assert f"network.{key}" not in last
        elif not key.startswith("fc"):
            assert not torch.equal(tensor, last[f"network.{key}"]), key


def test_graduals_parts_start_one_by_one_at_halved_rates(train: Train) -> None:
    rows = read_metrics(train(strategy="gradual", learning_rate=0.008).metrics_path)
    rates = [[row[f"lr/{part}"] for part in ("fc", "layer4", "layer3", "layer2")] for row in rows]
    assert rates == [
        [0.008, 0, 0, 0],
        [0.008, 0.004, 0, 0],
        [0.008, 0.004, 0.002, 0],
        [0.008, 0.004, 0.002, 0.001],
    ]
    assert all(row["lr/stem"] == row["lr/layer1"] == 0 for row in rows)
    counts = [row["trainable_parameters"] for row in rows]
    assert counts == sorted(set(counts))


@pytest.mark.real_network
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_equals_a_plain_loop(strategy: str, train: Train, fields: dict[str, Any]) -> None:
    # More would amplify the last bits, which differ between processors.
    settings = {"strategy": strategy, "learning_rate": 0.0001}
    ours = read_metrics(train(**settings).metrics_path)
    config = RunConfig.from_fields(fields | settings)
    network = plain_loop.create(config.model, 5, config.image_size)
    network.load_state_dict(plain_loop.first_weights(config))
    plain = plain_loop.run(config, network)
    for row, expected in zip(ours, plain, strict=True):
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (row["epoch"], name)


def test_frozen_batchnorm_stays_in_eval_mode_when_train_is_called(config: RunConfig) -> None:
    network = resnet18(num_classes=5)
    chain = Chain(network, find_backbone("resnet18"))
    module = FineTuning(chain, config, EpochLoader(config, find_splits(config), None))
    module.open_parts(0)
    module.train()  # as Lightning calls it, at any moment
    frozen = [m for n, m in network.named_modules() if n.startswith(("bn1", "layer1", "layer2"))]
    assert not any(m.training for m in frozen if isinstance(m, nn.BatchNorm2d))
    assert network.layer3[0].bn1.training
    module.eval()
    assert not network.layer3[0].bn1.training
