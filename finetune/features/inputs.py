"""What a split feeds into the network: decoded pictures, or stored activations of a part.

Legend: B batch, H height, W width, C channels, D=512 features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.images import Images
from finetune.data.pictures import Indices, Pictures
from finetune.model.network import normalise, parts_before
from finetune.system.array_store import Array

Flags = np.ndarray[Any, np.dtype[np.bool_]]


class SplitInputs:
    """One split's pictures, and their stored activations by part."""

    def __init__(self, images: Images, is_flipped: bool) -> None:
        self.images = images
        self.variants = (False, True) if is_flipped else (False,)
        """The flips for which activations are stored."""
        self.stored: dict[str, list[Array]] = {}
        """The input of a part, an array per variant with one row per picture."""

    @property
    def pictures(self) -> Pictures:
        return self.images.pictures

    def last_stored_part(self, boundary: str) -> str:
        """The last part up to `boundary` whose input is stored; `stem` stands for the pictures."""
        stored = [part for part in (*parts_before(boundary), boundary) if part in self.stored]
        return stored[-1] if stored else "stem"

    def batch(self, part: str, indices: Indices, flips: Flags) -> tuple[Tensor, Tensor | None]:
        """The input of `part`, and the positions of pictures that `network_input` has to flip.

        uint8 pictures, (B, H, W, 3), at `stem`, else float32 activations, (B, H, W, C), or (B, D)
        at `fc`.
        """
        if part == "stem":
            positions = torch.from_numpy(np.flatnonzero(flips)) if flips.any() else None
            return self.images.batch(indices), positions
        arrays = self.stored[part]
        rows = np.empty((len(indices), *arrays[0].shape[1:]), arrays[0].dtype)
        for is_flipped, array in zip(self.variants, arrays, strict=True):
            rows[flips == is_flipped] = array.take(indices[flips == is_flipped], axis=0)
        return torch.from_numpy(rows).float(), None


def network_input(inputs: Tensor, flips: Tensor | None, part: str) -> Tensor:
    """A batch from `SplitInputs` as the network takes it at `part`: float32, channels_last."""
    if part == "stem":
        return normalise(inputs, flips)
    return inputs.permute(0, 3, 1, 2) if inputs.ndim == 4 else inputs
