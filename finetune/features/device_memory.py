"""What of a run's pictures and activations lives in the memory of its GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from finetune.data.batches import batch_bounds
from finetune.features.split_inputs import SplitInputs
from finetune.system.resources import is_out_of_memory

_ROWS_AT_ONCE = 256


@dataclass(eq=False)
class DeviceMemory:
    """The part of a device's memory that the splits' inputs may fill."""

    device: torch.device
    limit_bytes: float
    log: Callable[[str], None]
    _refused: set[tuple[int, str]] = field(default_factory=set)

    def place(self, splits: Sequence[SplitInputs], split: SplitInputs, part: str) -> None:
        """Copy the input of `part` to the device, in place of this split's other one, if it fits.

        Batches of it are gathered there from now on. What doesn't fit is said once.
        """
        key = (id(split), part)
        takes_pictures = part == split.parts[0]
        is_decoded_each_time = takes_pictures and split.images.stored is None
        if not self.limit_bytes or part in split.resident or key in self._refused:
            return
        split.resident.clear()
        if is_decoded_each_time:
            return
        first, _ = split.batch(part, np.arange(1), np.zeros(1, dtype=bool))
        variants = (False,) if takes_pictures else split.variants
        num_bytes = len(split.pictures) * len(variants) * first.nbytes
        used = sum(data.nbytes for other in splits for data in other.resident.values())
        try:
            if used + num_bytes <= self.limit_bytes:
                split.resident[part] = self._copied(split, part, first, variants)
                return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
        self._refused.add(key)
        self.log(
            f"GPU memory: the inputs of {part} for {split.pictures.name}/ need "
            f"{num_bytes / 1e9:.2f} GB of the {self.limit_bytes / 1e9:.2f} GB for them "
            "(--gpu_cache_fraction); they are copied in each epoch"
        )

    def _copied(
        self, split: SplitInputs, part: str, first: Tensor, variants: Sequence[bool]
    ) -> Tensor:
        num_rows = len(split.pictures)
        shape = (len(variants) * num_rows, *first.shape[1:])
        data = torch.empty(shape, dtype=first.dtype, device=self.device)
        for number, is_flipped in enumerate(variants):
            for start, end in batch_bounds(num_rows, _ROWS_AT_ONCE):
                indices = np.arange(start, end)
                rows, _ = split.batch(part, indices, np.full(len(indices), is_flipped))
                data[number * num_rows + start : number * num_rows + end] = rows
        return data
