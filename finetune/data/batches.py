"""The batches of one epoch.

Legend: B batch, H height, W width.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.data.pictures import Indices, Pictures


def batch_bounds(num_pictures: int, batch_size: int) -> list[tuple[int, int]]:
    """Start and end of each batch; a last batch of one picture is merged with the previous one.

    >>> batch_bounds(65, 32)
    [(0, 32), (32, 65)]
    """
    starts = list(range(0, num_pictures, batch_size))
    if len(starts) > 1 and num_pictures - starts[-1] == 1:
        starts.pop()
    return list(pairwise([*starts, num_pictures]))


def num_at_once(image_size: int, accelerator: str) -> int:
    """Batch size of inference: on a CPU the activations of a batch should fit into its caches, on
    CUDA a batch should be much work for each kernel.

    The outputs don't depend on it, except for rounding on a GPU.

    >>> num_at_once(256, "cpu"), num_at_once(64, "cpu"), num_at_once(256, "cuda")
    (8, 128, 128)
    """
    num_pixels = {"cpu": 2**19, "cuda": 2**23}.get(accelerator, 2**21)
    return max(2, num_pixels // image_size**2)


class Batch(NamedTuple):
    """The input of one training or validation step."""

    inputs: Tensor
    """uint8 pictures, (B, H, W, 3), if `part` is the network's first part; else activations."""
    flips: Tensor | None
    """Which pictures are still to be flipped, bool, (B,)."""
    labels: Tensor
    """int64, (B,)."""
    part: str
    """The part of the network that takes `inputs`."""
    augmentation: Any = None
    """What `Augmentation.transform` has drawn; its `apply` changes the pictures."""


Inputs = tuple[Tensor, Tensor | None, Any]
"""The `inputs`, `flips` and `augmentation` of a batch."""


@dataclass(frozen=True)
class EpochBatches:
    """The batches of one epoch in this order; `fetch` returns the inputs of each."""

    pictures: Pictures
    order: Indices
    batch_size: int
    part: str
    fetch: Callable[[Indices], Inputs]

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        return batch_bounds(len(self.order), self.batch_size)

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: int) -> Batch:
        start, end = self._bounds[index]
        indices = self.order[start:end]
        inputs, flips, augmentation = self.fetch(indices)
        labels = torch.from_numpy(self.pictures.labels[indices])
        return Batch(inputs, flips, labels, self.part, augmentation)

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class PrefetchedBatches:
    """The batches of one epoch, each prepared in a thread while the one before is used.

    In pinned memory, which a GPU reads on its own while the host goes on.
    """

    batches: EpochBatches
    is_pinned: bool

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as thread:
            following = [thread.submit(self._prepare, 0)]
            for i in range(len(self)):
                batch = following.pop().result()
                if i + 1 < len(self):
                    following.append(thread.submit(self._prepare, i + 1))
                yield batch

    def _prepare(self, index: int) -> Batch:
        batch = self.batches[index]
        if not self.is_pinned:
            return batch
        return batch._replace(inputs=batch.inputs.pin_memory(), labels=batch.labels.pin_memory())
