"""Which parts train at which rate, and that the losses equal those of a plain training loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18
from torchvision.transforms.functional import normalize

from finetune.config.backbones import find_backbone
from finetune.config.fields import RunConfig
from finetune.data.batches import batch_bounds
from finetune.data.decode import Preprocessing, decode
from finetune.data.seeding import epoch_flips, epoch_order
from finetune.data.splits import find_splits
from finetune.features.loader import EpochLoader
from finetune.model.chain import Chain
from finetune.model.network import build
from finetune.runs.run_dir import read_metrics
from finetune.training.module import FineTuning
from tests.conftest import Train

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


def plain_loop(config: RunConfig) -> list[dict[str, float]]:
    """The same training as a plain loop over the whole network, without stored activations."""
    splits = find_splits(config)
    model: Any = build(config.model, 5, config.image_size, config.seed).network
    if config.weights:
        source = torch.load(config.weights, weights_only=True)
        model.load_state_dict({k: v for k, v in source.items() if "fc" not in k}, strict=False)
    model = model.to(memory_format=torch.channels_last)

    def pictures(split: Any) -> Tensor:
        images = [
            decode(split.path(i), Preprocessing(config.image_size)).image for i in range(len(split))
        ]
        x = torch.stack(images).permute(0, 3, 1, 2) / 255
        return normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    x_train, x_val = pictures(splits.train), pictures(splits.val)
    y_train, y_val = torch.tensor(splits.train.labels), torch.tensor(splits.val.labels)
    starts = {
        "freeze": {"fc": 0},
        "partial": {"fc": 0, "layer4": 0, "layer3": 0},
        "gradual": {"fc": 0, "layer4": 1, "layer3": 2, "layer2": 3},
        "scratch": dict.fromkeys(ORDER, 0),
    }[config.strategy]
    decay = 0.5 if config.strategy == "gradual" else 1.0
    depth = {"fc": 0, "layer4": 1, "layer3": 2, "layer2": 3}
    optimizer = torch.optim.SGD(
        [
            {
                "params": list(module.parameters()),
                "lr": config.learning_rate * decay ** depth.get(name, 0),
            }
            for name, module in model.named_children()
        ],
        momentum=config.momentum,
    )
    rows = []
    for epoch in range(config.epochs):
        for name, module in model.named_children():
            module.requires_grad_(starts.get(name, math.inf) <= epoch)
            module.train(starts.get(name, math.inf) <= epoch)
        order = epoch_order(splits.train, config.seed, epoch)
        flips = torch.from_numpy(epoch_flips(splits.train, config.seed, epoch))
        total = 0.0
        for start, end in batch_bounds(len(order), config.batch_size):
            chosen = order[start:end]
            x = x_train[chosen]
            x[flips[chosen]] = x[flips[chosen]].flip(3)
            loss = cross_entropy(model(x), y_train[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        model.eval()
        with torch.no_grad():
            logits = model(x_val)
        rows.append(
            {
                "train_loss": total / len(order),
                "val_loss": cross_entropy(logits, y_val).item(),
                "val_acc": (logits.argmax(1) == y_val).double().mean().item(),
            }
        )
    return rows


@pytest.mark.real_network
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_equals_a_plain_loop(strategy: str, train: Train, fields: dict[str, Any]) -> None:
    settings = {"strategy": strategy, "learning_rate": 0.001}
    ours = read_metrics(train(**settings).metrics_path)
    plain = plain_loop(RunConfig.from_fields(fields | settings))
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
