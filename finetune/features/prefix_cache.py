"""The frozen prefix's activations: read from the cache, or stored there where that saves time.

Legend: B batch, H height, W width, C channels, D features.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.config.backbones import Backbone
from finetune.config.fields import RunConfig
from finetune.data.batches import batch_bounds, num_at_once
from finetune.data.images import Images
from finetune.data.pictures import Indices
from finetune.model.chain import Chain
from finetune.model.network import boundary_shape, normalise
from finetune.model.weights import fingerprint
from finetune.system.array_store import Array, Cache, StoredArray, digest
from finetune.system.errors import ConfigError
from finetune.system.progress import bar

_LOG = logging.getLogger(__name__)

Flags = np.ndarray[Any, np.dtype[np.bool_]]


class SplitInputs:
    """What a split feeds into the network: its pictures, or stored activations by part."""

    def __init__(self, images: Images, parts: Sequence[str], is_flipped: bool) -> None:
        self.images = images
        self.parts = tuple(parts)
        """Of the network, from input to output; the first takes pictures."""
        self.pictures = images.pictures
        self.variants = (False, True) if is_flipped else (False,)
        """The flips for which activations are stored."""
        self.stored: dict[str, list[Array]] = {}
        """The input of a part: per variant an array, with one row per picture."""

    def last_stored_part(self, boundary: str) -> str:
        """The last part up to `boundary` whose input is stored; pictures are the first part's."""
        up_to_boundary = self.parts[1 : self.parts.index(boundary) + 1]
        stored = [part for part in up_to_boundary if part in self.stored]
        return stored[-1] if stored else self.parts[0]

    def batch(self, part: str, indices: Indices, flips: Flags) -> tuple[Tensor, Tensor | None]:
        """The input of `part`, and the positions of pictures that `network_input` has to flip.

        uint8 pictures, (B, H, W, 3), at the first part, else float32 activations, (B, H, W, C) or
        of another shape, such as (B, D).
        """
        if part == self.parts[0]:
            positions = torch.from_numpy(np.flatnonzero(flips)) if flips.any() else None
            return self.images.batch(indices), positions
        arrays = self.stored[part]
        rows = np.empty((len(indices), *arrays[0].shape[1:]), arrays[0].dtype)
        for is_flipped, array in zip(self.variants, arrays, strict=True):
            rows[flips == is_flipped] = array.take(indices[flips == is_flipped], axis=0)
        return torch.from_numpy(rows).float(), None


def network_input(inputs: Tensor, flips: Tensor | None, backbone: Backbone) -> Tensor:
    """A batch from `SplitInputs` as the network's parts take it: float32, channels_last."""
    if inputs.dtype == torch.uint8:
        return normalise(inputs, flips, backbone.mean, backbone.std)
    return inputs.permute(0, 3, 1, 2) if inputs.ndim == 4 else inputs


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

    def open_or_fill(self, num_epochs: int) -> None:
        """Add the activations to the splits if that saves time over `num_epochs` epochs."""
        num_missing = sum(
            len(split.pictures)
            for split in self.splits
            for is_flipped in split.variants
            if self.cache.open("activations", self._description(split, is_flipped)) is None
        )
        is_small = self.boundary == self.chain.parts[-1]  # then storing always saves time
        if num_missing and not is_small and not self._saves_time(num_epochs, num_missing):
            return
        shape = boundary_shape(self.config.model, self.boundary, self.config.image_size)
        for split in self.splits:
            entries = [self._open_or_build(split, flip, shape) for flip in split.variants]
            arrays = [entry.array for entry in entries if entry]
            if len(arrays) == len(entries):
                split.stored[self.boundary] = arrays

    def _saves_time(self, num_epochs: int, num_missing: int) -> bool:
        try:
            compute_ms, read_ms = self._time_one_picture()
        except OSError as error:
            self.log(f"cache: no disk space to time it ({error}); continuing without it")
            return False
        self.timings[f"{self.boundary}/recompute_ms"] = compute_ms
        self.timings[f"{self.boundary}/read_ms"] = read_ms
        num_read = num_epochs * sum(len(split.pictures) for split in self.splits)
        recompute_ms = num_read * compute_ms
        store_ms = num_missing * (compute_ms + read_ms) + num_read * read_ms
        what = "stored" if store_ms < recompute_ms else "recomputed"
        _LOG.info(
            f"frozen layers up to {self.boundary}: {compute_ms:.1f} ms per picture to recompute, "
            f"{read_ms:.1f} ms to read; {what} for {num_epochs} epochs "
            f"({store_ms / 1e3:.0f} s if stored, {recompute_ms / 1e3:.0f} s if recomputed)"
        )
        return store_ms < recompute_ms

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

    def _description(self, split: SplitInputs, is_flipped: bool) -> dict[str, Any]:
        """Everything that the stored bytes depend on."""
        return self._description_of_network | {
            "files": split.pictures.identity,
            "names": digest(split.pictures.names),
            "image_size": self.config.image_size,
            "flip": int(is_flipped),
            "precision": self.config.precision,
            "dtype": self.config.cache_format,
        }

    def _open_or_build(
        self, split: SplitInputs, is_flipped: bool, shape: tuple[int, ...]
    ) -> StoredArray | None:
        num_pictures, description = len(split.pictures), self._description(split, is_flipped)
        what = f"{'flipped ' * is_flipped}{split.pictures.name}/ up to {self.boundary}"

        def build(rows: Array) -> dict[str, Any]:
            done = bar(f"computing {what}", num_pictures)
            for start, end in batch_bounds(num_pictures, self._num_at_once):
                rows[start:end] = self._compute(split, np.arange(start, end), is_flipped)
                for _ in range(start, end):
                    done()
            return {}

        shape, dtype = (num_pictures, *shape), self.config.cache_format
        return self.cache.open_or_build("activations", description, shape, dtype, build)

    @torch.inference_mode()
    def _compute(self, split: SplitInputs, indices: Indices, is_flipped: bool) -> Array:
        """The activations that enter the boundary, (B, H, W, C) or (B, D), in `cache_format`.

        Raises `ConfigError` if one is too large for it.
        """
        part, dtype = split.last_stored_part(self.boundary), self.config.cache_format
        inputs, positions = split.batch(part, indices, np.full(len(indices), is_flipped))
        positions = None if positions is None else positions.to(self._device)
        x = network_input(inputs.to(self._device), positions, self.chain.backbone)
        with self.precision():
            x = self.chain.forward(x, part, self.boundary)
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
        indices = np.arange(min(self._num_at_once, len(self.splits[0].pictures)))
        self._compute(self.splits[0], indices, False)  # not timed: first calls are slower
        start = time.perf_counter()
        batches = [self._compute(self.splits[0], indices, False) for _ in range(3)]
        compute_seconds = time.perf_counter() - start
        computed = np.concatenate(batches)
        # A file without a name: nothing is left behind if the process is killed.
        with tempfile.TemporaryFile(dir=self.cache.directory) as file:
            computed.tofile(file)
            rows = np.memmap(file, computed.dtype, "r", shape=computed.shape)
            start = time.perf_counter()
            rows.take(np.arange(len(rows)), axis=0)
            read_seconds = time.perf_counter() - start
        return compute_seconds * 1e3 / len(rows), read_seconds * 1e3 / len(rows)


def _version_of(build: str) -> str:
    """The version of the package that holds a network's code, if it has one."""
    with suppress(PackageNotFoundError):
        return version(build.partition(":")[0].partition(".")[0])
    return ""
