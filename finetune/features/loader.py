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
from finetune.data.images import Images
from finetune.data.pictures import Indices, Pictures
from finetune.data.seeding import epoch_augment_seeds, epoch_flips, epoch_order
from finetune.features.inputs import SplitInputs
from finetune.features.prefix_cache import PrefixCache
from finetune.system.array_store import Cache
from finetune.system.progress import StartProgress, no_progress


class EpochLoader:
    """Training and validation batches by epoch; order, flips and augmentation follow the seed."""

    def __init__(
        self,
        config: RunConfig,
        train: Images,
        val: Images,
        cache: Cache | None,
        log: Callable[[str], None] = print,
        progress: StartProgress = no_progress,
    ) -> None:
        self._config = config
        self._plan = config.plan
        self._train = SplitInputs(train, is_flipped=config.data_aug == "y")
        self._val = SplitInputs(val, is_flipped=False)
        self._cache = cache
        self._log = log
        self._progress = progress
        self.timings: dict[str, float] = {}
        """Milliseconds per picture to recompute and to read, for each boundary that was timed."""
        self.prepare_seconds = 0.0

    @property
    def train_pictures(self) -> Pictures:
        return self._train.pictures

    @property
    def val_pictures(self) -> Pictures:
        return self._val.pictures

    def train_epoch(self, epoch: int) -> EpochBatches:
        pictures, seed, data_aug = self.train_pictures, self._config.seed, self._config.data_aug
        part = self._train.last_stored_part(self._plan.first_trainable(epoch))
        order = epoch_order(pictures, seed, epoch)
        flips = epoch_flips(pictures, seed, epoch) if data_aug == "y" else None
        seeds = epoch_augment_seeds(pictures, seed, epoch) if data_aug == "strong" else None

        def fetch(indices: Indices) -> tuple[Tensor, Tensor | None]:
            if seeds is None:
                return self._train.batch(part, indices, None if flips is None else flips[indices])
            images = self._train.images.batch(indices)
            pairs = zip(images, seeds[indices].tolist(), strict=True)
            return torch.stack([augment_strongly(image, seed) for image, seed in pairs]), None

        return EpochBatches(pictures, order, self._config.batch_size, part, fetch)

    def val_epoch(self, epoch: int) -> EpochBatches:
        """Every validation picture once, ordered by name."""
        config, pictures = self._config, self.val_pictures
        part = self._val.last_stored_part(self._plan.first_trainable(epoch))
        batch_size = max(config.batch_size, num_at_once(config.image_size, config.accelerator))
        return EpochBatches(
            pictures,
            np.arange(len(pictures)),
            batch_size,
            part,
            lambda indices: self._val.batch(part, indices, None),
        )

    def prepare(
        self,
        network: ResNet,
        first_epoch: int,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Open or compute the activations that the epochs from `first_epoch` on can use.

        `network` has the source weights, is on its device and in eval mode.
        """
        if self._cache is None or self._config.data_aug == "strong":
            return
        started = time.perf_counter()
        if self._config.cache_format != "float32":
            self._log(
                f"cache_format {self._config.cache_format}: half the disk space, but not exact; "
                "accuracies may change by a picture or two"
            )
        num_epochs = Counter(
            self._plan.first_trainable(epoch) for epoch in range(first_epoch, self._config.epochs)
        )
        # In the network's order: each boundary is computed from the one before.
        for boundary in PARTS[1:]:
            if boundary in num_epochs:
                prefix_cache = PrefixCache(
                    self._config,
                    self._cache,
                    (self._train, self._val),
                    network,
                    boundary,
                    precision,
                    self._log,
                    self._progress,
                )
                self.timings |= prefix_cache.open_or_fill(num_epochs[boundary])
        self.prepare_seconds += time.perf_counter() - started
