"""Write scikit-learn's handwritten digits (1797 scans of 8x8 pixels) as folders of PNGs.

Source: UCI Optical Recognition of Handwritten Digits, Alpaydin & Kaynak 1998.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.system.errors import MissingPackage

Pixels = np.ndarray[Any, np.dtype[np.float64]]

MIN_CONTRAST = 200.0
"""Between the colours of a digit and its background, as a distance in RGB; black on white: 442."""


def write_digits(
    folder: Path,
    digits: Iterable[int],
    train_per_class: int,
    val_per_class: int | None = None,
    num_colours: int = 0,
) -> None:
    """Write train/DIGIT/*.png and val/DIGIT/*.png, 8x8 pixels; an existing folder is kept as it is.

    Training takes the first `train_per_class` scans of each digit. Validation takes the others, or
    `val_per_class` of them, evenly spaced and so from all writers. Each scan is written once in
    grey or, if `num_colours` is given, that many times in random but reproducible colours, so that
    the shape alone tells the digits apart. Raises `MissingPackage` without scikit-learn.
    """
    if folder.exists():
        return
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPackage("scikit-learn", "demo", "the demo's digits") from None

    images, labels = load_digits(return_X_y=True)
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for digit in digits:
        scans = np.flatnonzero(labels == digit)
        train, val = scans[:train_per_class], scans[train_per_class:]
        if val_per_class is not None:
            val = val[np.linspace(0, len(val) - 1, val_per_class).astype(int)]
        for split, chosen in (("train", train), ("val", val)):
            class_dir = unfinished / split / str(digit)
            class_dir.mkdir(parents=True)
            for index in chosen:
                darkness_HW = images[index].reshape(8, 8) / 16
                for name, pixels in _pictures(int(index), darkness_HW, num_colours):
                    Image.fromarray(pixels.round().astype(np.uint8)).save(class_dir / name)
    unfinished.rename(folder)


def _pictures(index: int, darkness_HW: Pixels, num_colours: int) -> Iterator[tuple[str, Pixels]]:
    """File names and pixels from 0 to 255 of one scan with values from 0 to 1."""
    if not num_colours:
        yield f"{index:04d}.png", darkness_HW * 255
    for i in range(num_colours):
        rng = np.random.default_rng((index, i))
        contrast = 0.0
        while contrast < MIN_CONTRAST:
            background, ink = rng.integers(0, 256, (2, 3)).astype(float)
            contrast = float(np.linalg.norm(background - ink))
        yield f"{index:04d}-{i}.png", background + darkness_HW[..., None] * (ink - background)
