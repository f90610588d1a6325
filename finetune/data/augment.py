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
from torch.nn.functional import avg_pool2d, grid_sample
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


def _blurred(x_BCHW: Tensor) -> Tensor:
    """A mean of 3 x 3 pixels, the middle one 5 times, as Pillow's SMOOTH; edges stay."""
    blurred = x_BCHW.float()
    middle = blurred[..., 1:-1, 1:-1].clone()
    blurred[..., 1:-1, 1:-1] = (9 * avg_pool2d(x_BCHW.float(), 3, 1) + 4 * middle) / 13
    return blurred


def _posterize(x_BCHW: Tensor, values: Tensor) -> Tensor:
    steps = (2.0 ** (values * 6 / 0.99).round()).view(-1, 1, 1, 1)  # 8 bits are kept, down to 2
    return (x_BCHW.float() / steps).floor() * steps


def _solarize(x_BCHW: Tensor, values: Tensor) -> Tensor:
    thresholds = (255 * (1 - values / 0.99)).ceil().to(torch.uint8).view(-1, 1, 1, 1)
    return torch.where(x_BCHW >= thresholds, 255 - x_BCHW, x_BCHW)


_COLOURS: Mapping[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {
    "brightness": (True, _blend(torch.zeros_like)),
    "saturation": (True, _blend(lambda x: v2.adjust_saturation(x, 0.0))),
    "contrast": (True, _blend(lambda x: v2.adjust_contrast(x, 0.0))),
    "sharpness": (True, _blend(_blurred)),
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

    crops: list[tuple[int, int, int, int]]
    """Top, left, height and width of each picture's crop, in pixels."""
    is_flipped: list[bool]
    moves: tuple[Tensor, Tensor]
    """The positions of the pictures that are moved, and their matrices, float32, (M, 2, 3)."""
    colours: dict[str, tuple[Tensor, Tensor]]
    """For each operation on colours the positions of its pictures, and their values."""

    @classmethod
    def drawn(cls, seeds: Keys, image_size: int) -> Self:
        """`seeds`: of the pictures, uint64, (B,)."""
        operations = (_uniform(seeds, 0) * len(_OPERATIONS)).astype(int)
        values = np.floor(_uniform(seeds, 1) * _NUM_BINS) / (_NUM_BINS - 1) * 0.99
        signed = values * np.where(_uniform(seeds, 2) < 0.5, -1, 1)
        moves = np.zeros((len(seeds), 6))
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
        moved = np.flatnonzero((operations > 0) & (operations < len(_MOVES)))
        matrices = torch.from_numpy(moves[moved].reshape(-1, 2, 3)).float()
        crops, is_flipped = _crops(seeds, image_size), (_uniform(seeds, 5) < 0.5).tolist()
        return cls(crops, is_flipped, (torch.from_numpy(moved), matrices), colours)

    def apply(self, images_BHWC: Tensor) -> Tensor:
        """The changed pictures, uint8, of the same shape."""
        x_BCHW = self._cropped(images_BHWC.permute(0, 3, 1, 2))
        operations = {name: _COLOURS[name][1] for name in self.colours} | {"": _move}
        for name, (chosen, values) in [*self.colours.items(), ("", self.moves)]:
            if len(chosen):
                changed = operations[name](x_BCHW[chosen], values)
                if changed.is_floating_point():
                    changed = changed.round_().clamp_(0, 255).to(torch.uint8)
                x_BCHW[chosen] = changed
        return x_BCHW.permute(0, 2, 3, 1).contiguous()

    def _cropped(self, x_BCHW: Tensor) -> Tensor:
        """The crops, resized to whole pictures, some of them flipped."""
        size, cropped_BCHW = list(x_BCHW.shape[2:]), torch.empty_like(x_BCHW)
        for i, (y, x, h, w) in enumerate(self.crops):
            resized = v2.resize(x_BCHW[i, :, y : y + h, x : x + w], size, antialias=True)
            cropped_BCHW[i] = resized.flip(2) if self.is_flipped[i] else resized
        return cropped_BCHW


def _move(x_BCHW: Tensor, matrices: Tensor) -> Tensor:
    """Pictures moved by these matrices; black where nothing was, as in torchvision."""
    height, width = x_BCHW.shape[2:]
    y_H1 = ((2 * torch.arange(height, device=x_BCHW.device) + 1) / height - 1)[:, None]
    x_W = (2 * torch.arange(width, device=x_BCHW.device) + 1) / width - 1
    a, b, c, d, e, f = matrices.view(-1, 6, 1, 1).unbind(1)
    grid = torch.stack([a * x_W + (b * y_H1 + c), d * x_W + (e * y_H1 + f)], dim=-1)
    return grid_sample(x_BCHW.float(), grid, align_corners=False)


def _uniform(seeds: Keys, use: int) -> Numbers:
    """A number from 0 to below 1 for each seed; each `use` has its own."""
    return np.asarray((mixed(seeds, use) >> np.uint64(11)) * 2.0**-53)


def _crops(seeds: Keys, size: int) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of crops that lie within the picture."""
    width, height = np.full(len(seeds), size), np.full(len(seeds), size)
    for attempt in reversed(range(_MAX_TRIES)):  # the first that fits is used
        area = _MIN_AREA + (1 - _MIN_AREA) * _uniform(seeds, 10 + 2 * attempt)
        ratio = _MAX_RATIO ** (2 * _uniform(seeds, 11 + 2 * attempt) - 1)
        w, h = (
            np.rint(size * np.sqrt(share)).astype(int) for share in (area * ratio, area / ratio)
        )
        fits = (w <= size) & (h <= size)
        width, height = np.where(fits, w, width), np.where(fits, h, height)
    left = (_uniform(seeds, 3) * (size - width + 1)).astype(int)
    top = (_uniform(seeds, 4) * (size - height + 1)).astype(int)
    columns = (top, left, height, width)
    return list(zip(*(column.tolist() for column in columns), strict=True))
