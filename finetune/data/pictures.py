"""The labelled pictures of a split's folder, ordered by name, without their content."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.layout import IMAGE_SUFFIXES, class_dirs, pictures_of_class
from finetune.system.array_store import digest
from finetune.system.errors import DataError

Indices = np.ndarray[Any, np.dtype[np.int64]]
Keys = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures of one folder, in the order of their names."""

    folder: Path
    names: tuple[str, ...]
    """CLASS/FILE with a forward slash; identifies a picture on every machine."""
    labels: Indices
    class_names: tuple[str, ...]
    rows: Indices
    """The index of each among all pictures of the folder, and so in the cache."""

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
        """A number for each picture that depends on its name alone."""
        hashes = (hashlib.blake2b(os.fsencode(n), digest_size=8).digest() for n in self.names)
        return np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64)

    @cached_property
    def identity(self) -> str:
        """A hash that changes when a file's content does, on this machine, without reading it.

        It includes change times (ctime): every write updates them, and no program can reset them.
        """
        return digest([_file_stamp(str(self.folder / name)) for name in self.names])

    @cached_property
    def sizes(self) -> list[tuple[str, int]]:
        """SPLIT/CLASS/FILE and its size in bytes, -1 for a broken link."""
        split = self.folder.name
        return [(f"{split}/{name}", _num_bytes(self.folder / name)) for name in self.names]


def _file_stamp(path: str) -> list[object]:
    try:
        found = os.stat(path)
    except OSError:  # a broken link; reading it will raise
        return [path]
    return [path, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def find_pictures(folder: Path) -> Pictures:
    """The pictures below `folder`/CLASS, without hidden and other files.

    Raises `DataError` for a folder without classes and a class without pictures.
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
