"""The stores of one boundary: opened, weighed against computing anew, and filled.

Turns a network and two splits into activations that enter one part, for each flip, where that saves
time. Knows nothing about epochs' order, losses or optimizers.

    >>> PrefixCache(config, cache, splits, network, "layer3", ...).keep(epochs=10)  # doctest: +SKIP

Legend: B batch, H height, W width, C channels, D=512 features.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torchvision.models import ResNet

from finetune.config.fields import RunConfig
from finetune.data.batches import batch_bounds, num_at_once
from finetune.data.pictures import Indices
from finetune.features.forms import Split, StoredActivations, enter
from finetune.model.network import boundary_shape, forward, part_state, parts_before
from finetune.model.weights import fingerprint
from finetune.system.array_store import Array, Cache, digest
from finetune.system.errors import ConfigError
from finetune.system.progress import StartProgress

_TIMED_CHUNKS = 3


def _kind_of(device: torch.device) -> str:
    """What computes the same bits: the GPU's model, or the CPU's instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


@dataclass
class PrefixCache:
    """Opens, weighs and fills the stores of one boundary for a run's two splits."""

    config: RunConfig
    cache: Cache
    splits: tuple[Split, Split]
    network: ResNet
    boundary: str
    precision: Callable[[], AbstractContextManager[Any]]
    say: Callable[[str], None]
    progress: StartProgress
    timings: dict[str, float] = field(default_factory=dict)
    """Milliseconds a picture, recomputed and read, where they were weighed."""

    @property
    def _num_at_once(self) -> int:
        return num_at_once(self.config.image_size, self.config.accelerator)

    @cached_property
    def _weights(self) -> str:
        return fingerprint(part_state(self.network, parts_before(self.boundary)))

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.network.conv1.weight.device
        return device

    @property
    def _format(self) -> str:
        return self.config.cache_format

    def keep(self, epochs: int) -> None:
        """Keep this boundary's activations where that saves time over so many epochs."""
        wanted = [(split, flip) for split in self.splits for flip in range(split.num_variants)]
        missing = [
            (split, flip)
            for split, flip in wanted
            if self.cache.open("activations", self._description(split, flip)) is None
        ]
        if missing and not self._is_worth_filling(missing, epochs):
            return
        for split in self.splits:
            variants = [self._fill(split, flip) for flip in range(split.num_variants)]
            if any(array is None for array in variants):
                continue
            plain, flipped = variants[0], variants[1] if split.flipping else None
            assert plain is not None
            split.kept[self.boundary] = StoredActivations(self.boundary, plain, flipped)

    def _description(self, split: Split, flip: int) -> dict[str, Any]:
        """Everything that the stored bytes depend on."""
        on_cpu = self._device.type == "cpu"
        return {
            "boundary": self.boundary,
            "weights": self._weights,
            "files": split.pictures.identity,
            "names": digest(split.pictures.names),
            "image_size": self.config.image_size,
            "flip": flip,
            "precision": self.config.precision,
            "device": _kind_of(self._device),
            "num_threads": torch.get_num_threads() if on_cpu else 0,
            "torch": torch.__version__,
            "dtype": self._format,
        }

    def _fill(self, split: Split, flip: int) -> Array | None:
        pictures = split.pictures
        what = f"{'flipped ' * flip}{pictures.folder.name}/ up to {self.boundary}"

        def build(rows: Array) -> dict[str, Any]:
            done = self.progress(f"computing {what}", len(pictures))
            for start, end in batch_bounds(len(pictures), self._num_at_once):
                indices = np.arange(start, end)
                rows[indices] = self._as_kept(self._compute(split, indices, flip))
                for _ in indices:
                    done()
            return {}

        entry = self.cache.open_or_build(
            "activations",
            self._description(split, flip),
            (len(pictures), *boundary_shape(self.boundary, self.config.image_size)),
            self._format,
            build,
        )
        return entry.array if entry else None

    def _as_kept(self, rows: Array) -> Array:
        """In the format in which they are kept. Raises `ConfigError` for what it can't hold."""
        with np.errstate(over="ignore"):
            kept = rows.astype(self._format, copy=False)
        if self._format != "float32" and np.isinf(kept).any():
            raise ConfigError(
                f"cache_format: got {self._format}, whose largest number is "
                f"{np.finfo(self._format).max:.0f}; what enters {self.boundary} is larger: pass "
                "float32"
            )
        return kept

    @torch.inference_mode()
    def _compute(self, split: Split, indices: Indices, flip: int) -> Array:
        """float32 activations that enter the boundary, (B, H, W, C) or (B, D)."""
        part = split.nearest_part(self.boundary)
        flips = np.full(len(indices), bool(flip)) if split.flipping else None
        inputs, positions = split.inputs(part, indices, flips)
        if positions is not None:
            positions = positions.to(self._device)
        x = enter(inputs.to(self._device), positions, part)
        with self.precision():
            x = forward(self.network, x, part, self.boundary)
        x = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
        return x.float().cpu().numpy()

    def _is_worth_filling(self, missing: list[tuple[Split, int]], epochs: int) -> bool:
        """Whether filling and then reading takes less time than recomputing in every epoch.

        Features at fc are always kept: they are a thousandth of the pictures' size.
        """
        if self.boundary == "fc":
            return True
        try:
            compute_ms, read_ms = self._time_a_picture()
        except OSError as error:
            self.say(f"cache: no room to time it ({error}); going on without")
            return False
        self.timings[f"{self.boundary}/recompute_ms"] = compute_ms
        self.timings[f"{self.boundary}/read_ms"] = read_ms
        num_read = epochs * sum(len(split.pictures) for split in self.splits)
        num_filled = sum(len(split.pictures) for split, _ in missing)
        recomputing = num_read * compute_ms
        keeping = num_filled * (compute_ms + read_ms) + num_read * read_ms
        worth = keeping < recomputing
        self.say(
            f"frozen layers up to {self.boundary}: {compute_ms:.1f} ms a picture to recompute, "
            f"{read_ms:.1f} ms to read; {'kept' if worth else 'recomputed'} for {epochs} epochs "
            f"({keeping / 1e3:.0f} s against {recomputing / 1e3:.0f} s)"
        )
        return worth

    def _time_a_picture(self) -> tuple[float, float]:
        """Milliseconds to recompute one picture's activations, and to read them from a file."""
        split = self.splits[0]
        size = min(self._num_at_once, len(split.pictures))
        chunks = [np.arange(size) for _ in range(_TIMED_CHUNKS)]
        computed = self._compute(split, chunks[0], 0)  # not timed: first calls are slower
        start = time.perf_counter()
        for chunk in chunks:
            computed = self._compute(split, chunk, 0)
        compute_ms = (time.perf_counter() - start) * 1e3 / (size * len(chunks))
        written = np.concatenate([self._as_kept(computed)] * len(chunks))
        with tempfile.TemporaryFile(dir=self.cache.directory) as file:  # nothing that could stay
            written.tofile(file)
            rows = np.memmap(file, written.dtype, "r", shape=written.shape)
            start = time.perf_counter()
            for i in range(len(chunks)):
                rows.take(np.arange(size) + i * size, axis=0)
            read_ms = (time.perf_counter() - start) * 1e3 / (size * len(chunks))
        return compute_ms, read_ms
