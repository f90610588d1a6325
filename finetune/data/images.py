"""The decoded pictures of a split, from the cache or directly from their files.

Legend: B batch, H height, W width, C=3 channels (RGB), N pictures of a folder.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor

from finetune.data.decode import DECODER, Decoded, Preprocessing, decode_many
from finetune.data.pictures import Indices, Pictures
from finetune.system.array_store import Cache
from finetune.system.errors import DataError
from finetune.system.progress import StartProgress, no_progress

Notes = dict[str, dict[str, str]]
_ADVICE = "repair or remove it, or pass --skip_unreadable"


@dataclass(frozen=True)
class Images:
    """The decoded pictures of a split, by index."""

    pictures: Pictures
    preprocessing: Preprocessing
    stored: Any | None
    """The pictures of `pictures.whole` from the cache, (N, H, W, 3)."""
    source: Pictures
    """The readable pictures of `pictures.whole` if they are stored, else `pictures`."""

    @property
    def of_source(self) -> "Images":
        return replace(self, pictures=self.source)

    def batch(self, indices: Indices) -> Tensor:
        """uint8, (B, H, W, 3). Raises `DataError` if a picture can't be read."""
        if self.stored is not None:
            return torch.from_numpy(self.stored.take(self.pictures.rows[indices], axis=0))
        images: dict[int, Tensor] = {}

        def keep(i: int, decoded: Decoded | DataError) -> None:
            if isinstance(decoded, DataError):
                raise DataError(f"{decoded}; {_ADVICE}")
            images[i] = decoded.image

        decode_many([self.pictures.path(i) for i in indices], self.preprocessing, keep)
        return torch.stack([images[i] for i in range(len(indices))])


def open_images(
    pictures: Pictures,
    preprocessing: Preprocessing,
    skip_unreadable: bool,
    cache: Cache | None,
    progress: StartProgress = no_progress,
    needs_all_classes: bool = True,
) -> tuple[Images, list[str]]:
    """A split's decoded pictures, and the names of those that are left out as unreadable.

    The cache holds all of `pictures.whole`. Without a cache, pictures are decoded each
    time they are needed. Raises `DataError` for an unreadable picture unless `skip_unreadable`, and
    if too few are left: none, or of a class none if `needs_all_classes`.
    """
    stored: Any | None = None
    unreadable: dict[str, str] = {}
    if cache is not None:
        stored, notes = _open_store(pictures.whole, preprocessing, cache, progress)
        unreadable = notes["unreadable"]
    if stored is None and skip_unreadable:
        unreadable = _decode_all(pictures, preprocessing, "reading", progress)["unreadable"]
    affected = [name for name in pictures.names if name in unreadable]
    if affected and not skip_unreadable:
        more = f" (and {len(affected) - 1} more)" if len(affected) > 1 else ""
        raise DataError(f"{unreadable[affected[0]]}{more}; {_ADVICE}")
    if affected:
        pictures = _without(pictures, unreadable)
        read = set(pictures.labels.tolist())
        empty = [name for i, name in enumerate(pictures.class_names) if i not in read]
        if empty and (needs_all_classes or not read):
            names = ", ".join(empty)
            raise DataError(f"{pictures.folder}: no picture of these classes can be read: {names}")
    source = pictures if stored is None else _without(pictures.whole, unreadable)
    return Images(pictures, preprocessing, stored, source), affected


def _without(pictures: Pictures, unreadable: Collection[str]) -> Pictures:
    if not unreadable:
        return pictures
    return pictures.subset(np.flatnonzero([n not in unreadable for n in pictures.names]))


def picture_hashes(
    pictures: Pictures,
    preprocessing: Preprocessing,
    cache: Cache | None,
    progress: StartProgress = no_progress,
) -> list[str | None]:
    """A hash of each picture's pixels in full size; None for those that can't be read.

    Read from the cache's decoded pictures, which are built if need be. Without a cache, every
    picture is decoded.
    """
    whole = pictures.whole
    stored, notes = _open_store(whole, preprocessing, cache, progress) if cache else (None, {})
    if stored is None:
        notes = _decode_all(whole, preprocessing, "reading", progress)
    return [notes["hashes"].get(whole.names[row]) for row in pictures.rows]


def _open_store(
    pictures: Pictures, preprocessing: Preprocessing, cache: Cache, progress: StartProgress
) -> tuple[Any | None, Notes]:
    """The decoded pictures, (N, H, W, 3), if the cache has space, and what is known of them."""
    build = partial(_decode_all, pictures, preprocessing, "decoding", progress)
    description = {
        "files": pictures.identity,
        **preprocessing._asdict(),
        "decoder": [DECODER, torchvision.__version__, PIL.__version__],
    }
    shape = (len(pictures), preprocessing.image_size, preprocessing.image_size, 3)
    stored = cache.open_or_build("images", description, shape, "uint8", build)
    return (stored.array, dict(stored.notes)) if stored else (None, {"unreadable": {}})


def _decode_all(
    pictures: Pictures,
    preprocessing: Preprocessing,
    what: str,
    progress: StartProgress,
    images_NHWC: Any = None,
) -> Notes:
    """Decode all pictures, into the array if there is one.

    Returns by name the `unreadable` ones' errors and the others' `hashes`.
    """
    done = progress(f"{what} {pictures.name}/", len(pictures))
    unreadable: dict[str, str] = {}
    hashes: dict[str, str] = {}

    def store(index: int, decoded: Decoded | DataError) -> None:
        if isinstance(decoded, DataError):
            unreadable[pictures.names[index]] = str(decoded)
        else:
            hashes[pictures.names[index]] = decoded.pixels_hash
            if images_NHWC is not None:
                images_NHWC[index] = decoded.image.numpy()
        done()

    decode_many(pictures.paths, preprocessing, store)
    return {"unreadable": unreadable, "hashes": hashes}
