"""Decoding of picture files to uint8 RGB squares, and strong augmentation.

Legend: H height, W width, C=3 channels (RGB).
"""

import re
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from finetune.data.layout import PICTURE_FORMATS
from finetune.system.devices import num_cores
from finetune.system.errors import DataError
from finetune.system.resources import is_out_of_memory, shortage
from finetune.system.text import one_line

_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 27)  # Pillow raises an error above it


class Preprocessing(NamedTuple):
    """How a picture's file becomes the network's input."""

    image_size: int


class Decoded(NamedTuple):
    """A picture that could be read."""

    image: Tensor
    """uint8 RGB, (H, W, 3), with both sides of `image_size`."""


def decode(path: Path, preprocessing: Preprocessing) -> Decoded:
    """Read a picture and resize it to a square; its aspect ratio is not kept.

    Bilinear with antialiasing, as torchvision's Resize. Grey, palette, alpha, CMYK and
    16-bit pictures become 8-bit RGB. Raises `DataError`, naming the path.
    """
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of unusual metadata and large sizes
        return _decode(path, preprocessing)


def _decode(path: Path, preprocessing: Preprocessing) -> Decoded:
    try:
        image_CHW = _read_rgb(path)
        size = [preprocessing.image_size] * 2
        resized: Tensor = v2.functional.resize(image_CHW, size, antialias=True)
        return Decoded(resized.permute(1, 2, 0).contiguous())
    except Exception as error:  # decoders raise errors of many types
        if is_out_of_memory(error) or shortage(error):  # not the picture's fault
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = re.sub(r"^decode_jpeg, \S+, ", "", reason).replace(f" {str(path)!r}", "")
        raise DataError(f"{one_line(path)} can't be read as a picture: {reason[:200]}") from None


def _read_rgb(path: Path) -> Tensor:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
        raise ValueError("it is not a regular file")
    with Image.open(path, formats=PICTURE_FORMATS) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are too many")
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
            rgb: Tensor = decode_jpeg(data, mode=ImageReadMode.RGB)
            return rgb
        if image.mode.startswith(("I", "F")):  # 16 bits or more: Pillow would clip, not scale
            grey = np.asarray(image, dtype=np.float32)
            is_16bit = image.mode.startswith("I;16") or grey.max(initial=0) > 255
            scale = 255 / 65535 if is_16bit else 1
            grey_8bit = (grey * scale).round().clip(0, 255).astype(np.uint8)
            return torch.from_numpy(grey_8bit).expand(3, -1, -1)
        array_HWC = np.array(image.convert("RGB"))
    return torch.from_numpy(array_HWC).permute(2, 0, 1)


@lru_cache(maxsize=1)
def _strong(size: int) -> v2.Compose:
    crop = v2.RandomResizedCrop((size, size), scale=(0.35, 1.0), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()])


def augment_strongly(image_HWC: Tensor, seed: int) -> Tensor:
    """Random resized crop, flip and TrivialAugment (https://arxiv.org/abs/2103.10158).

    Takes and returns uint8 of the same size. The result depends on `seed` alone; the state of
    torch's generator is restored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)
        augmented: Tensor = _strong(image_HWC.shape[0])(image_HWC.permute(2, 0, 1))
    return augmented.permute(1, 2, 0)


def decode_many(
    paths: Sequence[Path],
    preprocessing: Preprocessing,
    each: Callable[[int, Decoded | DataError], None],
) -> None:
    """Decode in parallel; `each` gets an index and its picture, or the reason if it has none."""

    def attempt(index: int) -> None:
        try:
            each(index, _decode(paths[index], preprocessing))
        except DataError as error:
            each(index, error)

    threads_before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_cores(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        # The filters are global: they are set before threads start, not within them.
        with warnings.catch_warnings(action="ignore"):
            for _ in pool.map(attempt, range(len(paths))):
                pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads_before)
