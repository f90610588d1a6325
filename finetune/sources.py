"""Where picture folders come from: the offline demo's handwritten digits.

Turns scikit-learn's digits (UCI, 1797 scans of 8x8 pixels, Alpaydin & Kaynak 1998) into folders
of PNGs as `data_dir` wants them. Knows nothing about training.

    >>> write_digits(Path("digits"), range(5, 10), train_per_class=5)  # doctest: +SKIP
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.errors import MissingPackage


def write_digits(
    folder: Path, digits: Iterable[int], train_per_class: int, val_per_class: int | None = None
) -> None:
    """Write train/DIGIT/*.png and val/DIGIT/*.png, whole or not at all.

    The first `train_per_class` scans of each digit train; of the others `val_per_class`, spread
    evenly over all writers, or every one, validate. A folder that exists is left as it is. Raises
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
                grey = (images[index].reshape(8, 8) * (255 / 16)).round().astype(np.uint8)
                Image.fromarray(grey).save(place / f"{index:04d}.png")
    aside.rename(folder)
