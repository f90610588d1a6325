"""The frozen prefix's activations: read from the cache, or stored there where that saves time.

Legend: B batch, H height, W width, C channels, D features.
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.config.fields import RunConfig
from finetune.data.batches import batch_bounds, num_at_once
from finetune.data.pictures import Indices
from finetune.features.split_inputs import (
    SplitInputs,
    as_array,
    as_tensor,
    gathered,
    network_input,
)
from finetune.model.chain import Chain
from finetune.model.network import boundary_shape
from finetune.model.weights import fingerprint
from finetune.system.array_store import Array, Cache, StoredArray, digest
from finetune.system.cuda import synchronise
from finetune.system.errors import ConfigError
from finetune.system.progress import bar
from finetune.system.resources import free_memory

_LOG = logging.getLogger(__name__)

_NUM_TIMED = 3


@dataclass
class PrefixCache:
    """The activations that enter one part, `boundary`, for the two splits of a run."""

    boundary: str
    config: RunConfig
    cache: Cache
    splits: tuple[SplitInputs, SplitInputs]
    chain: Chain
    precision: Callable[[], AbstractContextManager[Any]]
    log: Callable[[str], None]
    timings: dict[str, float]
    """Milliseconds per picture to recompute and to read, for each boundary that was timed."""

    device_bytes: float = 0.0
    """How much of them is read once and then stays on the device."""

    def open_or_fill(self, num_epochs: int) -> None:
        """Add the activations to the splits if that saves time over `num_epochs` epochs."""
        missing = [
            source
            for source in self._sources
            for is_flipped in source.variants
            if self.cache.open("activations", self._description(source, is_flipped)) is None
        ]
        num_missing = sum(len(source.pictures) for source in missing)
        is_small = self.boundary == self.chain.parts[-1]  # then storing always saves time
        if num_missing and not is_small and not self._saves_time(num_epochs, num_missing):
            return
        for source in self._sources:
            entries = [self._open_or_build(source, flip) for flip in source.variants]
            arrays = [entry.array for entry in entries if entry]
            if len(arrays) == len(entries):
                source.dtypes[self.boundary] = self._dtype
                source.stored[self.boundary] = arrays

    @property
    def _sources(self) -> list[SplitInputs]:
        """One, if both splits are of the same folder."""
        train, val = (split.source for split in self.splits)
        return [train] if val is train else [train, val]

    def _saves_time(self, num_epochs: int, num_missing: int) -> bool:
        num_rows = sum(len(source.pictures) * len(source.variants) for source in self._sources)
        row_bytes = math.prod(self._shape) * self._format.itemsize
        try:
            compute_ms, read_ms = self._time_one_picture(num_rows * row_bytes > free_memory())
        except OSError as error:
            self.log(f"cache: no disk space to time it ({error}); continuing without it")
            return False
        self.timings[f"{self.boundary}/recompute_ms"] = compute_ms
        self.timings[f"{self.boundary}/read_ms"] = read_ms
        num_used = num_epochs * sum(len(split.pictures) for split in self.splits)
        num_read = num_rows if num_rows * row_bytes <= self.device_bytes else num_used
        recompute_ms = num_used * compute_ms
        store_ms = num_missing * (compute_ms + read_ms) + num_read * read_ms
        what = "stored" if store_ms < recompute_ms else "recomputed"
        _LOG.info(
            f"frozen layers up to {self.boundary}: {compute_ms:.1f} ms per picture to recompute, "
            f"{read_ms:.1f} ms to read; {what} for {num_epochs} epochs "
            f"({store_ms / 1e3:.0f} s if stored, {recompute_ms / 1e3:.0f} s if recomputed)"
        )
        return store_ms < recompute_ms

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        return boundary_shape(self.config.model, self.boundary, self.config.image_size)

    @cached_property
    def _dtype(self) -> torch.dtype:
        """In which the activations are computed: with mixed precision, that of autocast."""
        if self.config.precision == "32-true":
            return torch.float32
        return self._activations(self.splits[0], np.arange(1), False).dtype

    @property
    def _format(self) -> np.dtype[Any]:
        """In which they are stored: as they are computed, unless less was asked for."""
        if self.config.cache_format == "float16":
            return np.dtype("float16")
        return as_array(torch.empty(0, dtype=self._dtype)).dtype

    @property
    def _num_at_once(self) -> int:
        return num_at_once(self.config.image_size, self.config.accelerator)

    @property
    def _device(self) -> torch.device:
        return next(self.chain.network.parameters()).device

    @cached_property
    def _description_of_network(self) -> dict[str, Any]:
        device = self._device
        processor = device.type  # what gives equal bits: the GPU's model, or the CPU's instructions
        if device.type == "cuda":
            processor = torch.cuda.get_device_name(device)
        elif device.type == "cpu":
            processor = f"cpu {torch.backends.cpu.get_cpu_capability()}"
        return {
            "model": self.config.model,
            "boundary": self.boundary,
            "weights": fingerprint(self.chain.state(self.chain.parts_before(self.boundary))),
            "device": processor,
            "num_threads": torch.get_num_threads() if device.type == "cpu" else 0,
            "torch": torch.__version__,
            "code": _version_of(self.chain.backbone.build),
        }

    def _description(self, source: SplitInputs, is_flipped: bool) -> dict[str, Any]:
        """Everything that the stored bytes depend on."""
        exact = self.config.cache_format == "float32"
        return self._description_of_network | {
            "files": source.pictures.identity,
            "names": digest(source.pictures.names),
            "image_size": self.config.image_size,
            "flip": int(is_flipped),
            "precision": self.config.precision,
            "dtype": str(self._dtype).removeprefix("torch.") if exact else self.config.cache_format,
        }

    def _open_or_build(self, source: SplitInputs, is_flipped: bool) -> StoredArray | None:
        num_pictures, description = len(source.pictures), self._description(source, is_flipped)
        what = f"{'flipped ' * is_flipped}{source.pictures.name}/ up to {self.boundary}"

        def build(rows: Array) -> dict[str, Any]:
            done = bar(f"computing {what}", num_pictures)
            for start, end in batch_bounds(num_pictures, self._num_at_once):
                computed = self._activations(source, np.arange(start, end), is_flipped)
                rows[start:end] = self._rows(computed)
                for _ in range(start, end):
                    done()
            return {}

        shape = (num_pictures, *self._shape)
        return self.cache.open_or_build("activations", description, shape, str(self._format), build)

    @torch.inference_mode()
    def _activations(self, split: SplitInputs, indices: Indices, is_flipped: bool) -> Tensor:
        """What enters the boundary, (B, H, W, C) or (B, D), as training computes it."""
        part = split.last_stored_part(self.boundary)
        inputs, flips = split.batch(part, indices, np.full(len(indices), is_flipped))
        flips = None if flips is None else flips.to(self._device)
        x = network_input(inputs.to(self._device), flips, self.chain.backbone)
        with self.precision():
            x = self.chain.forward(x, part, self.boundary)
        return x.permute(0, 2, 3, 1) if x.ndim == 4 else x

    def _rows(self, x: Tensor) -> Array:
        """Activations as they are stored. Raises `ConfigError` if one is too large for it."""
        if self.config.cache_format == "float32" or x.dtype == torch.float16:
            return as_array(x)
        rows = as_array(x.to(torch.float16))
        if np.isinf(rows).any():
            raise ConfigError(
                f"cache_format: got float16, whose largest number is {np.finfo(rows.dtype).max:.0f}"
                f"; the input of {self.boundary} has larger ones: pass float32"
            )
        return rows

    def _time_one_picture(self, is_cold: bool) -> tuple[float, float]:
        """Milliseconds per picture of training to recompute its activations, and to read them.

        Both end on the device. `is_cold`: read from the disk, not from the system's page cache.
        """
        split = self.splits[0]
        indices = np.arange(min(self._num_at_once, len(split.pictures)))
        computed = self._rows(self._activations(split, indices, False))  # first calls are slower
        compute_ms = self._milliseconds(
            lambda number: self._activations(split, indices, number % len(split.variants) == 1),
            len(indices),
        )
        # A file without a name: nothing is left behind if the process is killed.
        with tempfile.TemporaryFile(dir=self.cache.directory) as file:
            np.concatenate([computed] * _NUM_TIMED).tofile(file)
            if is_cold and hasattr(os, "posix_fadvise"):
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            shape = (_NUM_TIMED * len(indices), *computed.shape[1:])
            arrays = [np.memmap(file, computed.dtype, "r", shape=shape)] * len(split.variants)
            flips = indices % len(arrays) == 1

            def read(number: int) -> Tensor:
                rows = gathered(arrays, split.variants, indices + number * len(indices), flips)
                return as_tensor(rows).to(self._dtype).to(self._device)

            return compute_ms, self._milliseconds(read, len(indices))

    def _milliseconds(self, call: Callable[[int], Tensor], num_pictures: int) -> float:
        """Per picture, of some calls until the device has finished."""
        synchronise(self._device)
        started = time.perf_counter()
        for number in range(_NUM_TIMED):
            call(number)
        synchronise(self._device)
        return (time.perf_counter() - started) * 1e3 / (_NUM_TIMED * num_pictures)


def _version_of(build: str) -> str:
    """The version of the package that holds a network's code, if it has one."""
    with suppress(PackageNotFoundError):
        return version(build.partition(":")[0].partition(".")[0])
    return ""
