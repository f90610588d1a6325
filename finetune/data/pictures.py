"""The labelled pictures of a split's folder, ordered by name, without their content."""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from finetune.data.layout import list_pictures, nfc
from finetune.system.array_store import digest
from finetune.system.errors import DataError

Indices = np.ndarray[Any, np.dtype[np.int64]]
Keys = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures of one folder, in the order of their names."""

    folder: Path
    files: tuple[str, ...]
    """Paths below the folder, with forward slashes, as the file system spells them."""
    labels: Indices
    class_names: tuple[str, ...]
    rows: Indices
    """The index of each in `whole`, and so in the cache."""
    name: str
    """train, val or test; `all` for pictures without splits on disk."""
    labels_file: Path | None = None
    """Where the labels are, if not in the paths."""
    left_out: tuple[str, ...] = ()
    """Other files of the folder, which are not read."""
    notes: tuple[str, ...] = ()
    """What is unusual about them, one line each."""
    parent: "Pictures | None" = None
    """The pictures that these were chosen from."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def whole(self) -> "Pictures":
        """All pictures of the folder or labels file, which the cache holds together."""
        return self.parent.whole if self.parent else self

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The files in Unicode's NFC: a picture's identity on every machine."""
        return tuple(map(nfc, self.files))

    def path(self, index: int) -> Path:
        return self.folder / self.files[index]

    @property
    def paths(self) -> list[Path]:
        return [self.path(i) for i in range(len(self))]

    def subset(self, indices: Indices) -> Self:
        files = tuple(self.files[i] for i in indices)
        labels, rows = self.labels[indices], self.rows[indices]
        return replace(self, files=files, labels=labels, rows=rows, parent=self)

    def together_with(self, other: "Pictures") -> "Pictures":
        """These and the others, which have the same classes."""
        if other.whole is self.whole:
            return self.whole.subset(np.union1d(self.rows, other.rows))
        folder = Path(os.path.commonpath([self.folder, other.folder]))
        both = (self, other)
        files = [path.relative_to(folder).as_posix() for each in both for path in each.paths]
        labels = np.concatenate([each.labels for each in both])
        rows = np.arange(len(files))
        return replace(
            self, folder=folder, files=tuple(files), labels=labels, rows=rows, parent=None
        )

    @cached_property
    def keys(self) -> Keys:
        """A number for each picture that depends on its name alone."""
        hashes = (hashlib.blake2b(os.fsencode(n), digest_size=8).digest() for n in self.names)
        return np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64)

    @cached_property
    def identity(self) -> str:
        """A hash that changes when a file's content does, on this machine, without reading it.

        It includes change times (ctime): every write updates them, and no program can reset them.
        """
        stamp = ("st_size", "st_mtime_ns", "st_ctime_ns")
        paths = [self.folder / file for file in self.files]
        return digest([[str(path), *_file_status(path, *stamp)] for path in paths])

    @cached_property
    def sizes(self) -> list[tuple[str, int]]:
        """SPLIT/CLASS/FILE and its size in bytes, -1 for a broken link."""
        sizes = [(_file_status(self.folder / file, "st_size") or [-1])[0] for file in self.files]
        names = [f"{self.name}/{name}" for name in self.names]
        if self.labels_file:
            names = [f"{n}={self.class_names[i]}" for n, i in zip(names, self.labels, strict=True)]
        return list(zip(names, sizes, strict=True))


def _file_status(path: Path, *fields: str) -> list[int]:
    """These fields of `os.stat`; none for a broken link, whose reading will raise."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [getattr(found, field) for field in fields]


def find_pictures(folder: Path, name: str = "", allow_empty: bool = False) -> Pictures:
    """The pictures below `folder`/CLASS; a class folder without pictures is no class.

    `name` is train, val, test or all. Raises `DataError` if there are no pictures, and for a class
    of train/ without pictures unless `allow_empty`.
    """
    listing = list_pictures(folder)
    found = {class_name: files for class_name, files in listing.files.items() if files}
    empty = [class_name for class_name, files in listing.files.items() if not files]
    if found and empty and name == "train" and not allow_empty:
        raise DataError(f"{folder / empty[0]} is a class without pictures; add some or remove it")
    if not found:
        raise DataError(
            f"{folder} holds no class folders with pictures; each class needs a folder with its "
            "pictures, or pass --labels FILE.csv"
        )
    files = tuple(file for files in found.values() for file in files)
    labels = np.repeat(np.arange(len(found)), list(map(len, found.values())))
    return Pictures(
        folder,
        files,
        labels,
        tuple(found),
        np.arange(len(files)),
        name or folder.name,
        left_out=tuple(listing.left_out),
        notes=tuple(listing.notes),
    )
