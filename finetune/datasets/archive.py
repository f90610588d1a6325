"""A zip archive from anywhere -> a folder with a manifest, whole or not at all.

Turns an archive whose directory was found harmless into `train/CLASS/*` and `val/CLASS/*`, and
checks every member's CRC. Knows nothing about where archives come from.

    >>> unpack(Path("nature_12K.zip"), Path("data/inaturalist_12K"), "the web")  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from finetune.datasets.zip_safety import (
    BAD_ZIP,
    LIMITS,
    Damaged,
    Expected,
    Foreign,
    Limits,
    chosen_members,
    count_pictures,
    directory_of,
    open_zip,
    spans_of,
)
from finetune.system.errors import DataError

MANIFEST = "manifest.json"
BLOCK_BYTES = 1 << 20
Progress = Callable[[str, int], Callable[[], None]]


def unpack(
    archive: Path,
    into: Path,
    source: str,
    expected: Expected | None = None,
    limits: Limits = LIMITS,
    progress: Progress = lambda what, total: lambda: None,
) -> None:
    """Unpack the data set in a zip archive to `into`, which must not exist or be empty.

    Folders around train/ and val/ are left out, and so is whatever stands beside them. Raises
    `Refused`, or `DataError` where `into` can't be written; then nothing is left.
    """
    aside = into.with_name(f".{into.name}.unpacking")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with open_zip(archive) as opened:
            chosen = chosen_members(opened, archive, limits)
            counts = count_pictures(chosen)
            if expected and (difference := expected.difference(counts)):
                raise Foreign(
                    f"{archive} isn't the data set it should be: {difference}",
                    [directory_of(opened, archive)],
                )
            _check_room(into, sum(m.file_size + 4096 for m in chosen.values()))
            files = _extract(opened, archive, chosen, aside, progress)
        manifest = {
            "source": source,
            "archive_bytes": archive.stat().st_size,
            "archive_sha256": sha256(archive),
            "pictures": counts,
            "files": files,
        }
        # The manifest is written last, so its existence means that the data is whole.
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=0), encoding="utf-8")
        aside.rename(into)
    except OSError as error:
        raise DataError(f"{into} can't be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_manifest(data_dir: Path) -> Mapping[str, Any] | None:
    """The manifest of a data set that `unpack` made, or None. Raises `DataError`."""
    path = data_dir / MANIFEST
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read ({error}); remove {data_dir} and fetch it") from None
    kinds = {"source": str, "pictures": dict, "files": dict}
    if not isinstance(manifest, dict) or any(type(manifest.get(k)) is not kinds[k] for k in kinds):
        raise DataError(f"{path} was not written by this program; move it elsewhere")
    return manifest


def changed_files(data_dir: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files that are gone or of another size than the manifest says."""
    return [name for name, (size, _) in manifest["files"].items() if _size(data_dir / name) != size]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def existing_parent(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _check_room(into: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(existing_parent(into)).free
    if free < num_bytes:
        raise DataError(
            f"{into}: unpacking needs {num_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB; "
            "make room and run the same command again"
        )


# unpacking


def _extract(
    opened: zipfile.ZipFile,
    archive: Path,
    chosen: Mapping[str, zipfile.ZipInfo],
    aside: Path,
    progress: Progress,
) -> dict[str, tuple[int, str]]:
    """Write the files; their sizes and hashes. Raises `Damaged`, naming all that are."""
    names = {info.filename: name for name, info in chosen.items()}
    members = [info for info in opened.infolist() if not info.is_dir()]
    done = progress(f"unpacking {archive.name}", len(members))
    files: dict[str, tuple[int, str]] = {}
    damaged: dict[str, str] = {}
    for info in members:
        try:
            if name := names.get(info.filename):
                target = aside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    files[name] = _copy(opened, info, file)
            else:  # a picture whose name is damaged may be among what isn't wanted
                _copy(opened, info, None)
        except _BadMember as error:
            damaged[info.filename] = str(error)
        done()
    if damaged:
        first, reason = next(iter(damaged.items()))
        more = f" and {len(damaged) - 1} more members" if len(damaged) > 1 else ""
        spans = [*spans_of(opened, damaged), directory_of(opened, archive)]
        raise Damaged(f"{archive} is damaged in {first!r}{more}: {reason}", spans)
    return files


class _BadMember(Exception):
    """One member's bytes can't be right."""


def _copy(
    opened: zipfile.ZipFile, info: zipfile.ZipInfo, file: IO[bytes] | None
) -> tuple[int, str]:
    """One member to a file: its size and sha256. zipfile checks the CRC at its end."""
    found = hashlib.sha256()
    num_bytes = 0
    try:
        member = opened.open(info)
    except BAD_ZIP as error:
        raise _BadMember(str(error)) from None
    with member:
        while True:
            try:
                block = member.read(BLOCK_BYTES)
            except BAD_ZIP as error:
                raise _BadMember(str(error)) from None
            if not block:
                break
            num_bytes += len(block)
            found.update(block)
            if file:
                file.write(block)
    if num_bytes != info.file_size:
        raise _BadMember(f"{num_bytes} bytes instead of {info.file_size}")
    return num_bytes, found.hexdigest()
