"""Small picture folders and archives for tests."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np
from PIL import Image


def jpeg(seed: int, size: tuple[int, int] = (24, 18)) -> bytes:
    """A JPEG of noise that depends on the seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def tree(
    classes: tuple[str, ...] = ("Aves", "Fungi"), train: int = 3, val: int = 2
) -> dict[str, bytes]:
    """Bytes by SPLIT/CLASS/FILE, with `train` and `val` pictures per class."""
    numbered = [
        f"{split}/{name}/{number:03d}.jpg"
        for split, count in (("train", train), ("val", val))
        for name in classes
        for number in range(count)
    ]
    return {name: jpeg(seed) for seed, name in enumerate(numbered)}


def zipped(files: Mapping[str, bytes], root: str = "inaturalist_12K/") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(root + name, content)
    return out.getvalue()
