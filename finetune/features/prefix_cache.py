"""The cache of the frozen prefix's activations: opened, or filled where that saves time.

Legend: B batch, H height, W width, C channels, D=512 features.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torchvision.models import ResNet

from finetune.config.fields import RunConfig
from finetune.data.batches import batch_bounds, num_at_once
from finetune.data.pictures import Indices
from finetune.features.inputs import SplitInputs, network_input
from finetune.model.network import boundary_shape, forward, part_state, parts_before
from finetune.model.weights import fingerprint
from finetune.system.array_store import Array, Cache, digest
from finetune.system.errors import ConfigError
from finetune.system.progress import StartProgress

_NUM_TIMED_BATCHES = 3


@dataclass
class PrefixCache:
    """The activations that enter one part, `boundary`, for the two splits of a run."""

    config: RunConfig
    cache: Cache
    splits: tuple[SplitInputs, SplitInputs]
    network: ResNet
    boundary: str
    precision: Callable[[], AbstractContextManager[Any]]
    log: Callable[[str], None]
    progress: StartProgress

    def open_or_fill(self, num_epochs: int) -> dict[str, float]:
        """Add the activations to the splits if that saves time over `num_epochs` epochs.

        Returns what was timed: milliseconds per picture to recompute and to read.
        """
        num_missing = sum(
            len(split.pictures)
            for split in self.splits
            for is_flipped in split.variants
            if self.cache.open("activations", self._description(split, is_flipped)) is None
        )
        timings: dict[str, float] = {}
        if num_missing and self.boundary != "fc":  # features at fc are small: always stored
            try:
                compute_ms, read_ms = self._time_one_picture()
            except OSError as error:
                self.log(f"cache: no disk space to time it ({error}); continuing without it")
                return {}
            timings |= {f"{self.boundary}/recompute_ms": compute_ms}
            timings |= {f"{self.boundary}/read_ms": read_ms}
            if not self._saves_time(num_epochs, num_missing, compute_ms, read_ms):
                return timings
        for split in self.splits:
            arrays = [self._open_or_build(split, is_flipped) for is_flipped in split.variants]
            opened = [array for array in arrays if array is not None]
            if len(opened) == len(arrays):
                split.stored[self.boundary] = opened
        return timings

    def _saves_time(
        self, num_epochs: int, num_missing: int, compute_ms: float, read_ms: float
    ) -> bool:
        num_read = num_epochs * sum(len(split.pictures) for split in self.splits)
        recompute_ms = num_read * compute_ms
        store_ms = num_missing * (compute_ms + read_ms) + num_read * read_ms
        is_faster = store_ms < recompute_ms
        self.log(
            f"frozen layers up to {self.boundary}: {compute_ms:.1f} ms per picture to recompute, "
            f"{read_ms:.1f} ms to read; {'stored' if is_faster else 'recomputed'} for {num_epochs} "
            f"epochs ({store_ms / 1e3:.0f} s if stored, {recompute_ms / 1e3:.0f} s if recomputed)"
        )
        return is_faster

    @cached_property
    def _num_at_once(self) -> int:
        return num_at_once(self.config.image_size, self.config.accelerator)

    @cached_property
    def _device(self) -> torch.device:
        device: torch.device = self.network.conv1.weight.device
        return device

    @cached_property
    def _weights(self) -> str:
        return fingerprint(part_state(self.network, parts_before(self.boundary)))

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        return boundary_shape(self.boundary, self.config.image_size)

    def _description(self, split: SplitInputs, is_flipped: bool) -> dict[str, Any]:
        """Everything that the stored bytes depend on."""
        return {
            "boundary": self.boundary,
            "weights": self._weights,
            "files": split.pictures.identity,
            "names": digest(split.pictures.names),
            "image_size": self.config.image_size,
            "flip": int(is_flipped),
            "precision": self.config.precision,
            "device": _processor(self._device),
            "num_threads": torch.get_num_threads() if self._device.type == "cpu" else 0,
            "torch": torch.__version__,
            "dtype": self.config.cache_format,
        }

    def _open_or_build(self, split: SplitInputs, is_flipped: bool) -> Array | None:
        num_pictures = len(split.pictures)
        what = f"{'flipped ' * is_flipped}{split.pictures.folder.name}/ up to {self.boundary}"

        def build(rows: Array) -> dict[str, Any]:
            done = self.progress(f"computing {what}", num_pictures)
            for start, end in batch_bounds(num_pictures, self._num_at_once):
                rows[start:end] = self._compute(split, np.arange(start, end), is_flipped)
                for _ in range(start, end):
                    done()
            return {}

        entry = self.cache.open_or_build(
            "activations",
            self._description(split, is_flipped),
            (num_pictures, *self._shape),
            self.config.cache_format,
            build,
        )
        return entry.array if entry else None

    @torch.inference_mode()
    def _compute(self, split: SplitInputs, indices: Indices, is_flipped: bool) -> Array:
        """The activations that enter the boundary, (B, H, W, C) or (B, D), in `cache_format`.

        Raises `ConfigError` if one is too large for it.
        """
        part, dtype = split.last_stored_part(self.boundary), self.config.cache_format
        inputs, positions = split.batch(part, indices, np.full(len(indices), is_flipped))
        if positions is not None:
            positions = positions.to(self._device)
        x = network_input(inputs.to(self._device), positions, part)
        with self.precision():
            x = forward(self.network, x, part, self.boundary)
        x = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
        with np.errstate(over="ignore"):
            rows: Array = x.float().cpu().numpy().astype(dtype, copy=False)
        if dtype != "float32" and np.isinf(rows).any():
            raise ConfigError(
                f"cache_format: got {dtype}, whose largest number is {np.finfo(dtype).max:.0f}; "
                f"the input of {self.boundary} has larger ones: pass float32"
            )
        return rows

    def _time_one_picture(self) -> tuple[float, float]:
        """Milliseconds to recompute one picture's activations, and to read them from a file."""
        split = self.splits[0]
        size = min(self._num_at_once, len(split.pictures))
        num_timed = size * _NUM_TIMED_BATCHES
        self._compute(split, np.arange(size), False)  # not timed: first calls are slower
        start = time.perf_counter()
        computed = [self._compute(split, np.arange(size), False) for _ in range(_NUM_TIMED_BATCHES)]
        compute_ms = (time.perf_counter() - start) * 1e3 / num_timed
        # A file without a name: nothing is left behind if the process is killed.
        with tempfile.TemporaryFile(dir=self.cache.directory) as file:
            np.concatenate(computed).tofile(file)
            rows = np.memmap(file, computed[0].dtype, "r", shape=(num_timed, *self._shape))
            start = time.perf_counter()
            for first in range(0, num_timed, size):
                rows.take(np.arange(first, first + size), axis=0)
            read_ms = (time.perf_counter() - start) * 1e3 / num_timed
        return compute_ms, read_ms


def _processor(device: torch.device) -> str:
    """What gives equal bits: the GPU's model, or the CPU's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
