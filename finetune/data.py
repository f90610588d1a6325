"""Folders of pictures -> labelled splits -> batches.

Turns `train/CLASS/*` and `val/CLASS/*` into splits whose order, flips and augmentation are
functions of (seed, epoch, picture) alone, and into batches of uint8 pictures from a store of
decoded ones.
Knows nothing about networks; normalising is the model's.

    >>> splits = find_splits(config)  # doctest: +SKIP

Legend: B batch, H height, W width, C=3 channels (RGB), N pictures of a folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from finetune.cache import Cache, digest
from finetune.config import RunConfig
from finetune.errors import DataError, is_out_of_memory, one_line, shortage
from finetune.layout import (
    IMAGE_SUFFIXES,
    PICTURE_FORMATS,
    class_dirs,
    find_data_dir,
    pictures_of_class,
)

AUTO_VAL_FRACTION = 0.2
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 27)  # where Pillow calls it a bomb

Indices = np.ndarray[Any, np.dtype[np.int64]]
Keys = np.ndarray[Any, np.dtype[np.uint64]]


# folders and splits


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures of one folder, in the order of their names."""

    folder: Path
    names: tuple[str, ...]
    """CLASS/FILE, with forward slashes: what identifies a picture on any machine."""
    labels: Indices
    class_names: tuple[str, ...]
    rows: Indices
    """Where each one stands in the folder's whole listing, and so in its decoded store."""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.folder / self.names[index]

    def subset(self, indices: Indices) -> Pictures:
        return Pictures(
            self.folder,
            tuple(self.names[i] for i in indices),
            self.labels[indices],
            self.class_names,
            self.rows[indices],
        )

    @cached_property
    def keys(self) -> Keys:
        """A number for each picture, made from its name alone."""
        hashes = (hashlib.blake2b(os.fsencode(n), digest_size=8).digest() for n in self.names)
        return np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64)

    @cached_property
    def identity(self) -> str:
        """Hash of what tells these files' bytes from others on this machine, without reading them.

        Change times are part of it: they move whenever a file's bytes do, and can't be set back.
        """

        def stand(path: str) -> list[object]:
            try:
                found = os.stat(path)
            except OSError:  # a broken link: reading it will say so
                return [path]
            return [path, found.st_size, found.st_mtime_ns, found.st_ctime_ns]

        return digest([stand(str(self.folder / name)) for name in self.names])

    @cached_property
    def sizes(self) -> list[tuple[str, int]]:
        """SPLIT/CLASS/FILE and its bytes, -1 for a broken link."""
        split = self.folder.name
        return [(f"{split}/{name}", _num_bytes(self.folder / name)) for name in self.names]

    @property
    def fingerprint(self) -> str:
        """Hash of names and sizes: the same on every machine that holds the same files."""
        return digest(self.sizes)


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


@dataclass(frozen=True)
class Splits:
    """What trains, what validates, and what is kept for the test, if anything."""

    train: Pictures
    val: Pictures
    test: Pictures | None
    val_fraction: float
    note: str

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    @property
    def dataset_fingerprint(self) -> str:
        """Hash of the files' names and sizes: the same on every machine, however they are split."""
        parts = [self.train, self.val, *([self.test] if self.test else [])]
        return digest(sorted(size for part in parts for size in part.sizes))

    @property
    def split_fingerprint(self) -> str:
        return digest([[p.folder.name, p.names] for p in (self.train, self.val)])


def find_pictures(folder: Path) -> Pictures:
    """The pictures below `folder`/CLASS, hidden and foreign files left out.

    Raises `DataError` for a folder without classes and for a class without pictures.
    """
    classes = class_dirs(folder)
    if not classes:
        raise DataError(f"{folder} holds no class folders; each class needs one, with its pictures")
    names: list[str] = []
    labels: list[int] = []
    for label, class_dir in enumerate(classes):
        found = pictures_of_class(class_dir)
        if not found:
            raise DataError(
                f"{class_dir} is a class without pictures (looked for "
                f"{' '.join(sorted(IMAGE_SUFFIXES))}); add some or remove the folder"
            )
        names += [f"{class_dir.name}/{name}" for name in found]
        labels += [label] * len(found)
    return Pictures(
        folder,
        tuple(names),
        np.array(labels, dtype=np.int64),
        tuple(p.name for p in classes),
        np.arange(len(names)),
    )


