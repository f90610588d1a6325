"""Folders of pictures -> labelled splits -> batches.

Turns `train/CLASS/*` and `val/CLASS/*` into splits whose order, flips and augmentation are
functions of (seed, epoch, picture) alone, and into batches of uint8 pictures from a store of
decoded ones. Knows nothing about networks; normalising is the model's.

    >>> splits = find_splits(config)  # doctest: +SKIP

| room | role |
|---|---|
| pictures.py | a split's folder, in the order of its names |
| chance.py | order, flips and augmentation from (seed, epoch, picture) |
| splits.py | what trains, what validates, what is kept |
| decode.py | a file -> pixels |
| images.py | a split's pixels, stored and shared |
| batches.py | what each step sees |
"""

from __future__ import annotations

from finetune.data.batches import Batch, Epoch, batch_bounds, num_at_once
from finetune.data.chance import epoch_augment_seeds, epoch_flips, epoch_order
from finetune.data.decode import augment_strongly, decode, decode_many, num_cores
from finetune.data.images import Images, Progress, no_progress, open_images
from finetune.data.pictures import Indices, Keys, Pictures, find_pictures
from finetune.data.splits import (
    AUTO_VAL_FRACTION,
    Splits,
    find_splits,
    num_held_out,
    split_stratified,
)

__all__ = [
    "AUTO_VAL_FRACTION",
    "Batch",
    "Epoch",
    "Images",
    "Indices",
    "Keys",
    "Pictures",
    "Progress",
    "Splits",
    "augment_strongly",
    "batch_bounds",
    "decode",
    "decode_many",
    "epoch_augment_seeds",
    "epoch_flips",
    "epoch_order",
    "find_pictures",
    "find_splits",
    "no_progress",
    "num_at_once",
    "num_cores",
    "num_held_out",
    "open_images",
    "split_stratified",
]
