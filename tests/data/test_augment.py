"""Strong augmentation: its operations are torchvision's, and each picture is as if alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from finetune.data import augment
from finetune.data.augment import StrongAugmentation
from finetune.data.seeding import mixed

SEEDS = mixed(np.arange(5000, dtype=np.uint64), 1)


def photograph(size: int = 64) -> Tensor:
    """A smooth picture with all colours, uint8 (H, W, C)."""
    y, x = torch.meshgrid(torch.linspace(0, 3, size), torch.linspace(0, 3, size), indexing="ij")
    waves = torch.stack([torch.sin(x + y), torch.cos(2 * x), torch.sin(x * y)], dim=-1)
    return ((waves + 1) * 120 + 5).to(torch.uint8)


def test_each_picture_is_changed_as_if_it_were_alone() -> None:
    pictures = torch.stack([photograph().roll(i, 0) for i in range(40)])
    together = StrongAugmentation.drawn(SEEDS[:40], 64).apply(pictures)
    assert together.dtype == torch.uint8
    for some in ([3], [7, 3, 39], list(range(39, -1, -1))):
        alone = StrongAugmentation.drawn(SEEDS[some], 64).apply(pictures[some])
        assert torch.equal(alone, together[some])
    assert not torch.equal(together, StrongAugmentation.drawn(SEEDS[40:80], 64).apply(pictures))


def test_neither_the_pictures_nor_torchs_generator_change() -> None:
    pictures, state = photograph()[None].expand(8, -1, -1, -1).contiguous(), torch.get_rng_state()
    before = pictures.clone()
    StrongAugmentation.drawn(SEEDS[:8], 64).apply(pictures)
    assert torch.equal(pictures, before)
    assert torch.equal(torch.get_rng_state(), state)


def apply_one(picture: Tensor, move: str = "identity", value: float = 0.0, **colours: float) -> Any:
    """The picture with one operation of a known value, and without a crop."""
    size = picture.shape[0]
    entries = [float(entry) for entry in augment._MOVES[move](np.array(value), size)]
    drawn = StrongAugmentation(
        [(0, 0, size, size)],
        [False],
        (torch.tensor([0]), torch.tensor(entries).view(1, 2, 3)),
        {name: (torch.tensor([0]), torch.tensor([v])) for name, v in colours.items()},
    )
    return drawn.apply(picture[None])[0].permute(2, 0, 1)


def test_without_an_operation_and_a_crop_the_picture_stays() -> None:
    assert torch.equal(apply_one(photograph()).permute(1, 2, 0), photograph())


@pytest.mark.parametrize("value", [0.99, 0.33, -0.66])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("brightness", v2.adjust_brightness),
        ("saturation", v2.adjust_saturation),
        ("contrast", v2.adjust_contrast),
        ("sharpness", v2.adjust_sharpness),
    ],
)
def test_blends_are_torchvisions(name: str, theirs: Any, value: float) -> None:
    ours = apply_one(photograph(), **{name: value}).int()
    expected = theirs(photograph().permute(2, 0, 1), 1 + value).int()
    assert (ours - expected).abs().max() <= 1  # torchvision cuts decimals off


@pytest.mark.parametrize("step", [0, 7, 15, 30])
def test_posterize_solarize_autocontrast_and_equalize_are_torchvisions(step: int) -> None:
    picture, value = photograph().permute(2, 0, 1), step / 30 * 0.99
    bits = 8 - round(step / 5)
    assert torch.equal(apply_one(photograph(), posterize=value), v2.posterize(picture, bits))
    threshold = 255 - 255 * step / 30
    assert torch.equal(apply_one(photograph(), solarize=value), v2.solarize(picture, threshold))
    assert torch.equal(apply_one(photograph(), autocontrast=value), v2.autocontrast(picture))
    assert torch.equal(apply_one(photograph(), equalize=value), v2.equalize(picture))


@pytest.mark.parametrize(
    ("move", "value", "affine"),
    [
        ("rotate", 0.99 / 3, {"angle": -45.0}),
        ("translate x", 0.99 / 4, {"translate": [-8, 0]}),
        ("translate y", 0.99 / 4, {"translate": [0, -8]}),
        ("shear x", 0.3, {"shear": [math.degrees(math.atan(0.3)), 0.0]}),
        ("shear y", 0.3, {"shear": [0.0, math.degrees(math.atan(0.3))]}),
    ],
)
def test_moves_are_torchvisions(move: str, value: float, affine: dict[str, Any]) -> None:
    picture = photograph().permute(2, 0, 1)
    options = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | affine
    expected = v2.affine(picture, interpolation=InterpolationMode.BILINEAR, **options).float()
    difference = (apply_one(photograph(), move, value).float() - expected).abs()
    assert difference.mean() < 2, "but for the edge of the picture"
    assert difference.median() <= 1


def test_a_crop_is_resized_and_flipped_like_torchvisions() -> None:
    nothing = (torch.tensor([], dtype=torch.int64), torch.zeros(0, 2, 3))
    drawn = StrongAugmentation([(0, 24, 48, 32)], [True], nothing, {})
    ours = drawn.apply(photograph()[None])[0].permute(2, 0, 1)
    cropped = v2.resized_crop(photograph().permute(2, 0, 1), 0, 24, 48, 32, [64, 64])
    assert torch.equal(ours, v2.horizontal_flip(cropped))


def test_draws_have_the_distribution_of_torchvisions_classes() -> None:
    drawn = StrongAugmentation.drawn(SEEDS, 64)
    num_operations = len(augment._OPERATIONS)
    shares = {name: len(chosen) / len(SEEDS) for name, (chosen, _) in drawn.colours.items()}
    assert len(shares) == 8
    assert all(abs(share - 1 / num_operations) < 0.015 for share in shares.values())
    assert abs(len(drawn.moves[0]) / len(SEEDS) - 5 / num_operations) < 0.03
    top, left, height, width = np.array(StrongAugmentation.drawn(SEEDS, 1000).crops).T
    assert min(top.min(), left.min()) == 0
    assert (top + height).max() == (left + width).max() == 1000
    area = height * width / 1e6
    assert 0.35 - 1e-3 <= area.min() < 0.36
    assert 0.97 < area.max() <= 1
    ratios = np.log(width / height)
    assert abs(ratios.mean()) < 0.02
    assert np.abs(ratios).max() <= math.log(4 / 3) + 0.01
    assert abs(sum(drawn.is_flipped) / len(SEEDS) - 0.5) < 0.03
    _, values = drawn.colours["brightness"]
    assert set((values / 0.99 * 30).round().int().tolist()) == set(range(-30, 31))
