"""What a data set looks like on disk: `train/CLASS/*`, `val/CLASS/*`, perhaps `test/CLASS/*`.

Turns a folder into the place of its splits, their classes and the names of their pictures. Knows
nothing about what is in a picture, and imports no torch.

    >>> find_data_dir(Path("data"))  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from finetune.system.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
)
"""torchvision's ImageFolder reads these; other files are ignored."""

PICTURE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF")
"""What a picture's content may be, as Pillow names it. For others Pillow has more dangerous
readers: an EPS would be handed to Ghostscript, whatever the file is called."""

SPLITS = ("train", "val", "test")


def is_picture_name(name: str) -> bool:
    """Whether a run would read a file of this name: by its suffix, hidden ones left out."""
    file = PurePosixPath(name).name
    return not file.startswith(".") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def find_data_dir(data_dir: Path) -> Path:
    """The folder that holds train/ and val/: `data_dir`, or one at most two levels below it.

    Raises `DataError` when there is none, or more than one.
    """
    try:
        return _find_data_dir(data_dir)
    except OSError as error:
        raise _unreadable(error) from None


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{error.filename} can't be read: {error.strerror}")


def _find_data_dir(data_dir: Path) -> Path:
    if not data_dir.is_dir():
        what = "is no folder" if data_dir.exists() else "does not exist"
        raise DataError(
            f"data_dir: {data_dir} {what}. Pass --data_dir a folder that holds "
            "train/CLASS/* and val/CLASS/*, or fetch iNaturalist-12K: python -m finetune download "
            f"--data_dir {data_dir}"
        )
    for places in ([data_dir], data_dir.glob("[!.]*"), data_dir.glob("[!.]*/[!.]*")):
        found = [place for place in sorted(places) if _has_splits(place)]
        if len(found) > 1:
            raise DataError(
                f"data_dir: {data_dir} holds several data sets: {', '.join(map(str, found))}; "
                "pass one of them"
            )
        if found:
            return found[0]
    held = sorted(p.name for p in data_dir.iterdir())[:8]
    raise DataError(
        f"data_dir: {data_dir} holds no train/ and val/ folders (found: "
        f"{', '.join(held) or 'nothing'}). Each needs a folder a class, with its pictures in it"
    )


def _has_splits(place: Path) -> bool:
    return (place / "train").is_dir() and (place / "val").is_dir()


def class_dirs(split_dir: Path) -> list[Path]:
    """A split's class folders by name, hidden ones left out. Raises `DataError`."""
    try:
        return sorted(
            (p for p in split_dir.iterdir() if p.is_dir() and not p.name.startswith(".")),
            key=lambda p: p.name,
        )
    except OSError as error:
        raise _unreadable(error) from None


def files_of_class(class_dir: Path) -> Iterator[str]:
    """Names, relative to the class, of its files; hidden ones and links to folders are left out.

    Raises `DataError` for a folder that can't be read: its pictures would be missing in silence.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(error)

    for place, dirs, files in os.walk(class_dir, onerror=refuse):
        dirs[:] = [d for d in dirs if not d.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield Path(place, name).relative_to(class_dir).as_posix()


def pictures_of_class(class_dir: Path) -> list[str]:
    """Names, relative to the class, of its picture files, in order."""
    return sorted(name for name in files_of_class(class_dir) if is_picture_name(name))
