"""The frozen prefix's outputs, computed once and shared by epochs, runs and processes.

Turns pictures, a network and a plan into each epoch's batches, which enter the network as far up
as what is kept allows: features at fc, activations at a boundary, or decoded pictures. The numbers
are those that the whole network would have computed. Knows nothing about losses or optimizers.

    >>> feed = Feed(...); batches = feed.train_epoch(0)  # doctest: +SKIP

Legend: B batch, H height, W width, C channels, N pictures of a split.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models import ResNet

from finetune.cache import Array, Cache, digest
from finetune.config import RunConfig
from finetune.data import (
    Epoch,
    Images,
    Indices,
    Pictures,
    Progress,
    augment_strongly,
    epoch_augment_seeds,
    epoch_flips,
    epoch_order,
    no_progress,
)
from finetune.model import boundary_shape, fingerprint, forward, normalise, part_state, parts_before
from finetune.strategies import PARTS, Plan

CHUNK = 32
"""Pictures that go through the frozen layers at once while a store is filled."""

_TIMED_CHUNKS = 3


@dataclass(frozen=True)
class Kept:
    """A split's activations that enter one part, for each flip; rows are the split's indices."""

    part: str
    plain: Array
    flipped: Array | None

    def batch(self, indices: Indices, flips: np.ndarray[Any, Any] | None) -> Tensor:
        """float32, (B, H, W, C), or (B, D) at fc."""
        if flips is None or self.flipped is None:
            return torch.from_numpy(self.plain.take(indices, axis=0))
        rows = np.empty((len(indices), *self.plain.shape[1:]), self.plain.dtype)
        rows[~flips] = self.plain.take(indices[~flips], axis=0)
        rows[flips] = self.flipped.take(indices[flips], axis=0)
        return torch.from_numpy(rows)


class Split:
    """A split's pictures in every form in which they are kept."""

    def __init__(self, images: Images, flipping: bool) -> None:
        self.images = images
        self.flipping = flipping
        self.kept: dict[str, Kept] = {}

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


