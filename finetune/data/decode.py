"""Decoding of picture files to uint8 RGB squares.

A picture is read as a viewer shows it: upright, on a background where it is transparent.

Legend: H height, W width, C=3 channels (RGB).
"""

import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from finetune.config.fields import RunConfig
from finetune.data import bit_depth
from finetune.data.formats import opaque, open_picture, orientation_of, turn_upright
from finetune.system.devices import num_cores
from finetune.system.errors import DataError
from finetune.system.resources import is_out_of_memory, shortage
from finetune.system.text import one_line

DECODER = 2
"""Part of a cache's key: increase it when a file would be decoded to other pixels."""

_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 27)  # Pillow raises an error above it
_END_OF_JPEG = b"\xff\xd9"


class Preprocessing(NamedTuple):
    """How a picture's file becomes the network's input."""

    image_size: int
    background: str = "white"
    """The colour behind transparent pixels, in Pillow's names or as #rrggbb."""
    pixel_range: bit_depth.Range | None = None
    """What becomes black and white in pictures of more than 8 bits; None: the range of the type."""

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        return cls(config.image_size, config.background, config.pixel_bounds)


class Decoded(NamedTuple):
    """A picture that could be read."""

    image: Tensor
    """uint8 RGB, (H, W, 3), with both sides of `image_size`."""
    width: int
    """Of the whole picture, upright."""
    height: int
    mode: str
    """Pillow's: RGB, L, P, CMYK, I;16 ..."""
    format: str
    """Pillow's: JPEG, PNG ..."""
    orientation: int
    """EXIF's, 1 to 8; 1 is upright."""
    value_range: bit_depth.Range | None
    """The smallest and largest value of a picture of more than 8 bits."""
    pixels_hash: str
    """A hash of all values before they are scaled and resized."""


def decode(path: Path, preprocessing: Preprocessing) -> Decoded:
    """Read a picture and resize it to a square; its aspect ratio is not kept.

    Bilinear with antialiasing, as torchvision's Resize. EXIF's orientation is applied, transparent
    pixels get the background, and a picture of any mode becomes 8-bit RGB. Raises `DataError`,
    naming the path.
    """
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of unusual metadata and large sizes
        return _decode(path, preprocessing)


def _decode(path: Path, preprocessing: Preprocessing) -> Decoded:
    try:
        return _read(path, preprocessing)
    except Exception as error:  # decoders raise errors of many types
        if is_out_of_memory(error) or shortage(error):  # not the picture's fault
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = re.sub(r"^decode_jpeg, \S+, ", "", reason).replace(f" {str(path)!r}", "")
        raise DataError(f"{one_line(path)} can't be read as a picture: {reason[:200]}") from None


def _read(path: Path, preprocessing: Preprocessing) -> Decoded:
    with open_picture(path) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are too many")
        about = (image.mode, str(image.format), orientation_of(image))
        value_range = None
        if bit_depth.is_deep(image.mode):
            bounds = preprocessing.pixel_range or bit_depth.full_range(image)
            values = bit_depth.read_values(turn_upright(image))
            value_range = (float(values.min()), float(values.max()))
            pixels_hash = _hash(values)
            rgb_HWC = torch.from_numpy(bit_depth.scale(values, bounds))[..., None].expand(-1, -1, 3)
        else:
            rgb_HWC = _read_rgb(path, image, preprocessing.background)
            pixels_hash = _hash(rgb_HWC.numpy())
    height, width, _ = rgb_HWC.shape
    square_HWC = _resized(rgb_HWC, preprocessing.image_size)
    return Decoded(square_HWC, width, height, *about, value_range, pixels_hash)


def pixels_of(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """A picture in memory as `decode` reads a file: uint8 RGB, (H, W, 3), a square."""
    upright = turn_upright(image.copy())
    if bit_depth.is_deep(image.mode):
        bounds = preprocessing.pixel_range or bit_depth.full_range(image)
        grey_HW = bit_depth.scale(bit_depth.read_values(upright), bounds)
        rgb_HWC = torch.from_numpy(grey_HW)[..., None].expand(-1, -1, 3)
    else:
        rgb_HWC = torch.from_numpy(np.array(opaque(upright, preprocessing.background)))
    return _resized(rgb_HWC, preprocessing.image_size)


def _resized(rgb_HWC: Tensor, size: int) -> Tensor:
    resized: Tensor = v2.functional.resize(rgb_HWC.permute(2, 0, 1), [size, size], antialias=True)
    return resized.permute(1, 2, 0).contiguous()


def _read_rgb(path: Path, image: Image.Image, background: str) -> Tensor:
    """The upright picture of 8 bits per value, (H, W, 3)."""
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        content = np.fromfile(path, dtype=np.uint8)
        # torchvision's decoder takes two thirds of Pillow's time, but accepts a file cut short.
        if content[-2:].tobytes() == _END_OF_JPEG:
            rgb_CHW = decode_jpeg(torch.from_numpy(content), mode=ImageReadMode.RGB)
            turn = _TURNS.get(orientation_of(image))
            return (turn(rgb_CHW) if turn else rgb_CHW).permute(1, 2, 0).contiguous()
    return torch.from_numpy(np.array(opaque(turn_upright(image), background)))


_TURNS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda x_CHW: x_CHW.flip(2),
    3: lambda x_CHW: x_CHW.flip(1, 2),
    4: lambda x_CHW: x_CHW.flip(1),
    5: lambda x_CHW: x_CHW.transpose(1, 2),
    6: lambda x_CHW: x_CHW.transpose(1, 2).flip(2),
    7: lambda x_CHW: x_CHW.transpose(1, 2).flip(1, 2),
    8: lambda x_CHW: x_CHW.transpose(1, 2).flip(1),
}
"""How a picture with EXIF's orientation becomes upright."""


def _hash(values: np.ndarray[Any, Any]) -> str:
    """A hash of an array's shape, type and values; not cryptographic."""
    hashed = xxhash.xxh3_128(f"{values.shape} {values.dtype}".encode())
    hashed.update(np.ascontiguousarray(values).data)
    return hashed.hexdigest()


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
