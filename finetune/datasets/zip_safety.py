"""A zip archive's directory -> the members to unpack, judged before a byte of them is written.

Turns what an archive says is in it into names, kinds, sizes and a layout that were found harmless,
or into the reason why they aren't and the bytes that say so. Knows nothing about unpacking.

    >>> with open_zip(Path("nature_12K.zip")) as opened:  # doctest: +SKIP
    ...     members = chosen_members(opened, Path("nature_12K.zip"), LIMITS)
"""

from __future__ import annotations

import lzma
import stat
import struct
import zipfile
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from finetune.data.layout import is_picture_name
from finetune.system.errors import DataError

Span = tuple[int, int]
"""Where bytes stand in a file: from the first to before the second."""

BAD_ZIP = (
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


def open_zip(archive: Path) -> zipfile.ZipFile:
    try:
        with archive.open("rb") as file:
            start = file.read(60)
    except OSError as error:
        raise DataError(
            f"{archive} can't be read ({error.strerror}); pass --archive a zip file"
        ) from None
    try:
        return zipfile.ZipFile(archive)
    except BAD_ZIP as error:
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


def directory_of(opened: zipfile.ZipFile, archive: Path) -> Span:
    """Where the archive says what is in it."""
    return max(opened.start_dir, 0), archive.stat().st_size


def chosen_members(
    opened: zipfile.ZipFile, archive: Path, limits: Limits
) -> dict[str, zipfile.ZipInfo]:
    """What is to be unpacked, by its name there. Raises `Hostile` or `Foreign`."""
    directory = [directory_of(opened, archive)]
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


def spans_of(opened: zipfile.ZipFile, names: Iterable[str]) -> list[Span]:
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
