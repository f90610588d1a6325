"""Files that are whole or not there.

Turns bytes into a file by a rename. Knows nothing about what the files mean.

    >>> write_atomically(Path("runs.csv"), b"run_id\\n")  # doctest: +SKIP
"""

from __future__ import annotations

import glob
import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: beside its place, synced, then renamed.

    Raises `OSError` with the path in it.
    """
    remove_left_behind(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:  # a write's own doesn't say where
        raise OSError(error.errno, error.strerror, str(path)) from None
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
