"""Augmentations as data: what each does to a training picture."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Augmentation:
    """What an augmentation does; the validation pictures never change."""

    summary: str
    title: str
    """Its word in tables and figures."""
    label: str
    """Its word in a run's name, or nothing."""
    flips: bool = False
    """Each picture is flipped horizontally with probability 1/2. Both forms of its activations can
    be stored."""
    transform: str | None = None
    """`package.module:Class` of a change to the pixels. `Class.drawn(seeds, image_size)` has what
    is drawn for the pictures of a batch, and its `apply` changes them, uint8 (B, H, W, C)."""


AUGMENTATIONS: Mapping[str, Augmentation] = {
    "n": Augmentation("none", title="none", label=""),
    "y": Augmentation(
        "flip each picture horizontally with probability 1/2", title="flip", label="aug", flips=True
    ),
    "strong": Augmentation(
        "random resized crop (scale 0.35 to 1), flip, TrivialAugment",
        title="strong",
        label="strong",
        transform="finetune.data.augment:StrongAugmentation",
    ),
}
