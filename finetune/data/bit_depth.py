"""Pictures of more than 8 bits per value: their range in a data set, and its scaling to 0..255."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.data.formats import first_bytes, open_picture
from finetune.system.devices import num_cores

Values = np.ndarray[Any, np.dtype[np.float64]]
Range = tuple[float, float]

PERCENTILES = (0.1, 99.9)
"""Of a data set's values: what becomes black and white."""

_FULL_16BIT = (0.0, 65535.0)
_MAX_PICTURES, _VALUES_PER_PICTURE = 1000, 10_000


def is_deep(mode: str) -> bool:
    """Whether Pillow's mode has more than 8 bits per value."""
    return mode.startswith(("I", "F"))


def read_values(image: Image.Image) -> Values:
    """The values of a grey picture, (H, W). Raises `ValueError` for NaN and infinity."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    return values


def full_range(image: Image.Image) -> Range | None:
    """The range of the picture's type, if that is one of 16 bits without sign."""
    is_16bit = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    return _FULL_16BIT if is_16bit else None


def scale(values: Values, bounds: Range | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Values as 0..255, linear within the bounds. Raises `ValueError` if there are none."""
    if bounds is None:
        raise ValueError(
            "it has 32 bits per value, and no range is known that becomes black to white, because "
            "no training picture has more than 8 bits; pass --pixel_range LOW..HIGH, or convert it"
        )
    low, high = bounds
    return ((values - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)


def find_range(paths: Sequence[Path]) -> Range | None:
    """The range that all pictures of more than 8 bits are scaled from; None if there are none.

    The full 16 bits if more than half of them is used, else `PERCENTILES` of the values. Of many
    pictures, evenly spaced ones are read.
    """
    with ThreadPoolExecutor(num_cores()) as pool:
        deep = list(compress(paths, pool.map(_is_deep_file, paths)))
        chosen = deep[:: len(deep) // _MAX_PICTURES + 1]
        found = [sample for sample in pool.map(_sample, chosen) if sample is not None]
    if not found:
        return None
    values = np.concatenate([values for values, _ in found])
    if all(is_16bit for _, is_16bit in found) and values.max() > _FULL_16BIT[1] / 2:
        return _FULL_16BIT
    low, high = (float(f"{bound:.6g}") for bound in np.percentile(values, PERCENTILES))
    return (low, high) if low < high else (low, low + 1)


def _is_deep_file(path: Path) -> bool:
    try:
        if first_bytes(path, 2) == b"\xff\xd8":  # JPEG has 8 bits
            return False
        with open_picture(path) as image:
            return is_deep(image.mode)
    except Exception:  # decoding it will name the file and the reason
        return False


def _sample(path: Path) -> tuple[Values, bool] | None:
    """Evenly spaced values of a picture, and whether its type has 16 bits."""
    try:
        with open_picture(path) as image:
            values = read_values(image).ravel()
            step = max(1, len(values) // _VALUES_PER_PICTURE)
            # The largest value decides whether all 16 bits are used.
            return np.append(values[::step], values.max()), full_range(image) is not None
    except Exception:
        return None
