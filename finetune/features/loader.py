"""The batches of each epoch, from pictures or from stored activations of the frozen layers."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import numpy as np
import torch

from finetune.config.fields import RunConfig
from finetune.data.batches import EpochBatches, Inputs, PrefetchedBatches, num_at_once
from finetune.data.decode import Preprocessing
from finetune.data.images import open_images
from finetune.data.pictures import Indices, Pictures
from finetune.data.seeding import epoch_augment_seeds, epoch_flips, epoch_order
from finetune.data.splits import Splits
from finetune.features.device_memory import DeviceMemory
from finetune.features.prefix_cache import PrefixCache
from finetune.features.split_inputs import SplitInputs
from finetune.model.chain import Chain
from finetune.system.array_store import Cache
from finetune.system.cuda import free_bytes
from finetune.system.errors import FinetuneError
from finetune.system.progress import bar
from finetune.system.resources import is_out_of_memory


class EpochLoader:
    """A run's training and validation batches by epoch; their randomness follows from the seed."""

    def __init__(
        self,
        config: RunConfig,
        splits: Splits,
        cache: Cache | None,
        log: Callable[[str], None] = print,
    ) -> None:
        """Decodes the pictures, or opens them in the cache. Raises `DataError`."""
        started = time.perf_counter()
        self._config, self.log, self._cache = config, log, cache
        self.unreadable: list[str] = []  # left out, as SPLIT/CLASS/FILE
        self.train = self._open(splits.train, is_flipped=config.augmentation.flips)
        self.val = self._open(splits.val, is_flipped=False, other=self.train.source)
        if names := self.unreadable:
            log(f"continuing without {len(names)} unreadable pictures: {names[0]} ...")
        self.timings: dict[str, float] = {}  # of `PrefixCache`
        self.memory = DeviceMemory(torch.device("cpu"), 0.0, log)
        self.cache_seconds = time.perf_counter() - started

    def _open(
        self, split: Pictures, is_flipped: bool, other: SplitInputs | None = None
    ) -> SplitInputs:
        """The inputs of a split; `other`: a source that may be its own."""
        config = self._config
        preprocessing, skip = Preprocessing.of(config), config.skip_unreadable
        is_training = other is None
        images, unreadable = open_images(split, preprocessing, skip, self._cache, bar, is_training)
        self.unreadable += [f"{split.name}/{name}" for name in unreadable]
        parts, source = config.backbone.part_names, images.source
        if other is None or (other.pictures.folder, other.pictures.names) != (
            source.folder,
            source.names,
        ):
            other = SplitInputs(images.of_source, parts, is_flipped)
        return SplitInputs(images, parts, is_flipped, other)

    @property
    def num_pictures(self) -> int:
        """Of both splits."""
        return len(self.train.pictures) + len(self.val.pictures)

    def train_epoch(self, epoch: int) -> EpochBatches | PrefetchedBatches:
        config, split, pictures = self._config, self.train, self.train.pictures
        part = split.last_stored_part(config.plan.first_trainable(epoch))
        flips = epoch_flips(pictures, config.seed, epoch) & config.augmentation.flips
        seeds = epoch_augment_seeds(pictures, config.seed, epoch)
        transform = self._transform

        def fetch(indices: Indices) -> Inputs:
            drawn = transform and transform.drawn(seeds[indices], config.image_size)
            return *split.batch(part, indices, flips[indices]), drawn

        order = epoch_order(pictures, config.seed, epoch)
        batch_size = config.batch_size or self.num_at_once
        return self._on_gpu(EpochBatches(pictures, order, batch_size, part, fetch), split)

    def _on_gpu(
        self, batches: EpochBatches, split: SplitInputs
    ) -> EpochBatches | PrefetchedBatches:
        """Batches that a GPU doesn't wait for; on a CPU the batches themselves."""
        self.memory.place((self.train, self.val), split, batches.part)
        if self._config.accelerator == "cpu" or batches.part in split.resident:
            return batches
        return PrefetchedBatches(batches, is_pinned=self._config.accelerator == "cuda")

    def release_memory(self) -> bool:
        """Free the device's memory of the inputs, for good; whether there were any."""
        held = [split for split in (self.train, self.val) if split.resident]
        self.memory.limit_bytes = 0.0
        for split in held:
            split.resident.clear()
        if held:
            self.log("GPU memory: it is used up; from here on inputs are copied in each epoch")
        return bool(held)

    @contextmanager
    def _memory_errors_explained(self, boundary: str) -> Iterator[None]:
        """A lack of memory as `FinetuneError`: these batches are not of the run's batch size."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise FinetuneError(
                f"out of memory while {self.num_at_once} pictures at once were computed up to "
                f"{boundary}, at image_size {self._config.image_size}; pass a smaller --image_size "
                "or --cache off"
            ) from None

    @property
    def _transform(self) -> Any:
        """The class of the augmentation's change of pixels, if it is more than a flip."""
        if (name := self._config.augmentation.transform) is None:
            return None
        module, _, class_name = name.partition(":")
        return getattr(import_module(module), class_name)

    @property
    def num_at_once(self) -> int:
        """The batch size of inference."""
        return num_at_once(self._config.image_size, self._config.accelerator)

    def val_epoch(self, epoch: int) -> EpochBatches | PrefetchedBatches:
        """Every validation picture once, ordered by name."""
        config, split = self._config, self.val
        batch_size = max(config.batch_size or 0, self.num_at_once)
        part = split.last_stored_part(config.plan.first_trainable(epoch))
        order = np.arange(len(split.pictures))
        no_flips = np.zeros(len(order), dtype=bool)
        batches = EpochBatches(
            split.pictures,
            order,
            batch_size,
            part,
            lambda i: (*split.batch(part, i, no_flips[i]), None),
        )
        return self._on_gpu(batches, split)

    def prepare(
        self,
        chain: Chain,
        first_epoch: int,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Open or compute the activations that the epochs from `first_epoch` on can use.

        The network has the source weights, is on its device and in eval mode.
        """
        config = self._config
        if config.accelerator == "cuda":
            device = next(chain.network.parameters()).device
            limit_bytes = config.gpu_cache_fraction * free_bytes()
            self.memory = DeviceMemory(device, limit_bytes, self.log)
        num_epochs = Counter[str]()
        if not (config.augmentation.transform or config.mixup):
            opening = map(config.plan.first_trainable, range(first_epoch, config.num_epochs))
            num_epochs.update(opening)
        if config.solves_head and first_epoch == 0:
            num_epochs[chain.parts[-1]] += 1
        if self._cache is None or not num_epochs:
            return
        started = time.perf_counter()
        if config.cache_format != "float32":
            self.log(
                f"cache_format {config.cache_format}: half the disk space, but not exact; "
                "accuracies may change by a picture or two"
            )
        shared = (config, self._cache, (self.train, self.val), chain, precision, self.log)
        for boundary in chain.parts[1:]:  # in order: each is computed from the one before
            if boundary in num_epochs:
                prefix_cache = PrefixCache(boundary, *shared, self.timings, self.memory.limit_bytes)
                with self._memory_errors_explained(boundary):
                    prefix_cache.open_or_fill(num_epochs[boundary])
        self.cache_seconds += time.perf_counter() - started
