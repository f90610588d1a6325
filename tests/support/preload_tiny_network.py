"""What a fork server imports whose runs train the tiny network."""

import importlib

from finetune.model import network
from tests.support.tiny_network import tiny_resnet18

network.resnet18 = tiny_resnet18  # type: ignore[assignment]
importlib.import_module("finetune.sweep.preload")
