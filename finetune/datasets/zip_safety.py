"""Select the members of a zip archive to unpack, and refuse archives that are unsafe to unpack."""

import stat
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

from finetune.data.layout import is_picture_name, split_of
from finetune.system.errors import DataError

MAX_MEMBERS = 1_000_000
MAX_BYTES = 500 * 10**9
MAX_RATIO = 100  # of unpacked bytes to packed bytes
_UTF8_FLAG = 0x800


class ArchiveError(DataError):
    """An archive that is damaged, unsafe to unpack, or not a zip archive."""


class UnexpectedArchive(ArchiveError):
    """An archive that does not hold the expected data set."""


def select_members(infos: list[zipfile.ZipInfo], packed_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The members to unpack, by SPLIT/CLASS/... Raises `ArchiveError` if any member is unsafe."""
    _check_size(infos, packed_bytes)
    num_files = Counter(i.filename for i in infos if not i.filename.endswith("/"))
    for info in infos:
        folders = map(str, PurePosixPath(info.filename).parents)
        reasons = {
            **_reasons_to_refuse(info),
            "is in it twice": num_files[info.filename] > 1,
            "lies in a folder that is also a file": any(name in num_files for name in folders),
        }
        for reason, applies in reasons.items():
            if applies:
                raise ArchiveError(f"{info.filename!r} {reason}")
    members = {info.filename: info for info in infos if not info.is_dir()}
    root = find_root(members)
    return {
        name.removeprefix(root): info
        for name, info in members.items()
        if name.startswith(root)
        and split_of(name.removeprefix(root).split("/")[0])
        and not _is_hidden(name)
    }


def encoding_of_names(infos: Iterable[zipfile.ZipInfo]) -> str | None:
    """The probable encoding of the names without the UTF-8 flag; None if all of them are ASCII.

    `infos` were read without `metadata_encoding`, so that these names are decoded as cp437.
    """
    unmarked = (info.orig_filename for info in infos if not info.flag_bits & _UTF8_FLAG)
    names = b"/".join(name.encode("cp437") for name in unmarked if not name.isascii())
    if not names:
        return None
    try:
        names.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError:
        return "gbk" if _is_chinese(names) else "cp437"


def _is_chinese(names: bytes) -> bool:
    """Whether these are names in GBK.

    Most names of Western Europe in cp437 can be decoded as GBK too, but not as characters of the
    older GB2312, which has nearly all characters that are in use.
    """
    try:
        text = [character for character in names.decode("gbk") if not character.isascii()]
    except UnicodeDecodeError:
        return False
    in_use = "".join(text).encode("gb2312", "ignore").decode("gb2312")
    return 2 * len(in_use) > len(text)


def _check_size(infos: list[zipfile.ZipInfo], packed_bytes: int) -> None:
    total_bytes = sum(info.file_size for info in infos)
    if len(infos) > MAX_MEMBERS:
        raise ArchiveError(f"it has {len(infos)} members; at most {MAX_MEMBERS} are allowed")
    if total_bytes > MAX_BYTES or total_bytes > MAX_RATIO * packed_bytes:
        raise ArchiveError(
            f"it would unpack from {packed_bytes} to {total_bytes} bytes; at most {MAX_BYTES} and "
            f"{MAX_RATIO} times its own size are allowed"
        )


def _reasons_to_refuse(info: zipfile.ZipInfo) -> dict[str, bool]:
    """Each reason, and whether it applies."""
    # The original name still has what follows a NUL.
    name, method = info.orig_filename.replace("\\", "/"), info.compress_type
    parts = name.removesuffix("/").split("/")
    kind = stat.S_IFMT(info.external_attr >> 16)
    # zipfile unpacks other methods in blocks of any size: 1,000 bytes of bzip2 may be a gigabyte.
    is_allowed_method = method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    is_bad_part = any(part in ("", ".") or len(part) > 255 for part in parts)
    return {
        "is not a relative path": name.startswith("/") or ":" in parts[0],
        "leads out of its folder": ".." in parts,
        "has empty, too long or invalid parts": is_bad_part or "\0" in name,
        "is a link or a special file": kind not in (0, stat.S_IFREG, stat.S_IFDIR),
        "is encrypted": bool(info.flag_bits & 0x1),
        f"is packed by method {method}; 0 and 8 are allowed": not is_allowed_method,
    }


def find_root(names: Iterable[str]) -> str:
    """The folder, as a prefix such as "a/b/", that holds train/CLASS/* and val/CLASS/*.

    test/CLASS/* may be there instead of val/, and the splits may have their other names. Raises
    `UnexpectedArchive` unless there is exactly one such folder at the smallest depth.
    """
    names = [name for name in names if not _is_hidden(name)]
    splits: dict[str, set[str]] = defaultdict(set)  # by the folder that holds them
    for name in filter(is_picture_name, names):
        folders = name.split("/")[:-1]
        for depth, folder in enumerate(folders[:-1]):
            if split := split_of(folder):
                splits["".join(f"{f}/" for f in folders[:depth])].add(split)
    roots = sorted(root for root, found in splits.items() if "train" in found and len(found) > 1)
    least = min((root.count("/") for root in roots), default=0)
    shallowest = [root for root in roots if root.count("/") == least]
    if len(shallowest) != 1:
        found = shallowest or sorted({name.split("/")[0] for name in names})[:8]
        raise UnexpectedArchive(
            f"must have exactly one folder with train/CLASS/* and val/CLASS/*; found {found}"
        )
    return shallowest[0]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