def find_splits(config: RunConfig) -> Splits:
    """What trains and what validates under `config`. Raises `DataError`."""
    data_dir = find_data_dir(config.data_dir)
    has_test = (data_dir / "test").is_dir()
    fraction = config.val_fraction
    if fraction == "auto":
        fraction = 0.0 if has_test else AUTO_VAL_FRACTION
    train, val = find_pictures(data_dir / "train"), find_pictures(data_dir / "val")
    _same_classes(train, val)
    test = find_pictures(data_dir / "test") if has_test and fraction == 0 else None
    if test:
        _same_classes(train, test)
    if fraction > 0:
        kept, validating = split_stratified(train, fraction)
        test, train, val = val, train.subset(kept), train.subset(validating)
        if not len(val):
            raise DataError(
                f"val_fraction: {fraction:g} of {len(train)} training pictures leaves none to "
                "validate; pass a larger one, or 0 to validate on val/"
            )
        what = f"{fraction:.0%} of train/ validates ({len(val)} pictures); val/ is kept"
    else:
        what = f"val/ validates ({len(val)} pictures); {'test/' if test else 'nothing'} is kept"
    count = f" ({len(test)} pictures)" if test else ""
    note = f"{len(train)} pictures train; {what} for the test{count}"
    return Splits(train, val, test, float(fraction), note)


def _same_classes(train: Pictures, other: Pictures) -> None:
    ours, theirs = set(train.class_names), set(other.class_names)
    if ours != theirs:
        only = [f"{c!r} only in {train.folder.name}/" for c in sorted(ours - theirs)]
        only += [f"{c!r} only in {other.folder.name}/" for c in sorted(theirs - ours)]
        raise DataError(
            f"{train.folder.parent}: the splits hold different classes: {', '.join(only)}; "
            "every split needs every class"
        )


def split_stratified(pictures: Pictures, fraction: float) -> tuple[Indices, Indices]:
    """Indices (kept, held out): of each class the same share, to the nearest picture.

    Which ones follows from the pictures' names alone: not from a seed, the directory's order or
    the machine. A class keeps at least one picture.
    """
    held_out = np.zeros(len(pictures), dtype=bool)
    for label in range(len(pictures.class_names)):
        members = np.flatnonzero(pictures.labels == label)
        ranked = members[np.argsort(_mixed(pictures.keys[members], 0x5B117), kind="stable")]
        held_out[ranked[: num_held_out(len(members), fraction)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def num_held_out(num_pictures: int, fraction: float) -> int:
    """How many of a class's pictures `split_stratified` holds out."""
    return max(0, min(round(num_pictures * fraction), num_pictures - 1))


# order and chance: functions of (seed, epoch, picture)


def _mixed(keys: Keys, salt: int) -> Keys:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014) of each key, for one salt."""
    with np.errstate(over="ignore"):
        salted = np.array([salt], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = keys + _finalised(salted)
        return _finalised(z)


def _finalised(z: Keys) -> Keys:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _chance(pictures: Pictures, seed: int, epoch: int, use: int) -> Keys:
    """64 random bits for each picture: its draw at this seed and epoch, for one use."""
    return _mixed(_mixed(pictures.keys, seed), epoch * 4 + use)


def epoch_order(pictures: Pictures, seed: int, epoch: int) -> Indices:
    """The order in which the pictures train in an epoch, a permutation of their indices."""
    return np.argsort(_chance(pictures, seed, epoch, 0), kind="stable")


def epoch_flips(pictures: Pictures, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which pictures are flipped in an epoch, by their indices."""
    draws = _chance(pictures, seed, epoch, 1)
    return np.asarray(draws >= np.uint64(1 << 63))


def epoch_augment_seeds(pictures: Pictures, seed: int, epoch: int) -> Keys:
    """Each picture's seed for random augmentation in an epoch, by their indices."""
    return _chance(pictures, seed, epoch, 2)


def batch_bounds(num_pictures: int, batch_size: int) -> list[tuple[int, int]]:
    """Start and end of each batch; a last batch of a single picture joins the one before."""
    starts = list(range(0, num_pictures, batch_size))
    if len(starts) > 1 and num_pictures - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_pictures], strict=True))


