"""Unpack a data set from a zip archive into a folder with a manifest."""

import hashlib
import json
import os
import shutil
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.layout import is_picture_name
from finetune.datasets.fetch import check_free_space
from finetune.datasets.zip_safety import (
    ArchiveError,
    UnexpectedArchive,
    encoding_of_names,
    select_members,
)
from finetune.system.errors import DataError
from finetune.system.progress import bar

MANIFEST = "manifest.json"
Counts = Mapping[str, Mapping[str, int]]  # of pictures, by split and class


@dataclass(frozen=True)
class ExpectedDataset:
    """What the archive of a known data set must hold."""

    class_names: frozenset[str]
    num_pictures: Mapping[str, int]  # by split

    def difference(self, counts: Counts) -> str | None:
        """How the counts differ from the expected ones; None if they do not."""
        for split, number in self.num_pictures.items():
            if split not in counts:
                return f"it has no pictures in {split}/"
            found = counts[split]
            if differing := sorted(found.keys() ^ self.class_names):
                return f"{split}/ has other classes: {', '.join(differing[:5])}"
            if sum(found.values()) != number:
                return f"{split}/ must have {number} pictures, but has {sum(found.values())}"
        return None


def unpack(
    archive: Path, data_dir: Path, source: str, expected: ExpectedDataset | None = None
) -> Counts:
    """Unpack train/, val/ and test/ of an archive to `data_dir`, which must be missing or empty.

    The splits keep their names in the archive, such as validation/. Folders around them and files
    beside them are left out. Returns the number of pictures. Raises `ArchiveError`, or `DataError`
    if a file cannot be read or written; then nothing is left.
    """
    unpacking = data_dir.with_name(f".{data_dir.name}.unpacking")
    shutil.rmtree(unpacking, ignore_errors=True)
    try:
        with _open_zip(archive) as opened:
            members = select_members(opened.infolist(), archive.stat().st_size)
            counts = count_pictures(members)
            if expected and (difference := expected.difference(counts)):
                raise UnexpectedArchive(f"is not the expected data set: {difference}")
            check_free_space(data_dir.parent, sum(m.file_size + 4096 for m in members.values()))
            files = _extract(opened, members, unpacking)
        manifest = {
            "source": source,
            "archive_bytes": archive.stat().st_size,
            "archive_sha256": sha256(archive),
            "pictures": counts,
            "files": files,
        }
        # The manifest is written last, so its existence means that the data is complete.
        (unpacking / MANIFEST).write_text(json.dumps(manifest, indent=0), encoding="utf-8")
        unpacking.rename(data_dir)
        return counts
    except ArchiveError as error:
        raise type(error)(f"{archive}: {error}") from None
    except OSError as error:
        reason = f"{error.filename or data_dir}: {error.strerror or error}"
        raise DataError(f"{reason}; cannot unpack {archive}") from None
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def _open_zip(archive: Path) -> zipfile.ZipFile:
    with archive.open("rb") as file:
        start = file.read(60)
    try:
        opened = zipfile.ZipFile(archive)
        if encoding := encoding_of_names(opened.infolist()):
            opened.close()
            opened = zipfile.ZipFile(archive, metadata_encoding=encoding)
    except Exception as error:  # of many types, for damaged archives
        reason = f"is damaged or not a zip file ({error}); it starts with {start!r}"
        raise ArchiveError(reason) from None
    if encoding:
        print(f"{archive}: names that are not marked as UTF-8 are read as {encoding}")
    if any("\\" in info.filename for info in opened.infolist()):
        print(f"{archive}: backslashes in names are read as separators of folders")
    for info in opened.infolist():  # after decoding: a character of GBK may have the byte of \
        info.filename = info.filename.replace("\\", "/")
    return opened


def _extract(
    opened: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], folder: Path
) -> dict[str, tuple[int, str]]:
    """Write the members; return their sizes and hashes. Raises `ArchiveError` for a wrong CRC."""
    targets = {info.filename: name for name, info in members.items()}
    infos = [info for info in opened.infolist() if not info.is_dir()]
    done = bar(f"unpacking {opened.filename}", len(infos))
    files: dict[str, tuple[int, str]] = {}
    for info in infos:
        name = targets.get(info.filename)
        # All others are read too: a picture with a damaged name may be among them.
        target = folder / name if name else Path(os.devnull)
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with target.open("xb" if name else "wb") as file:
            for block in _content(opened, info):
                digest.update(block)
                file.write(block)
            if name:
                files[name] = (file.tell(), digest.hexdigest())
        done()
    return files


def _content(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with opened.open(info) as member:
            while block := member.read(1 << 20):
                yield block
    except Exception as error:  # of many types, a wrong CRC among them
        raise ArchiveError(f"is damaged in {info.filename!r}: {error}") from None


def read_manifest(data_dir: Path) -> Mapping[str, Any] | None:
    """The manifest that `unpack` wrote; None if there is none. Raises `DataError`."""
    path, types = data_dir / MANIFEST, {"source": str, "pictures": dict, "files": dict}
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
        if {key: type(manifest[key]) for key in types} == types:
            return dict(manifest)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{path} is damaged or of another program; pass another --data_dir")


def count_pictures(names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Number of pictures among SPLIT/CLASS/... by split and class."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name in names:
        parts = name.split("/")
        if len(parts) > 2 and is_picture_name(name):
            counts[parts[0]][parts[1]] += 1
    return {split: dict(sorted(classes.items())) for split, classes in sorted(counts.items())}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
