"""Files that are whole or not there, and that show when a byte of them has changed.

Turns a mapping into JSON that holds a hash of itself, and bytes into a file by a rename. The hash
is for damage, not for enemies. Knows nothing about what the files mean.

    >>> unseal(seal({"accuracy": 0.5}))
    {'accuracy': 0.5}
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def seal(content: Mapping[str, Any]) -> bytes:
    """JSON that holds a hash of itself: a byte that changes later is noticed."""
    text = json.dumps({**content, "digest": _digest(content)}, ensure_ascii=False, indent=2)
    return text.encode("utf-8", "backslashreplace")  # what no encoding has, as JSON's own escape


def unseal(text: bytes) -> dict[str, Any]:
    """What was sealed; without a hash it is taken as it stands. Raises `ValueError`."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it holds no mapping")
    if content.pop("digest", None) not in (None, _digest(content)):
        raise ValueError("it is damaged, or was changed since it was written")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hash_of(json.dumps(content, sort_keys=True).encode())


def hash_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: beside its place, synced, then renamed."""
    remove_left_behind(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def remove_left_behind(path: Path) -> None:
    """Remove what processes left beside a file's place when they were killed at writing it."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if not _is_alive(aside.name.split(".")[-2]):
            aside.unlink(missing_ok=True)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