# decoding


def decode(path: Path, image_size: int) -> Tensor:
    """A picture as uint8 RGB, (image_size, image_size, 3), its aspect not kept.

    Bilinear with antialiasing, as torchvision's Resize does it. Grey, palette, alpha, CMYK and
    16-bit pictures become 8-bit RGB. Raises `DataError`, naming the path.
    """
    with _quiet():
        return _decode(path, image_size)


def _decode(path: Path, image_size: int) -> Tensor:
    try:
        image_CHW = _read_rgb(path)
        size = [image_size, image_size]
        resized: Tensor = v2.functional.resize(image_CHW, size, antialias=True)
        return resized.permute(1, 2, 0).contiguous()
    except Exception as error:  # decoders raise whatever they like; here each means the same
        if is_out_of_memory(error) or shortage(error):  # which is not the picture's fault
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = _DECODER_PLACE.sub("", reason).replace(f" {str(path)!r}", "")
        raise DataError(f"{one_line(path)} can't be read as a picture: {reason[:200]}") from None


_DECODER_PLACE = re.compile(r"^decode_jpeg, \S+, ")


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns below its own limit, and of odd metadata.

    Python's filters belong to the process: set them before threads start, never in them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read_rgb(path: Path) -> Tensor:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        raise ValueError("it is no regular file")
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