class Feed:
    """Each epoch's batches, and what is kept to make them quickly."""

    def __init__(
        self,
        config: RunConfig,
        train: Images,
        val: Images,
        cache: Cache | None,
        say: Callable[[str], None] = print,
        progress: Progress = no_progress,
    ) -> None:
        self._config = config
        self._plan: Plan = config.plan
        self._train = Split(train, flipping=config.data_aug == "y")
        self._val = Split(val, flipping=False)
        self._cache = cache
        self._say = say
        self._progress = progress
        self.timings: dict[str, float] = {}
        """Milliseconds a picture, recomputed and read, for each boundary that was timed."""
        self.prepare_seconds = 0.0

    @property
    def train_pictures(self) -> Pictures:
        return self._train.pictures

    @property
    def val_pictures(self) -> Pictures:
        return self._val.pictures

    def train_epoch(self, epoch: int) -> Epoch:
        """The training batches of an epoch: order, flips and augmentation follow from the seed."""
        pictures, seed = self.train_pictures, self._config.seed
        order = epoch_order(pictures, seed, epoch)
        if self._config.data_aug == "strong":
            seeds = epoch_augment_seeds(pictures, seed, epoch)

            def augmented(indices: Indices) -> tuple[Tensor, None]:
                images = self._train.images.batch(indices)
                pairs = zip(images, seeds[indices].tolist(), strict=True)
                return torch.stack([augment_strongly(image, s) for image, s in pairs]), None

            return Epoch(pictures, order, self._config.batch_size, "stem", augmented)
        flips = epoch_flips(pictures, seed, epoch) if self._train.flipping else None
        part = self._train.nearest_part(self._plan.first_trainable(epoch))
        return Epoch(
            pictures,
            order,
            self._config.batch_size,
            part,
            lambda indices: self._train.inputs(
                part, indices, None if flips is None else flips[indices]
            ),
        )

    def val_epoch(self, epoch: int) -> Epoch:
        """Every validation picture once, in the order of their names."""
        part = self._val.nearest_part(self._plan.first_trainable(epoch))
        return Epoch(
            self.val_pictures,
            np.arange(len(self.val_pictures)),
            self._config.batch_size,
            part,
            lambda indices: self._val.inputs(part, indices, None),
        )

    def prepare(
        self,
        network: ResNet,
        first_epoch: int,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Open or compute what the epochs from `first_epoch` on can use of the frozen layers.

        `network` holds the source weights and stands on its device, in eval mode. The boundary
        nearest the input comes first, so that those above it are computed from it.
        """
        if self._cache is None or self._config.data_aug == "strong":
            return
        started = time.perf_counter()
        epochs_at: dict[str, int] = {}
        for epoch in range(first_epoch, self._config.epochs):
            boundary = self._plan.first_trainable(epoch)
            epochs_at[boundary] = epochs_at.get(boundary, 0) + 1
        for boundary in sorted(epochs_at, key=PARTS.index):
            if boundary != "stem":
                _Keeper(self, network, boundary, precision).keep(epochs_at[boundary])
        self.prepare_seconds += time.perf_counter() - started


class _Keeper:
    """Opens, weighs and fills the stores of one boundary for a feed's two splits."""

    def __init__(
        self,
        feed: Feed,
        network: ResNet,
        boundary: str,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        assert feed._cache is not None
        self._feed, self._cache = feed, feed._cache
        self._splits = (feed._train, feed._val)
        self._network, self._boundary, self._precision = network, boundary, precision
        self._device = network.conv1.weight.device
        self._weights = fingerprint(part_state(network, parts_before(boundary)))

    def keep(self, epochs: int) -> None:
        """Keep this boundary's activations where that saves time over so many epochs."""
        wanted = [(split, flip) for split in self._splits for flip in range(split.num_variants)]
        missing = [
            (split, flip)
            for split, flip in wanted
            if self._cache.open("activations", self._description(split, flip)) is None
        ]
        if missing and not self._is_worth_filling(missing, epochs):
            return
        for split in self._splits:
            variants = [self._fill(split, flip) for flip in range(split.num_variants)]
            if any(array is None for array in variants):
                continue
            plain, flipped = variants[0], variants[1] if split.flipping else None
            assert plain is not None
            split.kept[self._boundary] = Kept(self._boundary, plain, flipped)

    def _description(self, split: Split, flip: int) -> dict[str, Any]:
        """Everything that the stored bytes depend on."""
        on_cpu = self._device.type == "cpu"
        return {
            "boundary": self._boundary,
            "weights": self._weights,
            "files": split.pictures.identity,
            "names": digest(split.pictures.names),
            "image_size": self._feed._config.image_size,
            "flip": flip,
            "precision": self._feed._config.precision,
            "device": "cpu"
            if on_cpu
            else torch.cuda.get_device_name(self._device)
            if self._device.type == "cuda"
            else self._device.type,
            "num_threads": torch.get_num_threads() if on_cpu else 0,
            "torch": torch.__version__,
            "dtype": "float32",
        }

    def _fill(self, split: Split, flip: int) -> Array | None:
        pictures = split.pictures
        what = f"{'flipped ' * flip}{pictures.folder.name}/ up to {self._boundary}"

        def build(rows: Array) -> dict[str, Any]:
            done = self._feed._progress(f"computing {what}", len(pictures))
            for start in range(0, len(pictures), CHUNK):
                indices = np.arange(start, min(start + CHUNK, len(pictures)))
                rows[indices] = self._compute(split, indices, flip)
                for _ in indices:
                    done()
            return {}

        entry = self._cache.open_or_build(
            "activations",
            self._description(split, flip),
            (len(pictures), *boundary_shape(self._boundary, self._feed._config.image_size)),
            "float32",
            build,
        )
        return entry.array if entry else None

    @torch.inference_mode()
    def _compute(self, split: Split, indices: Indices, flip: int) -> Array:
        """float32 activations that enter the boundary, (B, H, W, C) or (B, D)."""
        part = split.nearest_part(self._boundary)
        flips = np.full(len(indices), bool(flip)) if split.flipping else None
        inputs, positions = split.inputs(part, indices, flips)
        if positions is not None:
            positions = positions.to(self._device)
        x = enter(inputs.to(self._device), positions, part)
        with self._precision():
            x = forward(self._network, x, part, self._boundary)
        x = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
        return x.float().cpu().numpy()

    def _is_worth_filling(self, missing: list[tuple[Split, int]], epochs: int) -> bool:
        """Whether filling and then reading takes less time than recomputing in every epoch.

        Features at fc are always kept: they are a thousandth of the pictures' size.
        """
        if self._boundary == "fc":
            return True
        try:
            compute_ms, read_ms = self._time_a_picture()
        except OSError as error:
            self._feed._say(f"cache: no room to time it ({error}); going on without")
            return False
        self._feed.timings[f"{self._boundary}/recompute_ms"] = compute_ms
        self._feed.timings[f"{self._boundary}/read_ms"] = read_ms
        num_read = epochs * sum(len(split.pictures) for split in self._splits)
        num_filled = sum(len(split.pictures) for split, _ in missing)
        recomputing = num_read * compute_ms
        keeping = num_filled * (compute_ms + read_ms) + num_read * read_ms
        worth = keeping < recomputing
        self._feed._say(
            f"frozen layers up to {self._boundary}: {compute_ms:.1f} ms a picture to recompute, "
            f"{read_ms:.1f} ms to read; {'kept' if worth else 'recomputed'} for {epochs} epochs "
            f"({keeping / 1e3:.0f} s against {recomputing / 1e3:.0f} s)"
        )
        return worth

    def _time_a_picture(self) -> tuple[float, float]:
        """Milliseconds to recompute one picture's activations, and to read them from a file."""
        split = self._splits[0]
        size = min(CHUNK, len(split.pictures))
        chunks = [np.arange(size) for _ in range(_TIMED_CHUNKS)]
        computed = self._compute(split, chunks[0], 0)  # not timed: first calls are slower
        start = time.perf_counter()
        for chunk in chunks:
            computed = self._compute(split, chunk, 0)
        compute_ms = (time.perf_counter() - start) * 1e3 / (size * len(chunks))
        with tempfile.TemporaryDirectory(dir=self._cache.directory, prefix=".timing") as place:
            path = Path(place) / "rows.npy"
            np.save(path, np.concatenate([computed] * len(chunks)))
            rows = np.load(path, mmap_mode="r")
            start = time.perf_counter()
            for i in range(len(chunks)):
                rows.take(np.arange(size) + i * size, axis=0)
            read_ms = (time.perf_counter() - start) * 1e3 / (size * len(chunks))
        return compute_ms, read_ms
