"""A ResNet18 of a few channels: the same parts, a thousandth of the work."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

CHANNELS = (8, 8, 8, 16, 16)
"""Not fewer: with 4, torch 2.14.1 corrupts its heap in channels_last on a CPU."""


class TinyResNet(nn.Module):
    """Parts named as in torchvision's ResNet18, one block each."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _layer(CHANNELS[0], CHANNELS[1], 1)
        self.layer2 = _layer(CHANNELS[1], CHANNELS[2], 2)
        self.layer3 = _layer(CHANNELS[2], CHANNELS[3], 2)
        self.layer4 = _layer(CHANNELS[3], CHANNELS[4], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(CHANNELS[4], num_classes)

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


def tiny_resnet18(num_classes: int = 1000) -> TinyResNet:
    """A stand-in for `torchvision.models.resnet18`."""
    return TinyResNet(num_classes)
