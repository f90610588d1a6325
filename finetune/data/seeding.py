"""Random order, flips and augmentation as functions of seed, epoch and a picture's name.

A resumed run therefore needs no generator's state, and a picture's values don't depend on the other
pictures.
"""

from typing import Any

import numpy as np

from finetune.data.pictures import Indices, Keys, Pictures


def mixed(keys: Keys, salt: int) -> Keys:
    """SplitMix64's finalizer (Steele, Lea & Flood 2014) of each key plus a salt."""
    with np.errstate(over="ignore"):
        salted = np.array([salt], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return _finalize(keys + _finalize(salted))


def _finalize(z: Keys) -> Keys:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _random_bits(pictures: Pictures, seed: int, epoch: int, use: int) -> Keys:
    """64 random bits for each picture at this seed and epoch; each `use` has its own."""
    return mixed(mixed(pictures.keys, seed), epoch * 4 + use)


def epoch_order(pictures: Pictures, seed: int, epoch: int) -> Indices:
    """The order of an epoch's training pictures, a permutation of their indices."""
    return np.argsort(_random_bits(pictures, seed, epoch, 0), kind="stable")


def epoch_flips(pictures: Pictures, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each picture is flipped in an epoch."""
    return np.asarray(_random_bits(pictures, seed, epoch, 1) >= np.uint64(1 << 63))


def epoch_augment_seeds(pictures: Pictures, seed: int, epoch: int) -> Keys:
    """The seed of each picture's strong augmentation in an epoch."""
    return _random_bits(pictures, seed, epoch, 2)


def step_generator(seed: int, epoch: int, step: int) -> np.random.Generator:
    """The generator of everything that is drawn once per training step."""
    return np.random.default_rng([seed, epoch, step])