_strong = lru_cache(maxsize=1)(
    lambda size: v2.Compose(
        [
            v2.RandomResizedCrop((size, size), scale=(0.35, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.TrivialAugmentWide(),
        ]
    )
)


def augment_strongly(image_HWC: Tensor, seed: int) -> Tensor:
    """Random resized crop, flip and TrivialAugment (https://arxiv.org/abs/2103.10158).

    uint8 in and out, the size stays. The draw follows from `seed` alone; torch's own generator is
    left as it was.
    """
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed % 2**63)
        augmented: Tensor = _strong(image_HWC.shape[0])(image_HWC.permute(2, 0, 1))
    finally:
        torch.set_rng_state(state)
    return augmented.permute(1, 2, 0)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_many(
    paths: Sequence[Path], image_size: int, each: Callable[[int, Tensor | DataError], None]
) -> None:
    """Decode in parallel; `each` gets an index and its picture, or why there is none."""

    def attempt(index: int) -> None:
        try:
            each(index, _decode(paths[index], image_size))
        except DataError as error:
            each(index, error)

    threads_before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_cores(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with _quiet():
            for _ in pool.map(attempt, range(len(paths))):
                pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads_before)


# decoded pictures


Progress = Callable[[str, int], Callable[[], None]]
"""(what, total) -> a function that is called once for each one done."""


def no_progress(what: str, total: int) -> Callable[[], None]:
    return lambda: None


_ADVICE = "repair or remove it, or pass --skip_unreadable"


class Images:
    """The decoded pictures of a split, by their indices."""

    def __init__(self, pictures: Pictures, image_size: int, stored_NHWC: Any | None) -> None:
        self.pictures = pictures
        self.image_size = image_size
        self._stored_NHWC = stored_NHWC

    def batch(self, indices: Indices) -> Tensor:
        """uint8, (B, H, W, 3). Raises `DataError` where a picture can't be read."""
        if self._stored_NHWC is not None:
            return torch.from_numpy(self._stored_NHWC.take(self.pictures.rows[indices], axis=0))
        images: list[Tensor | None] = [None] * len(indices)

        def keep(i: int, image: Tensor | DataError) -> None:
            if isinstance(image, DataError):
                raise DataError(f"{image}; {_ADVICE}")
            images[i] = image

        decode_many([self.pictures.path(i) for i in indices], self.image_size, keep)
        return torch.stack([image for image in images if image is not None])


def open_images(
    pictures: Pictures,
    image_size: int,
    skip_unreadable: bool,
    cache: Cache | None,
    progress: Progress = no_progress,
) -> tuple[Images, list[str]]:
    """A split's decoded pictures, from the folder's store, and the names it goes on without.

    Raises `DataError` naming a picture that can't be read, unless `skip_unreadable`. Without a
    cache, pictures are decoded each time they are asked for.
    """
    stored = None
    unreadable: dict[str, str] = {}
    if cache is not None:
        stored, unreadable = _open_store(
            find_pictures(pictures.folder), image_size, cache, progress
        )
    if stored is None and skip_unreadable:
        unreadable = _find_unreadable(pictures, image_size, progress)
    affected = [name for name in pictures.names if name in unreadable]
    if affected and not skip_unreadable:
        more = f" (and {len(affected) - 1} more)" if len(affected) > 1 else ""
        raise DataError(f"{unreadable[affected[0]]}{more}; {_ADVICE}")
    if affected:
        lost = set(affected)
        pictures = pictures.subset(
            np.array([i for i, name in enumerate(pictures.names) if name not in lost], dtype=int)
        )
        _check_all_classes_left(pictures)
    return Images(pictures, image_size, stored), affected


def _check_all_classes_left(pictures: Pictures) -> None:
    empty = set(range(len(pictures.class_names))) - set(pictures.labels.tolist())
    if empty:
        listed = ", ".join(pictures.class_names[label] for label in sorted(empty))
        raise DataError(f"{pictures.folder}: no readable picture is left of class {listed}")


def _open_store(
    folder: Pictures, image_size: int, cache: Cache, progress: Progress
) -> tuple[Any | None, dict[str, str]]:
    """The folder's decoded pictures, (N, H, W, 3), and why some are missing, by name."""

    def build(images_NHWC: Any) -> dict[str, str]:
        done = progress(f"decoding {folder.folder.name}/", len(folder))
        unreadable: dict[str, str] = {}

        def store(index: int, image: Tensor | DataError) -> None:
            if isinstance(image, DataError):
                unreadable[folder.names[index]] = str(image)
            else:
                images_NHWC[index] = image.numpy()
            done()

        decode_many([folder.path(i) for i in range(len(folder))], image_size, store)
        return unreadable

    entry = cache.open_or_build(
        "images",
        {
            "files": folder.identity,
            "image_size": image_size,
            "decoder": [torchvision.__version__, PIL.__version__],
        },
        (len(folder), image_size, image_size, 3),
        "uint8",
        build,
    )
    return (entry.array, dict(entry.notes)) if entry else (None, {})


def _find_unreadable(pictures: Pictures, image_size: int, progress: Progress) -> dict[str, str]:
    done = progress(f"reading {pictures.folder.name}/", len(pictures))
    unreadable: dict[str, str] = {}

    def note(index: int, image: Tensor | DataError) -> None:
        if isinstance(image, DataError):
            unreadable[pictures.names[index]] = str(image)
        done()

    decode_many([pictures.path(i) for i in range(len(pictures))], image_size, note)
    return unreadable


# batches


class Batch(NamedTuple):
    """What one step sees."""

    inputs: Tensor
    """uint8 pictures, (B, H, W, 3), where `part` is the network's first; else activations."""
    flips: Tensor | None
    """Positions in the batch of the pictures still to be flipped, int64."""
    labels: Tensor
    """int64, (B,)."""
    part: str
    """The part of the network that `inputs` enter."""


class Epoch:
    """The batches of one epoch, made as they are asked for. `fetch` makes the inputs."""

    def __init__(
        self,
        pictures: Pictures,
        order: Indices,
        batch_size: int,
        part: str,
        fetch: Callable[[Indices], tuple[Tensor, Tensor | None]],
    ) -> None:
        self._pictures = pictures
        self._order = order
        self._bounds = batch_bounds(len(order), batch_size)
        self._part = part
        self._fetch = fetch

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: int) -> Batch:
        start, end = self._bounds[index]
        indices = self._order[start:end]
        inputs, flips = self._fetch(indices)
        return Batch(inputs, flips, torch.from_numpy(self._pictures.labels[indices]), self._part)

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))
