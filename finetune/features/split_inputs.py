"""What a split feeds into the network: pictures, or stored activations of the frozen layers.

Legend: B batch, H height, W width, C channels, D features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.config.backbones import Backbone
from finetune.data.images import Images
from finetune.data.pictures import Indices
from finetune.model.network import normalise
from finetune.system.array_store import Array

Flags = np.ndarray[Any, np.dtype[np.bool_]]


class SplitInputs:
    """What a split feeds into the network: its pictures, or stored activations by part.

    Activations are stored for the source, all pictures of the folder, whatever its division.
    """

    def __init__(
        self,
        images: Images,
        parts: Sequence[str],
        is_flipped: bool,
        source: "SplitInputs | None" = None,
    ) -> None:
        """`source`: the inputs of `images.source`; None if these are they."""
        self.images = images
        self.source = source or self
        self.rows = np.searchsorted(images.source.rows, images.pictures.rows)
        """The index of each picture in the source."""
        self.parts = tuple(parts)
        """Of the network, from input to output; the first takes pictures."""
        self.pictures = images.pictures
        self.variants = (False, True) if is_flipped else (False,)
        """The flips that it has."""
        self.stored: dict[str, list[Array]] = {} if source is None else source.stored
        """The input of a part: per variant of the source an array, with one row per picture."""
        self.dtypes: dict[str, torch.dtype] = {} if source is None else source.dtypes
        """In which the stored input of a part was computed."""
        self.resident: dict[str, Tensor] = {}
        """The input of a part on the device, the rows of all variants one after the other."""

    def last_stored_part(self, boundary: str) -> str:
        """The last part up to `boundary` whose input is stored; pictures are the first part's."""
        up_to_boundary = self.parts[1 : self.parts.index(boundary) + 1]
        stored = [part for part in up_to_boundary if part in self.stored]
        return stored[-1] if stored else self.parts[0]

    def batch(self, part: str, indices: Indices, flips: Flags) -> tuple[Tensor, Tensor | None]:
        """The input of `part`, and which pictures `network_input` has to flip.

        uint8 pictures, (B, H, W, 3), at the first part, else activations as they were computed,
        (B, H, W, C) or of another shape, such as (B, D).
        """
        takes_pictures = part == self.parts[0]
        still_to_flip = torch.from_numpy(flips) if takes_pictures and flips.any() else None
        if (resident := self.resident.get(part)) is not None:
            rows = torch.from_numpy(indices + (0 if takes_pictures else len(self.pictures) * flips))
            rows = rows.to(resident.device, non_blocking=True)
            return resident.index_select(0, rows), still_to_flip
        if takes_pictures:
            return self.images.batch(indices), still_to_flip
        arrays, variants = self.stored[part], self.source.variants
        stored = as_tensor(gathered(arrays, variants, self.rows[indices], flips))
        return stored.to(self.dtypes[part]), None


def gathered(
    arrays: Sequence[Array], variants: Sequence[bool], indices: Indices, flips: Flags
) -> Array:
    """A row for each index, from the array of its variant."""
    rows: Array = np.empty((len(indices), *arrays[0].shape[1:]), arrays[0].dtype)
    for is_flipped, array in zip(variants, arrays, strict=True):
        rows[flips == is_flipped] = array.take(indices[flips == is_flipped], axis=0)
    return rows


def as_array(x: Tensor) -> Array:
    """A tensor on the host; numpy has no bfloat16, whose bits become int16."""
    array: Array = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).cpu().numpy()
    return array


def as_tensor(array: Array) -> Tensor:
    """The inverse of `as_array`."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def network_input(inputs: Tensor, flips: Tensor | None, backbone: Backbone) -> Tensor:
    """A batch from `SplitInputs` as the network's parts take it: channels_last."""
    if inputs.dtype == torch.uint8:
        return normalise(inputs, flips, backbone.mean, backbone.std)
    return inputs.permute(0, 3, 1, 2) if inputs.ndim == 4 else inputs
