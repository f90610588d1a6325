"""A network of a few channels with the parts of a ResNet18: a thousandth of the work.

Tests use it as `model="tiny"` (see tiny_backbone.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from tests.support.tiny_backbone import TINY

CHANNELS = (8, 8, 8, 16, 16)
"""Not fewer: with 4, torch 2.14.1 corrupts its heap in channels_last on a CPU."""


class TinyResNet(nn.Module):
    """Parts named as in torchvision's ResNet18, one block each."""

    def __init__(self, num_classes: int = 1000, width: int = 1) -> None:
        super().__init__()
        channels = [width * count for count in CHANNELS]
        self.conv1 = nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _layer(channels[0], channels[1], 1)
        self.layer2 = _layer(channels[1], channels[2], 2)
        self.layer3 = _layer(channels[2], channels[3], 2)
        self.layer4 = _layer(channels[3], channels[4], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[4], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _layer(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1 or channels_in != channels_out:
        downsample = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
            nn.BatchNorm2d(channels_out),
        )
    return nn.Sequential(BasicBlock(channels_in, channels_out, stride, downsample))


def tiny(num_classes: int, seed: int) -> TinyResNet:
    """The network with random weights."""
    from finetune.model.network import build

    network = build("tiny", num_classes, 64, seed).network
    assert isinstance(network, TinyResNet)
    return network


def load_into(network: nn.Module, weights: str, log: Callable[[str], None]) -> str:
    """`load_source` into a network from `tiny`; the fingerprint of the weights."""
    from finetune.model.chain import Chain
    from finetune.model.network import load_source

    return load_source(Chain(network, TINY), "tiny", weights, log)
