"""A data set's folders on disk: its splits, its classes, and the files of each class.

Notes, one line each, list what is left out or read in an unusual way.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

from finetune.data.formats import has_picture_content
from finetune.system.errors import DataError
from finetune.system.files import is_hidden_folder, walk
from finetune.system.text import listed, num, one_line

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff"}
    | {".webp", ".gif", ".avif", ".heic", ".heif"}
)
"""A file with one of these suffixes is a picture, or an error. Others are judged by content."""

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""The names of each split's folder, in any case."""


def nfc(name: str) -> str:
    """A name in Unicode's composed form; macOS writes decomposed ones."""
    return unicodedata.normalize("NFC", name)


def is_picture_name(name: str) -> bool:
    """Whether a file of this name is a picture by its suffix, and not hidden."""
    file = PurePosixPath(name).name
    return not file.startswith(".") and suffix_of(file) in IMAGE_SUFFIXES


def is_picture(path: Path) -> bool:
    """Whether a file is read as a picture: by its suffix, or else by its content."""
    return is_picture_name(path.name) or has_picture_content(path)


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


@contextmanager
def readable() -> Iterator[None]:
    """Within it, an `OSError` becomes a `DataError` that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename} can't be read: {error.strerror}") from None


@dataclass(frozen=True)
class Layout:
    """Where a data set's splits are."""

    data_dir: Path
    folders: dict[str, Path]
    """By split. Without train, there are none: `data_dir` itself holds the class folders."""
    notes: tuple[str, ...] = ()


@readable()
def find_layout(data_dir: Path) -> Layout:
    """The splits below `data_dir`, or below one folder at most two levels deeper.

    Without any split, one folder of class folders. Raises `DataError` if there is none, or more
    than one.
    """
    if not data_dir.is_dir():
        what = "is not a folder" if data_dir.exists() else "does not exist"
        raise DataError(
            f"data_dir: {data_dir} {what}. Pass a folder with train/CLASS/* and val/CLASS/*, or "
            f"download iNaturalist-12K: python -m finetune download --data_dir {data_dir}"
        )
    levels = [[data_dir], subfolders(data_dir)]
    levels.append([inner for folder in levels[1] for inner in subfolders(folder)])
    for is_kind in (_has_train, _holds_classes):
        for places in levels:
            found = [p for p in places if is_kind(p) and (p == data_dir or not split_of(p.name))]
            if len(found) > 1:
                several = listed([str(place) for place in found])
                raise DataError(
                    f"data_dir: {data_dir} holds several data sets: {several}; pass one, or name "
                    "its splits train, val and test"
                )
            if found:
                return _layout_of(found[0])
    existing = listed([path.name for path in sorted(data_dir.iterdir())], 8) or "nothing"
    raise DataError(
        f"data_dir: {data_dir} holds no train/CLASS/ folders and no class folders (found: "
        f"{existing}). Put the pictures into train/CLASS/ and val/CLASS/, or into one folder per "
        "class, or pass --labels FILE.csv"
    )


def split_of(name: str) -> str | None:
    """The split whose folder has this name; None of any other name."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder by name, without hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not is_hidden_folder(p.name))


def _split_folders(folder: Path) -> dict[str, list[Path]]:
    found = subfolders(folder)
    return {split: [p for p in found if split_of(p.name) == split] for split in SPLITS}


def _has_train(folder: Path) -> bool:
    """Whether it has a train/ with folders; one with pictures alone may be the class of trains."""
    return any(map(subfolders, _split_folders(folder)["train"]))


def _holds_classes(folder: Path) -> bool:
    """Whether at least two of its folders, besides splits, have pictures directly in them."""
    splits = {place for places in _split_folders(folder).values() for place in places}
    classes = (place for place in subfolders(folder) if place not in splits)
    return len([*islice(filter(_has_pictures, classes), 2)]) == 2


def _has_pictures(folder: Path) -> bool:
    return next(_pictures_directly_in(folder), None) is not None


def _pictures_directly_in(folder: Path) -> Iterator[str]:
    """Names of the picture files in a folder itself."""
    for path in folder.iterdir():
        if not path.name.startswith(".") and path.is_file() and is_picture(path):
            yield path.name


def _layout_of(folder: Path) -> Layout:
    splits = _split_folders(folder)
    if not _has_train(folder):
        return Layout(folder, {}, (f"{folder} has no splits; its folders are the classes",))
    for split, places in splits.items():
        if len(places) > 1:
            names = listed([f"{place.name}/" for place in places])
            raise DataError(f"{folder} holds {names}; keep or rename one, as {split}/")
    folders = {split: places[0] for split, places in splits.items() if places}
    notes = [f"{p.name}/ is read as {s}/" for s, p in folders.items() if p.name != s]
    return Layout(folder, folders, tuple(notes))


@dataclass
class Listing:
    """The files of one split, or of a folder of classes."""

    folder: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    """Paths of pictures below the folder, with forward slashes, by class in NFC, sorted."""
    left_out: list[str] = field(default_factory=list)
    """Other files in class folders, and pictures in no class folder."""
    notes: list[str] = field(default_factory=list)


def list_pictures(folder: Path) -> Listing:
    """The pictures below `folder`/CLASS and what is unusual about them.

    Raises `DataError` for a folder that can't be read; its pictures would silently be missing.
    """
    listing, spellings = Listing(folder), Counter[str]()
    with readable():
        classes = subfolders(folder)
        loose = sorted(_pictures_directly_in(folder))
    for class_dir in classes:
        spellings[nfc(class_dir.name)] += 1
        pictures, others = _files_of_class(class_dir)
        listing.files.setdefault(nfc(class_dir.name), []).extend(pictures)
        listing.left_out += others
        listing.notes += _notes_on_nested(class_dir, pictures, {nfc(c.name) for c in classes})
    for name, count in spellings.items():
        listing.files[name].sort()
        if count > 1:
            listing.notes.append(
                f"{one_line(name)}: {count} folders with this name in different Unicode forms are "
                "one class"
            )
    if listing.left_out:
        listing.notes.append(f"{folder.name}/: left out {by_suffix(listing.left_out)}")
    if loose and classes:
        listing.left_out += loose
        listing.notes.append(
            f"{folder.name}/: {num(loose, 'picture')} in no class folder left out, such as "
            f"{one_line(loose[0])}"
        )
    return listing


def _files_of_class(class_dir: Path) -> tuple[list[str], list[str]]:
    """The class's pictures and its other files, relative to the split's folder."""
    pictures: list[str] = []
    others: list[str] = []
    with readable():
        for place, _, files in walk(class_dir, follow_links=True):
            for file in files:
                path = place / file
                name = path.relative_to(class_dir.parent).as_posix()
                (pictures if is_picture(path) else others).append(name)
    return pictures, others


def _notes_on_nested(class_dir: Path, files: Sequence[str], classes: set[str]) -> list[str]:
    """A line for each folder directly within a class."""
    nested = Counter(file.split("/")[1] for file in files if file.count("/") > 1)
    notes = []
    for name, count in sorted(nested.items()):
        place = one_line(f"{class_dir.parent.name}/{class_dir.name}/{name}/")
        why = " (a class has that name too)" if nfc(name) in classes else ""
        notes.append(f"{place}: {num(count, 'picture')} read as {one_line(class_dir.name)}{why}")
    return notes


def by_suffix(files: Sequence[str]) -> str:
    """`30 .txt and 2 without suffix`."""
    counts = Counter(suffix_of(file) for file in files)
    return listed([f"{n} {one_line(s) or 'without suffix'}" for s, n in counts.most_common()])
