"""Files that are whole or not there, and texts that can't do harm.

Turns bytes into a file by a rename, and a YAML file into plain values. Knows nothing about what the
files mean.

    >>> write_atomically(Path("runs.csv"), b"run_id\\n")  # doctest: +SKIP
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

import yaml

from finetune.system.errors import ConfigError

_MAX_BYTES, _MAX_VALUES = 1_000_000, 20_000


def absolute(path: Path) -> Path:
    """The path from the root on, `~` replaced; links are kept as they are."""
    return Path(os.path.abspath(path.expanduser()))


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


def load_yaml(path: Path, what: str) -> Any:
    """What a YAML file says, which is meant to be `what`: plain values alone.

    Raises `ConfigError`, also for one that aliases or merges blow up: neither building nor walking
    that would ever end.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        loader = yaml.SafeLoader(text.decode("utf-8"))
        node = loader.get_single_node()
        _check_size(node)
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ConfigError(f"{path} can't be read as {what}: it is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} can't be read as {what}: {error}") from None


def _check_size(node: object) -> None:
    count, left = 0, [node]
    while left:
        node = left.pop()
        count += 1
        if count > _MAX_VALUES:
            raise ValueError(f"it holds more than {_MAX_VALUES} values; are aliases nested?")
        if isinstance(node, yaml.CollectionNode):
            for part in node.value:
                left += part if isinstance(part, tuple) else [part]
