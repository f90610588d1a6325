"""Where picture folders come from: the offline demo's handwritten digits.

Turns scikit-learn's digits (UCI, 1797 scans of 8x8 pixels, Alpaydin & Kaynak 1998) into folders
of PNGs as `data_dir` wants them. Knows nothing about training.

    >>> write_digits(Path("digits"), range(5, 10), train_per_class=5)  # doctest: +SKIP
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.system.errors import MissingPackage

Pixels = np.ndarray[Any, np.dtype[np.float64]]

MIN_CONTRAST = 200.0
"""Between an ink and its paper, as a distance in RGB; black on white is 442."""


def write_digits(
    folder: Path,
    digits: Iterable[int],
    train_per_class: int,
    val_per_class: int | None = None,
    num_inks: int = 0,
) -> None:
    """Write train/DIGIT/*.png and val/DIGIT/*.png, 8x8 pixels, whole or not at all.

    The first `train_per_class` scans of each digit train; of the others `val_per_class`, spread
    evenly over all writers, or every one, validate. Each scan is written once in grey, or as often
    as `num_inks` says, each time in an ink and on a paper of its own, always the same ones: colour
    then tells nothing, and shape has to be learnt. A folder that exists is left as it is. Raises
    `MissingPackage` without scikit-learn.
    """
    if folder.exists():
        return
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPackage("scikit-learn", "demo", "the demo's digits") from None

    images, labels = load_digits(return_X_y=True)
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    for digit in digits:
        members = np.flatnonzero(labels == digit)
        others = members[train_per_class:]
        if val_per_class is not None:
            others = others[np.linspace(0, len(others) - 1, val_per_class).astype(int)]
        for split, chosen in (
            ("train", members[:train_per_class]),
            ("val", others),
        ):
            place = aside / split / str(digit)
            place.mkdir(parents=True)
            for index in chosen:
                darkness = images[index].reshape(8, 8) / 16
                pictures = [_coloured(darkness, (int(index), i)) for i in range(num_inks)]
                for i, picture in enumerate(pictures or [darkness * 255]):
                    name = f"{index:04d}-{i}.png" if num_inks else f"{index:04d}.png"
                    Image.fromarray(picture.round().astype(np.uint8)).save(place / name)
    aside.rename(folder)


def _coloured(darkness: Pixels, seed: tuple[int, ...]) -> Pixels:
    """A scan (H, W), 0 to 1, in ink on paper: (H, W, 3), 0 to 255."""
    rng = np.random.default_rng(seed)
    while True:
        paper, ink = rng.integers(0, 256, (2, 3)).astype(float)
        if np.linalg.norm(paper - ink) >= MIN_CONTRAST:
            coloured: Pixels = paper + darkness[..., None] * (ink - paper)
            return coloured
