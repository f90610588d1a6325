"""The tests' small network as an entry of the table, without an import of torch.

It is registered as a user's own network is, by an entry point: that of
child_path/tests_networks-1.dist-info, on the path of the tests and their child processes.
"""

from __future__ import annotations

from finetune.config.backbones import BACKBONES, Backbone

TINY = Backbone("tests.support.tiny_network:TinyResNet", BACKBONES["resnet18"].parts)
TINY2 = Backbone(
    "tests.support.tiny_network:TinyResNet", BACKBONES["resnet18"].parts, options={"width": 2}
)
"""As `TINY`, with twice the channels."""
