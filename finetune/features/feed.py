"""Each epoch's batches, from whatever of a split is kept.

Turns a config and two splits into training and validation batches. The order, flips and
augmentation follow from the seed. Knows nothing about how activations are computed.

    >>> feed = Feed(config, train, val, cache); feed.prepare(network, 0)  # doctest: +SKIP
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models import ResNet

from finetune.config.fields import RunConfig
from finetune.config.strategies import PARTS, Plan
from finetune.data.batches import EpochBatches, num_at_once
from finetune.data.decode import augment_strongly
from finetune.data.images import Images
from finetune.data.pictures import Indices, Pictures
from finetune.data.seeding import epoch_augment_seeds, epoch_flips, epoch_order
from finetune.features.forms import Split
from finetune.features.prefix_cache import PrefixCache
from finetune.system.array_store import Cache
from finetune.system.progress import StartProgress, no_progress


class Feed:
    """Each epoch's batches, and what is kept to make them quickly."""

    def __init__(
        self,
        config: RunConfig,
        train: Images,
        val: Images,
        cache: Cache | None,
        say: Callable[[str], None] = print,
        progress: StartProgress = no_progress,
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

    def train_epoch(self, epoch: int) -> EpochBatches:
        """The training batches of an epoch: order, flips and augmentation follow from the seed."""
        pictures, seed = self.train_pictures, self._config.seed
        order = epoch_order(pictures, seed, epoch)
        if self._config.data_aug == "strong":
            seeds = epoch_augment_seeds(pictures, seed, epoch)

            def augmented(indices: Indices) -> tuple[Tensor, None]:
                images = self._train.images.batch(indices)
                pairs = zip(images, seeds[indices].tolist(), strict=True)
                return torch.stack([augment_strongly(image, s) for image, s in pairs]), None

            return EpochBatches(pictures, order, self._config.batch_size, "stem", augmented)
        flips = epoch_flips(pictures, seed, epoch) if self._train.flipping else None
        part = self._train.nearest_part(self._plan.first_trainable(epoch))
        return EpochBatches(
            pictures,
            order,
            self._config.batch_size,
            part,
            lambda indices: self._train.inputs(
                part, indices, None if flips is None else flips[indices]
            ),
        )

    def val_epoch(self, epoch: int) -> EpochBatches:
        """Every validation picture once, in the order of their names."""
        config = self._config
        part = self._val.nearest_part(self._plan.first_trainable(epoch))
        return EpochBatches(
            self.val_pictures,
            np.arange(len(self.val_pictures)),
            max(config.batch_size, num_at_once(config.image_size, config.accelerator)),
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
        if self._config.cache_format != "float32":
            self._say(
                f"cache_format {self._config.cache_format}: half the room, but no longer exact; an "
                "accuracy may move by a picture or two"
            )
        epochs_at: dict[str, int] = {}
        for epoch in range(first_epoch, self._config.epochs):
            boundary = self._plan.first_trainable(epoch)
            epochs_at[boundary] = epochs_at.get(boundary, 0) + 1
        for boundary in sorted(epochs_at, key=PARTS.index):
            if boundary != "stem":
                splits = (self._train, self._val)
                prefix_cache = PrefixCache(
                    self._config,
                    self._cache,
                    splits,
                    network,
                    boundary,
                    precision,
                    self._say,
                    self._progress,
                )
                prefix_cache.keep(epochs_at[boundary])
                self.timings |= prefix_cache.timings
        self.prepare_seconds += time.perf_counter() - started
