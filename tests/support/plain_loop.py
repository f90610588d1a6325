"""Training as a plain PyTorch loop on torchvision's own networks, for comparison with a run's.

It knows the networks' parts by a table of its own, written down from torchvision's source.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import normalize

from finetune.config.fields import RunConfig
from finetune.data.batches import batch_bounds
from finetune.data.decode import Preprocessing, decode
from finetune.data.pictures import Pictures
from finetune.data.seeding import epoch_flips, epoch_order, step_generator
from finetune.data.splits import find_splits
from finetune.model.network import build

_RESNET = {
    "fc": ["fc"],
    "layer4": ["layer4"],
    "layer3": ["layer3"],
    "layer2": ["layer2"],
    "layer1": ["layer1"],
    "stem": ["conv1", "bn1"],
}


def _features(head: list[str], *numbers: str, last: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Parts that are modules of `features`, from the head to the input."""
    stages = [[f"features.{n}" for n in group.split()] for group in numbers]
    stages[0] += last
    names = [f"stage{len(stages) - 1 - i}" for i in range(len(stages) - 1)]
    return {"head": head, **dict(zip([*names, "stem"], stages, strict=True))}


PARTS: dict[str, dict[str, list[str]]] = {
    "resnet18": _RESNET,
    "resnet34": _RESNET,
    "resnet50": _RESNET,
    "convnext_tiny": _features(
        ["classifier.2"], "6 7", "4 5", "2 3", "1", "0", last=("classifier.0",)
    ),
    "efficientnet_b0": _features(["classifier"], "6 7 8", "4 5", "3", "2", "0 1"),
    "mobilenet_v3_large": _features(
        ["classifier.2", "classifier.3"], "13 14 15 16", "7 8 9 10 11 12", "4 5 6", "2 3", "0 1",
        last=("classifier.0",),
    ),
    "vit_b_16": {
        "head": ["heads.head"],
        **{
            f"stage{stage}": [
                f"encoder.layers.encoder_layer_{i}" for i in range(3 * stage - 3, 3 * stage)
            ]
            + ["encoder.ln"] * (stage == 4)
            for stage in (4, 3, 2, 1)
        },
        "stem": ["conv_proj", "class_token", "encoder.pos_embedding"],
    },
}  # fmt: skip
"""Of each network the parts, from the head to the input, with their modules."""


def create(name: str, num_classes: int, image_size: int) -> nn.Module:
    """torchvision's network with its own random weights."""
    options = {"image_size": image_size} if name.startswith("vit") else {}
    network: nn.Module = getattr(torchvision.models, name)(num_classes=num_classes, **options)
    return network


def first_weights(config: RunConfig) -> dict[str, Tensor]:
    """What a run starts from: its own head, and the source's other weights."""
    chain = build(config.model, 5, config.image_size, config.seed)
    state = dict(chain.network.state_dict())
    if config.weights:
        source = torch.load(config.weights, weights_only=True)
        (head, *_) = PARTS[config.model]
        state |= {k: v for k, v in source.items() if part_of(config.model, k) != head}
    return state


def start_epochs(config: RunConfig) -> dict[str, float]:
    """The epoch at which each part starts to train."""
    parts = list(PARTS[config.model])
    every = config.unfreeze_every or 0
    deepest = 0
    if config.strategy == "scratch":
        deepest = len(parts) - 1
    elif config.strategy not in ("freeze", "probe"):
        deepest = parts.index(str(config.unfreeze_from))
    every = every if config.strategy == "gradual" else 0
    return {p: d * every if d <= deepest else math.inf for d, p in enumerate(parts)}


def part_of(model: str, name: str) -> str | None:
    """The part that holds this module, parameter or buffer."""
    for part, paths in PARTS[model].items():
        if any(f"{name}.".startswith(f"{path}.") for path in paths):
            return part
    return None


def run(config: RunConfig, network: nn.Module) -> list[dict[str, float]]:
    """Train the network, which has its first weights; one row per epoch."""
    network = network.to(memory_format=torch.channels_last)
    splits, model = find_splits(config), config.model
    x_train, x_val = pixels(splits.train, config), pixels(splits.val, config)
    y_train, y_val = torch.tensor(splits.train.labels), torch.tensor(splits.val.labels)
    starts = start_epochs(config)
    decay = 1.0 if config.lr_decay is None else config.lr_decay
    groups = [
        {
            "params": [p for n, p in network.named_parameters() if part_of(model, n) == part],
            "lr": (config.learning_rate or 0.0) * decay**depth,
        }
        for depth, part in enumerate(PARTS[model])
    ]
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))  # type: ignore[arg-type]
    optimizer: torch.optim.Optimizer
    # fused, as a run's: torch 2.9 rounds the other one differently, and a network with BatchNorm
    # over few pictures amplifies that to 1e-3 within three epochs.
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay or 0.0, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, momentum=config.momentum or 0.0, fused=True)
    counts = torch.bincount(y_train)
    weights = len(y_train) / (len(counts) * counts) if config.class_weights != "none" else None
    rows = []
    for epoch in range(config.num_epochs):
        _open(network, model, {part for part, start in starts.items() if start <= epoch})
        order = epoch_order(splits.train, config.seed, epoch)
        flips = torch.from_numpy(epoch_flips(splits.train, config.seed, epoch))
        total = 0.0
        for step, (start, end) in enumerate(
            batch_bounds(len(order), config.batch_size or len(order))
        ):
            chosen = order[start:end]
            x = x_train[chosen]
            x[flips[chosen]] = x[flips[chosen]].flip(3)
            y = y_train[chosen]
            rng, share, order_in_batch = step_generator(config.seed, epoch, step), 1.0, None
            if config.mixup:
                share = rng.beta(config.mixup, config.mixup)
                share, order_in_batch = max(share, 1 - share), rng.permutation(len(y))
                x = share * x + (1 - share) * x[order_in_batch]
            torch.manual_seed(int(rng.integers(2**63)))  # dropout and stochastic depth
            logits = network(x)
            loss = cross_entropy(logits, y, weight=weights)
            if order_in_batch is not None:
                partners = cross_entropy(logits, y[order_in_batch], weight=weights)
                loss = share * loss + (1 - share) * partners
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        network.eval()
        with torch.no_grad():
            logits = network(x_val)
        rows.append(
            {
                "train_loss": total / len(order),
                "val_loss": cross_entropy(logits, y_val).item(),
                "val_acc": (logits.argmax(1) == y_val).double().mean().item(),
            }
        )
    return rows


def pixels(pictures: Pictures, config: RunConfig) -> Tensor:
    """Normalised pictures, (N, 3, H, W)."""
    size = Preprocessing(config.image_size)
    images: Any = [decode(pictures.path(i), size).image for i in range(len(pictures))]
    x = torch.stack(images).permute(0, 3, 1, 2) / 255
    return normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def _open(network: nn.Module, model: str, parts: set[str]) -> None:
    """Gradients and train mode for these parts alone."""
    network.eval()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(part_of(model, name) in parts)
    for name, module in network.named_modules():
        if part_of(model, name) in parts:
            module.train()
