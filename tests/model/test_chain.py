"""A network divided into parts: the parts compute what the network computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.config.backbones import BACKBONES, Backbone
from finetune.model.chain import Chain
from finetune.model.network import boundary_shape, build, on_meta
from finetune.system.errors import ConfigError
from tests.support import plain_loop

MODELS = [pytest.param(m, marks=pytest.mark.slow) if m == "vit_b_16" else m for m in BACKBONES]


@pytest.mark.parametrize("model", MODELS)
def test_the_parts_in_order_give_the_networks_logits_to_the_bit(model: str) -> None:
    chain = build(model, num_classes=3, image_size=64, seed=1)
    chain.network.eval()
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        x = pictures = torch.randn(2, 3, 64, 64)
        for part, following in zip(chain.parts, [*chain.parts[1:], None], strict=True):
            x = chain.forward(x, part, following)
            if following:
                shape = boundary_shape(model, following, 64)
                assert x[0].numel() == torch.Size(shape).numel()
        assert torch.equal(x, chain.network(pictures))


@pytest.mark.parametrize("model", BACKBONES)
def test_each_weight_belongs_to_the_part_that_torchvisions_source_shows(model: str) -> None:
    chain = on_meta(model, num_classes=3, image_size=64)
    assert chain.part_of_key
    for key, part in chain.part_of_key.items():
        assert part == plain_loop.part_of(model, key), key


@pytest.mark.parametrize("model", MODELS)
def test_the_head_is_the_same_for_every_source_of_weights_and_the_rest_torchvisions(
    model: str,
) -> None:
    first, second = (build(model, 3, 64, seed=5).network.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = build(model, 3, 64, seed=6).network.state_dict()
    assert not all(torch.equal(first[key], other[key]) for key in first)
    (head, *_) = plain_loop.PARTS[model]
    linear = nn.Linear(1, 1)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        (weight,) = [
            value
            for key, value in first.items()
            if plain_loop.part_of(model, key) == head and value.ndim == 2
        ]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    assert torch.equal(weight, linear.weight)


class Net(nn.Module):
    """conv -> mid -> fc."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.mid = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mid(self.conv(x)).mean((2, 3)))


class WithSkip(Net):
    def forward(self, x: Tensor) -> Tensor:
        early = self.conv(x)
        return self.fc(self.mid(early).mean((2, 3))) + early.mean((1, 2, 3))[:, None]


class WithUnused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(2, 2)


class Backwards(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(torch.cat([self.mid(x.repeat(1, 3, 1, 1)[:, :8])] * 1)[:, :3]))


class WithBranch(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return super().forward(x)


class Tied(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mid(self.mid(self.conv(x))).mean((2, 3)) + self.conv(x).mean((2, 3)))


PARTS = {"stem": "conv", "middle": "mid", "head": "fc"}


def test_a_chain_is_divided() -> None:
    chain = Chain(Net(), Backbone("x:y", PARTS))
    assert chain.state(["middle"]).keys() == {"mid.weight", "mid.bias"}
    assert chain.modules("middle") == [chain.network.mid]
    x = torch.randn(1, 3, 9, 9)
    halfway = chain.forward(x, "stem", "middle")
    assert torch.equal(chain.forward(halfway, "middle", None), chain.network(x))


@pytest.mark.parametrize(
    ("network", "parts", "words"),
    [
        (WithSkip(), PARTS, "2 tensors go from middle or before to head"),
        (WithUnused(), PARTS, r"doesn't use auxiliary\.weight and auxiliary\.bias"),
        (Backwards(), PARTS, "conv does not run in stem"),
        (WithBranch(), PARTS, "can't be traced: .*control flow"),
        (Tied(), PARTS, "conv is used by stem and by middle"),
        (
            Net(),
            {"stem": "conv", "middle": "nowhere", "head": "fc"},
            "nowhere .middle. does not run",
        ),
    ],
    ids=["skip", "unused", "order", "branch", "tied", "missing"],
)
def test_what_is_no_chain_is_refused_with_the_reason(
    network: Any, parts: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Chain(network, Backbone("x:y", parts))
