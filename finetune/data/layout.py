"""A data set on disk: `train/CLASS/*`, `val/CLASS/*` and optionally `test/CLASS/*`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from finetune.system.errors import DataError
from finetune.system.files import walk

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
)
"""The suffixes that torchvision's ImageFolder reads; other files are ignored."""

SPLITS = ("train", "val", "test")


def is_picture_name(name: str) -> bool:
    """Whether a file of this name is read as a picture: by its suffix, unless it is hidden."""
    file = PurePosixPath(name).name
    return not file.startswith(".") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename} can't be read: {error.strerror}") from None


@_readable()
def find_data_dir(data_dir: Path) -> Path:
    """The folder that holds train/ and val/: `data_dir`, or one at most two levels below it.

    Raises `DataError` if there is none or more than one.
    """
    if not data_dir.is_dir():
        what = "is not a folder" if data_dir.exists() else "does not exist"
        raise DataError(
            f"data_dir: {data_dir} {what}. Pass a folder with train/CLASS/* and val/CLASS/*, or "
            f"download iNaturalist-12K: python -m finetune download --data_dir {data_dir}"
        )
    for places in ([data_dir], data_dir.glob("[!.]*"), data_dir.glob("[!.]*/[!.]*")):
        found = [p for p in sorted(places) if all((p / s).is_dir() for s in ("train", "val"))]
        if len(found) > 1:
            several = ", ".join(map(str, found))
            raise DataError(f"data_dir: {data_dir} holds several data sets: {several}; pass one")
        if found:
            return found[0]
    existing = ", ".join(sorted(p.name for p in data_dir.iterdir())[:8]) or "nothing"
    raise DataError(
        f"data_dir: {data_dir} holds no train/ and val/ folders (found: {existing}). Each needs "
        "one folder per class that holds the class's pictures"
    )


@_readable()
def class_dirs(split_dir: Path) -> list[Path]:
    """A split's class folders by name, without hidden ones. Raises `DataError`."""
    return sorted(p for p in split_dir.iterdir() if p.is_dir() and not p.name.startswith("."))


def files_of_class(class_dir: Path) -> Iterator[str]:
    """Names, relative to the class, of its files, without hidden ones and links to folders.

    Raises `DataError` for a folder that can't be read; its pictures would silently be missing.
    """
    with _readable():
        for place, _, files in walk(class_dir):
            yield from ((place / name).relative_to(class_dir).as_posix() for name in files)


def pictures_of_class(class_dir: Path) -> list[str]:
    """Names, relative to the class, of its picture files, sorted."""
    return sorted(name for name in files_of_class(class_dir) if is_picture_name(name))
