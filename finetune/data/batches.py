"""One epoch's batches, made as they are asked for.

Turns an order of pictures into what each step sees. Knows nothing about where the inputs come from.

    >>> batch_bounds(65, 32)
    [(0, 32), (32, 65)]

Legend: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.data.pictures import Indices, Pictures


def batch_bounds(num_pictures: int, batch_size: int) -> list[tuple[int, int]]:
    """Start and end of each batch; a last batch of a single picture joins the one before."""
    starts = list(range(0, num_pictures, batch_size))
    if len(starts) > 1 and num_pictures - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_pictures], strict=True))


def num_at_once(image_size: int, accelerator: str) -> int:
    """Pictures that go through the network at once where nothing learns from them.

    On a CPU their activations should fit its caches: of 256 pixels, 8 are an eighth faster than 32,
    of 64 pixels, 128 are a tenth faster. The numbers that come out are the same to the bit.

    >>> num_at_once(256, "cpu"), num_at_once(64, "cpu"), num_at_once(256, "cuda")
    (8, 128, 32)
    """
    num_pixels = 2**19 if accelerator == "cpu" else 2**21
    return max(2, num_pixels // image_size**2)


class Batch(NamedTuple):
    """What one step sees."""

    inputs: Tensor
    """uint8 pictures, (B, H, W, 3), where `part` is the network's first; else activations."""
    flips: Tensor | None
    """Positions in the batch of the pictures still to be flipped, int64."""
    labels: Tensor
    """int64, (B,)."""
    part: str
    """The part of the network that `inputs` enter."""


class EpochBatches:
    """The batches of one epoch, made as they are asked for. `fetch` makes the inputs."""

    def __init__(
        self,
        pictures: Pictures,
        order: Indices,
        batch_size: int,
        part: str,
        fetch: Callable[[Indices], tuple[Tensor, Tensor | None]],
    ) -> None:
        self._pictures = pictures
        self._order = order
        self._bounds = batch_bounds(len(order), batch_size)
        self._part = part
        self._fetch = fetch

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: int) -> Batch:
        start, end = self._bounds[index]
        indices = self._order[start:end]
        inputs, flips = self._fetch(indices)
        return Batch(inputs, flips, torch.from_numpy(self._pictures.labels[indices]), self._part)

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))
