"""The batches of each epoch, from pictures or from stored activations of the frozen layers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models import ResNet

from finetune.config.fields import RunConfig
from finetune.config.strategies import PARTS
from finetune.data.batches import EpochBatches, num_at_once
from finetune.data.decode import augment_strongly
from finetune.data.images import open_images
from finetune.data.pictures import Indices, Pictures
from finetune.data.seeding import epoch_augment_seeds, epoch_flips, epoch_order
from finetune.data.splits import Splits
from finetune.features.inputs import SplitInputs
from finetune.features.prefix_cache import PrefixCache
from finetune.system.array_store import Cache
from finetune.system.progress import StartProgress, no_progress


class EpochLoader:
    """A run's training and validation batches by epoch; their randomness follows from the seed."""

    def __init__(
        self,
        config: RunConfig,
        splits: Splits,
        log: Callable[[str], None] = print,
        progress: StartProgress = no_progress,
    ) -> None:
        """Decodes the pictures, or opens them in the cache. Raises `DataError`."""
        started = time.perf_counter()
        self._config = config
        self._log = log
        self._progress = progress
        self._cache = None
        if config.cache and config.cache_gb:
            self._cache = Cache(config.cache_dir, config.cache_gb * 1e9, log)
        self.unreadable: list[str] = []
        """The pictures that are left out, as SPLIT/CLASS/FILE."""
        self._train = self._open(splits.train, is_flipped=config.data_aug == "y")
        self._val = self._open(splits.val, is_flipped=False)
        if self.unreadable:
            count, first = len(self.unreadable), self.unreadable[0]
            log(f"continuing without {count} unreadable pictures: {first} ...")
        self.timings: dict[str, float] = {}
        """Milliseconds per picture to recompute and to read, for each boundary that was timed."""
        self.cache_seconds = time.perf_counter() - started

    def _open(self, split: Pictures, is_flipped: bool) -> SplitInputs:
        config = self._config
        images, unreadable = open_images(
            split, config.image_size, config.skip_unreadable, self._cache, self._progress
        )
        self.unreadable += [f"{split.folder.name}/{name}" for name in unreadable]
        return SplitInputs(images, is_flipped)

    @property
    def train_pictures(self) -> Pictures:
        return self._train.pictures

    @property
    def val_pictures(self) -> Pictures:
        return self._val.pictures

    def train_epoch(self, epoch: int) -> EpochBatches:
        pictures, seed, data_aug = self.train_pictures, self._config.seed, self._config.data_aug
        part = self._train.last_stored_part(self._config.plan.first_trainable(epoch))
        no_flips = np.zeros(len(pictures), dtype=bool)
        flips = epoch_flips(pictures, seed, epoch) if data_aug == "y" else no_flips
        seeds = epoch_augment_seeds(pictures, seed, epoch)

        def fetch(indices: Indices) -> tuple[Tensor, Tensor | None]:
            inputs, positions = self._train.batch(part, indices, flips[indices])
            if data_aug == "strong":
                pairs = zip(inputs, seeds[indices].tolist(), strict=True)
                inputs = torch.stack([augment_strongly(image, seed) for image, seed in pairs])
            return inputs, positions

        order = epoch_order(pictures, seed, epoch)
        return EpochBatches(pictures, order, self._config.batch_size, part, fetch)

    def val_epoch(self, epoch: int) -> EpochBatches:
        """Every validation picture once, ordered by name."""
        config, pictures = self._config, self.val_pictures
        part = self._val.last_stored_part(config.plan.first_trainable(epoch))
        batch_size = max(config.batch_size, num_at_once(config.image_size, config.accelerator))

        def fetch(indices: Indices) -> tuple[Tensor, Tensor | None]:
            return self._val.batch(part, indices, np.zeros(len(indices), dtype=bool))

        return EpochBatches(pictures, np.arange(len(pictures)), batch_size, part, fetch)

    def prepare(
        self,
        network: ResNet,
        first_epoch: int,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Open or compute the activations that the epochs from `first_epoch` on can use.

        `network` has the source weights, is on its device and in eval mode.
        """
        config = self._config
        if self._cache is None or config.data_aug == "strong":
            return
        started = time.perf_counter()
        if config.cache_format != "float32":
            self._log(
                f"cache_format {config.cache_format}: half the disk space, but not exact; "
                "accuracies may change by a picture or two"
            )
        epochs = range(first_epoch, config.epochs)
        num_epochs = Counter(config.plan.first_trainable(epoch) for epoch in epochs)
        for boundary in PARTS[1:]:  # in the network's order: each is computed from the one before
            if boundary in num_epochs:
                prefix_cache = PrefixCache(
                    config,
                    self._cache,
                    (self._train, self._val),
                    network,
                    boundary,
                    precision,
                    self._log,
                    self._progress,
                )
                self.timings |= prefix_cache.open_or_fill(num_epochs[boundary])
        self.cache_seconds += time.perf_counter() - started
