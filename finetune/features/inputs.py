"""What a split feeds into the network: decoded pictures, or stored activations of a part.

Legend: B batch, H height, W width, C channels, D=512 features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.images import Images
from finetune.data.pictures import Indices, Pictures
from finetune.model.network import normalise, parts_before
from finetune.system.array_store import Array

Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class StoredActivations:
    """The input of one part for every picture of a split, one row per picture."""

    plain: Array
    flipped: Array | None
    """The same for the flipped pictures, if the split is flipped."""

    def batch(self, indices: Indices, flips: Flags | None) -> Tensor:
        """float32, (B, H, W, C), or (B, D) at fc."""
        if flips is None or self.flipped is None:
            rows = self.plain.take(indices, axis=0)
        else:
            rows = np.empty((len(indices), *self.plain.shape[1:]), self.plain.dtype)
            rows[~flips] = self.plain.take(indices[~flips], axis=0)
            rows[flips] = self.flipped.take(indices[flips], axis=0)
        return torch.from_numpy(rows).float()


class SplitInputs:
    """One split's pictures, and their stored activations by part."""

    def __init__(self, images: Images, is_flipped: bool) -> None:
        self.images = images
        self.is_flipped = is_flipped
        self.stored: dict[str, StoredActivations] = {}

    @property
    def pictures(self) -> Pictures:
        return self.images.pictures

    @property
    def variants(self) -> tuple[bool, ...]:
        """The flips for which activations are stored."""
        return (False, True) if self.is_flipped else (False,)

    def last_stored_part(self, boundary: str) -> str:
        """The last part up to `boundary` whose input is stored; `stem` stands for the pictures."""
        stored = [part for part in (*parts_before(boundary), boundary) if part in self.stored]
        return stored[-1] if stored else "stem"

    def batch(
        self, part: str, indices: Indices, flips: Flags | None
    ) -> tuple[Tensor, Tensor | None]:
        """The input of `part`, and the positions of pictures that `network_input` has to flip."""
        if part != "stem":
            return self.stored[part].batch(indices, flips), None
        positions = None if flips is None else torch.from_numpy(np.flatnonzero(flips))
        return self.images.batch(indices), positions


def network_input(inputs: Tensor, flips: Tensor | None, part: str) -> Tensor:
    """A batch from `SplitInputs` as the network takes it at `part`: float32, channels_last."""
    if part == "stem":
        return normalise(inputs, flips)
    return inputs.permute(0, 3, 1, 2) if inputs.ndim == 4 else inputs
