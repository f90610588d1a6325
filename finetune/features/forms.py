"""A split's pictures in every form in which they are kept: decoded, or as activations.

Turns indices and flips into what enters a part. Knows nothing about how the forms came to be.

    >>> inputs, flips = split.inputs("layer3", indices, None)  # doctest: +SKIP

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


@dataclass(frozen=True)
class StoredActivations:
    """A split's activations that enter one part, for each flip; rows are the split's indices."""

    part: str
    plain: Array
    flipped: Array | None

    def batch(self, indices: Indices, flips: np.ndarray[Any, Any] | None) -> Tensor:
        """float32, (B, H, W, C), or (B, D) at fc."""
        if flips is None or self.flipped is None:
            rows = self.plain.take(indices, axis=0)
        else:
            rows = np.empty((len(indices), *self.plain.shape[1:]), self.plain.dtype)
            rows[~flips] = self.plain.take(indices[~flips], axis=0)
            rows[flips] = self.flipped.take(indices[flips], axis=0)
        return torch.from_numpy(rows).float()


class Split:
    """A split's pictures in every form in which they are kept."""

    def __init__(self, images: Images, flipping: bool) -> None:
        self.images = images
        self.flipping = flipping
        self.kept: dict[str, StoredActivations] = {}

    @property
    def pictures(self) -> Pictures:
        return self.images.pictures

    @property
    def num_variants(self) -> int:
        return 2 if self.flipping else 1

    def nearest_part(self, boundary: str) -> str:
        """The last part up to `boundary` whose input is kept; `stem` stands for the pictures."""
        reachable = [part for part in (*parts_before(boundary), boundary) if part in self.kept]
        return reachable[-1] if reachable else "stem"

    def inputs(
        self, part: str, indices: Indices, flips: np.ndarray[Any, Any] | None
    ) -> tuple[Tensor, Tensor | None]:
        """What enters `part`, and the positions of pictures that are still to be flipped."""
        if part != "stem":
            return self.kept[part].batch(indices, flips), None
        positions = None if flips is None else torch.from_numpy(np.flatnonzero(flips))
        return self.images.batch(indices), positions


def enter(inputs: Tensor, flips: Tensor | None, part: str) -> Tensor:
    """A batch's inputs as the network takes them at this part: float32, channels_last."""
    if part == "stem":
        return normalise(inputs, flips)
    return inputs.permute(0, 3, 1, 2) if inputs.ndim == 4 else inputs
