"""A zip archive from anywhere -> a folder with a manifest, whole or not at all.

Turns an archive into `train/CLASS/*` and `val/CLASS/*` after its names, links, sizes and layout
were looked at, and every member's CRC was checked. Knows nothing about where archives come from.

    >>> unpack(Path("nature_12K.zip"), Path("data/inaturalist_12K"), "the web")  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import stat
import struct
import zipfile
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from finetune.errors import DataError
from finetune.layout import is_picture_name

MANIFEST = "manifest.json"
BLOCK_BYTES = 1 << 20
Span = tuple[int, int]
"""Where bytes stand in a file: from the first to before the second."""

_BAD_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OSError,
)
_TAIL_BYTES = 4 << 20  # holds the directory of archives with some 40,000 members


class Refused(DataError):
    """An archive that isn't unpacked.

    `spans` are the bytes that say so: where it was fetched, they are fetched again before that is
    final, because damage in a member's name or flags looks like malice.
    """

    def __init__(self, message: str, spans: list[Span]) -> None:
        super().__init__(message)
        self.spans = spans


class Hostile(Refused):
    """It would write where it must not, or without end, or can't be read at all."""


class Foreign(Refused):
    """It holds something else."""


class Damaged(Refused):
    """Its bytes are not what was packed."""


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to."""

    num_members: int = 1_000_000
    total_bytes: int = 500 * 10**9
    ratio: float = 100
    """Unpacked bytes to packed ones."""


LIMITS = Limits()


@dataclass(frozen=True)
class Expected:
    """What a known archive must hold."""

    class_names: frozenset[str]
    num_pictures: Mapping[str, int]
    """By split."""

    def difference(self, counts: Mapping[str, Mapping[str, int]]) -> str | None:
        """How these counts, by split and class, differ; None when they don't."""
        for split, number in self.num_pictures.items():
            held = counts.get(split, {})
            if held.keys() != self.class_names:
                odd = sorted(held.keys() ^ self.class_names)
                return f"{split}/ must have {len(self.class_names)} classes; differs in {odd[:5]}"
            if sum(held.values()) != number:
                return f"{split}/ must have {number} pictures, and has {sum(held.values())}"
        return None


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
        with _open(archive) as opened:
            chosen = _chosen_members(opened, archive, limits)
            counts = count_pictures(chosen)
            if expected and (difference := expected.difference(counts)):
                raise Foreign(
                    f"{archive} isn't the data set it should be: {difference}",
                    [_directory_of(opened, archive)],
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


# looking before unpacking


def _open(archive: Path) -> zipfile.ZipFile:
    try:
        with archive.open("rb") as file:
            start = file.read(60)
    except OSError as error:
        raise DataError(
            f"{archive} can't be read ({error.strerror}); pass --archive a zip file"
        ) from None
    try:
        return zipfile.ZipFile(archive)
    except _BAD_ZIP as error:
        size = archive.stat().st_size
        tail = (max(0, size - _TAIL_BYTES), size)
        if not start.startswith(b"PK"):
            raise Hostile(
                f"{archive} is no zip archive; it starts with {start!r}", [(0, len(start)), tail]
            ) from None
        raise Damaged(
            f"{archive} has no readable directory at its end: it is cut off or damaged ({error})",
            [tail],
        ) from None


def _directory_of(opened: zipfile.ZipFile, archive: Path) -> Span:
    """Where the archive says what is in it."""
    return max(opened.start_dir, 0), archive.stat().st_size


def _chosen_members(
    opened: zipfile.ZipFile, archive: Path, limits: Limits
) -> dict[str, zipfile.ZipInfo]:
    """What is to be unpacked, by its name there. Raises `Hostile` or `Foreign`."""
    directory = [_directory_of(opened, archive)]
    if reason := _refusal(opened.infolist(), archive.stat().st_size, limits):
        raise Hostile(f"{archive}: {reason}", directory)
    members = {info.filename: info for info in opened.infolist() if not info.is_dir()}
    try:
        root = find_root(members)
    except DataError as error:
        raise Foreign(f"{archive}: {error}", directory) from None
    return {n.removeprefix(root): m for n, m in members.items() if _is_wanted(n, root)}


def _refusal(infos: list[zipfile.ZipInfo], packed_bytes: int, limits: Limits) -> str | None:
    """Why an archive with these members may not be unpacked; None where all are harmless."""
    total = sum(info.file_size for info in infos)
    if len(infos) > limits.num_members:
        return f"it has {len(infos)} members; {limits.num_members} are allowed"
    if total > limits.total_bytes or total > limits.ratio * packed_bytes:
        return (
            f"it would unpack from {packed_bytes} to {total} bytes; at most {limits.total_bytes} "
            f"and {limits.ratio:g} times its own size are allowed"
        )
    files: set[str] = set()
    for info in infos:
        if reason := _refusal_of_member(info):
            return f"{info.filename!r} {reason}"
        if info.filename in files:
            return f"{info.filename!r} is in it twice"
        if not info.is_dir():
            files.add(info.filename)
    for name in files:
        if over := next((str(p) for p in PurePosixPath(name).parents if str(p) in files), None):
            return f"{over!r} is a file and a folder"
    return None


def _refusal_of_member(info: zipfile.ZipInfo) -> str | None:
    name = info.orig_filename
    parts = name.removesuffix("/").split("/")
    kind = stat.S_IFMT(info.external_attr >> 16)
    # zipfile unpacks other methods in blocks of any size: 1,000 bytes of bzip2 may be a gigabyte.
    method, known = info.compress_type, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    reasons = {
        "is no relative path": name.startswith("/") or "\\" in name or ":" in parts[0],
        "leads out of its folder": ".." in parts,
        "has empty, too long or odd parts": bool({"", "."} & {*parts})
        or "\0" in name
        or max(map(len, parts)) > 255,
        "is a link or a special file": kind not in (0, stat.S_IFREG, stat.S_IFDIR),
        "is encrypted": bool(info.flag_bits & 0x1),
        f"is packed by method {method}; 0 (stored) and 8 (deflated) are read": method not in known,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def find_root(names: Iterable[str]) -> str:
    """The folder, as a prefix such as "a/b/", that holds train/CLASS/* and val/CLASS/*."""
    roots: dict[str, set[str]] = {}
    tops: set[str] = set()
    for name in names:
        parts = name.split("/")
        tops.add(parts[0])
        if not is_picture_name(name) or any(_is_hidden(part) for part in parts):
            continue
        for depth, part in enumerate(parts[:-2]):
            if part in ("train", "val"):
                roots.setdefault("".join(f"{p}/" for p in parts[:depth]), set()).add(part)
    whole = [root for root, splits in roots.items() if splits == {"train", "val"}]
    shallowest = [r for r in whole if r.count("/") == min(w.count("/") for w in whole)]
    if len(shallowest) != 1:
        found = f"several: {shallowest}" if shallowest else f"found: {sorted(tops)[:8]}"
        raise DataError(f"the archive must hold one train/CLASS/* and val/CLASS/* ({found})")
    return shallowest[0]


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _is_wanted(name: str, root: str) -> bool:
    inside = name.removeprefix(root).split("/")
    return (
        name.startswith(root)
        and inside[0] in ("train", "val", "test")
        and not any(_is_hidden(part) for part in inside)
    )


def count_pictures(names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Pictures of SPLIT/CLASS/... by split and class."""
    counts: dict[str, Counter[str]] = {}
    for name in names:
        parts = name.split("/")
        if len(parts) > 2 and is_picture_name(name):
            counts.setdefault(parts[0], Counter())[parts[1]] += 1
    return {split: dict(sorted(held.items())) for split, held in sorted(counts.items())}


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
        spans = [*_spans(opened, damaged), _directory_of(opened, archive)]
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
    except _BAD_ZIP as error:
        raise _BadMember(str(error)) from None
    with member:
        while True:
            try:
                block = member.read(BLOCK_BYTES)
            except _BAD_ZIP as error:
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


def _spans(opened: zipfile.ZipFile, names: Iterable[str]) -> list[Span]:
    """Where members stand: each up to the next one, or to the archive's directory."""
    starts = sorted({info.header_offset for info in opened.infolist()})
    spans: list[Span] = []
    for start in sorted(opened.getinfo(name).header_offset for name in names):
        after = bisect_right(starts, start)
        end = min([*starts[after : after + 1], opened.start_dir])
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        elif 0 <= start < end:  # else it is the directory that is damaged
            spans.append((start, end))
    return spans
