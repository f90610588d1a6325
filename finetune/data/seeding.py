"""Order and chance: functions of (seed, epoch, picture) alone.

Turns pictures' names into an epoch's order, flips and seeds of augmentation, so that a resumed run
needs no generator's state and a picture's draws do not depend on the others. Knows nothing about
what is in a picture.

    >>> epoch_order(pictures, seed=42, epoch=0)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.data.pictures import Indices, Keys, Pictures


def mixed(keys: Keys, salt: int) -> Keys:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014) of each key, for one salt."""
    with np.errstate(over="ignore"):
        salted = np.array([salt], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = keys + _finalised(salted)
        return _finalised(z)


def _finalised(z: Keys) -> Keys:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _random_bits(pictures: Pictures, seed: int, epoch: int, use: int) -> Keys:
    """64 random bits for each picture: its draw at this seed and epoch, for one use."""
    return mixed(mixed(pictures.keys, seed), epoch * 4 + use)


def epoch_order(pictures: Pictures, seed: int, epoch: int) -> Indices:
    """The order in which the pictures train in an epoch, a permutation of their indices."""
    return np.argsort(_random_bits(pictures, seed, epoch, 0), kind="stable")


def epoch_flips(pictures: Pictures, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which pictures are flipped in an epoch, by their indices."""
    draws = _random_bits(pictures, seed, epoch, 1)
    return np.asarray(draws >= np.uint64(1 << 63))


def epoch_augment_seeds(pictures: Pictures, seed: int, epoch: int) -> Keys:
    """Each picture's seed for random augmentation in an epoch, by their indices."""
    return _random_bits(pictures, seed, epoch, 2)
