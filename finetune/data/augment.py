"""Strong augmentation of a batch: random resized crop, flip and TrivialAugment.

What is drawn for a picture follows from its seed alone. The pictures are changed together, on the
device that they are on, and each as if it were alone.

Legend: B batch, H height, W width, C=3 channels (RGB).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms.v2 import functional as v2

from finetune.data.pictures import Keys
from finetune.data.seeding import mixed

Numbers = np.ndarray[Any, np.dtype[np.float64]]

_NUM_BINS = 31
_MAX_TRIES = 10  # of a crop that fits into the picture, as in torchvision
_MIN_AREA, _MAX_RATIO = 0.35, 4 / 3


def _blend(degenerate: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The operation that moves pictures away from a degenerate form, or towards it."""

    def operation(x_BCHW: Tensor, values: Tensor) -> Tensor:
        factors = (1 + values).view(-1, 1, 1, 1)
        return torch.lerp(degenerate(x_BCHW).float(), x_BCHW.float(), factors)

    return operation


def _posterize(x_BCHW: Tensor, values: Tensor) -> Tensor:
    steps = (2.0 ** (values * 6 / 0.99).round()).view(-1, 1, 1, 1)  # 8 bits are kept, down to 2
    return (x_BCHW.float() / steps).floor() * steps


def _solarize(x_BCHW: Tensor, values: Tensor) -> Tensor:
    thresholds = (255 * (1 - values / 0.99)).view(-1, 1, 1, 1)
    return torch.where(x_BCHW >= thresholds, 255 - x_BCHW, x_BCHW)


_COLOURS: Mapping[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {
    "brightness": (True, _blend(torch.zeros_like)),
    "saturation": (True, _blend(lambda x: v2.adjust_saturation(x, 0.0))),
    "contrast": (True, _blend(lambda x: v2.adjust_contrast(x, 0.0))),
    "sharpness": (True, _blend(lambda x: v2.adjust_sharpness(x, 0.0))),
    "posterize": (False, _posterize),
    "solarize": (False, _solarize),
    "autocontrast": (False, lambda x, values: v2.autocontrast(x)),
    "equalize": (False, lambda x, values: v2.equalize(x)),
}
"""Whether an operation's value, up to 0.99, has a sign; the operation on uint8 pictures."""

_MOVES: Mapping[str, Callable[[Numbers, int], tuple[Any, ...]]] = {
    "identity": lambda value, size: (1, 0, 0, 0, 1, 0),
    "shear x": lambda value, size: (1, value, 0, 0, 1, 0),
    "shear y": lambda value, size: (1, 0, 0, value, 1, 0),
    "translate x": lambda value, size: (1, 0, value / 0.99 * 64 / size, 0, 1, 0),
    "translate y": lambda value, size: (1, 0, 0, 0, 1, value / 0.99 * 64 / size),
    "rotate": lambda value, size: (
        *(np.cos(a := value / 0.99 * 0.75 * math.pi), -np.sin(a), 0),
        *(np.sin(a), np.cos(a), 0),
    ),
}
"""The matrix from a moved picture's coordinates, -1 to 1, to the picture's, by row. The largest
translation is 32 pixels, the largest rotation 135 degrees."""

_OPERATIONS = (*_MOVES, *_COLOURS)


class StrongAugmentation(NamedTuple):
    """What was drawn for the pictures of a batch.

    The crop and the flip are those of torchvision's RandomResizedCrop and RandomHorizontalFlip.
    Then follows one operation with one of 31 strengths, both at random: TrivialAugment, "wide", of
    Müller and Hutter 2021 (https://arxiv.org/abs/2103.10158). Shears are about the centre.
    """

    moves: Tensor
    """The matrix of each picture's move, float32, (B, 2, 3)."""
    crops: Tensor
    """Scale and centre of each picture's crop, by x and y, float32, (B, 2, 2)."""
    colours: dict[str, tuple[Tensor, Tensor]]
    """For each operation on colours its pictures' positions in the batch, and their values."""

    @classmethod
    def drawn(cls, seeds: Keys, image_size: int) -> Self:
        """`seeds`: of the pictures, uint64, (B,)."""
        operations = (_uniform(seeds, 0) * len(_OPERATIONS)).astype(int)
        values = np.floor(_uniform(seeds, 1) * _NUM_BINS) / (_NUM_BINS - 1) * 0.99
        signed = values * np.where(_uniform(seeds, 2) < 0.5, -1, 1)
        moves = np.tile(np.array([1.0, 0, 0, 0, 1, 0]), (len(seeds), 1))
        colours = {}
        for number, name in enumerate(_OPERATIONS):
            chosen = np.flatnonzero(operations == number)
            if name in _MOVES:
                for column, entry in enumerate(_MOVES[name](signed[chosen], image_size)):
                    moves[chosen, column] = entry
            elif len(chosen):
                has_sign, _ = _COLOURS[name]
                given = (signed if has_sign else values)[chosen].astype(np.float32)
                colours[name] = (torch.from_numpy(chosen), torch.from_numpy(given))
        matrices = torch.from_numpy(moves.reshape(-1, 2, 3)).float()
        return cls(matrices, torch.from_numpy(_crops(seeds)).float(), colours)

    def apply(self, images_BHWC: Tensor) -> Tensor:
        """The changed pictures, uint8, of the same shape."""
        x_BCHW = images_BHWC.permute(0, 3, 1, 2)
        moved_BHW2 = affine_grid(self.moves, list(x_BCHW.shape), align_corners=False)
        scale, centre = self.crops[:, None, None].unbind(-2)
        grid = moved_BHW2 * scale + centre
        sampled = grid_sample(x_BCHW.float(), grid, padding_mode="border", align_corners=False)
        is_inside = (moved_BHW2.abs() <= 1).all(-1)[:, None]  # else black, as in torchvision
        x_BCHW = torch.where(is_inside, sampled, 0.0).round_().to(torch.uint8)
        for name, (chosen, values) in self.colours.items():
            _, operation = _COLOURS[name]
            changed = operation(x_BCHW[chosen], values)
            if changed.is_floating_point():
                changed = changed.round_().clamp_(0, 255).to(torch.uint8)
            x_BCHW[chosen] = changed
        return x_BCHW.permute(0, 2, 3, 1).contiguous()


def _uniform(seeds: Keys, use: int) -> Numbers:
    """A number from 0 to below 1 for each seed; each `use` has its own."""
    return np.asarray((mixed(seeds, use) >> np.uint64(11)) * 2.0**-53)


def _crops(seeds: Keys) -> Numbers:
    """Scale and centre of crops that lie within the picture, (B, 2, 2); the flip's scale is < 0."""
    width, height = np.ones(len(seeds)), np.ones(len(seeds))
    for attempt in reversed(range(_MAX_TRIES)):  # the first that fits is used
        area = _MIN_AREA + (1 - _MIN_AREA) * _uniform(seeds, 10 + 2 * attempt)
        ratio = _MAX_RATIO ** (2 * _uniform(seeds, 11 + 2 * attempt) - 1)
        w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
        fits = (w <= 1) & (h <= 1)
        width, height = np.where(fits, w, width), np.where(fits, h, height)
    x, y = ((2 * _uniform(seeds, use) - 1) for use in (3, 4))
    direction = np.where(_uniform(seeds, 5) < 0.5, -1, 1)
    scale = np.stack([width * direction, height], axis=1)
    centre = np.stack([(1 - width) * x, (1 - height) * y], axis=1)
    return np.stack([scale, centre], axis=1)
