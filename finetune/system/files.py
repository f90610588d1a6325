"""Atomic writes, folders without their hidden entries, and YAML files of plain values."""

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from finetune.system.errors import ConfigError

_MAX_BYTES, _MAX_VALUES = 1_000_000, 20_000


def absolute(path: Path) -> Path:
    """The absolute path, with `~` expanded; links are not resolved."""
    return Path(os.path.abspath(path.expanduser()))


def run_directory(path: Path | str) -> Path:
    """The run directory that is meant: a checkpoint stands for the one that holds it.

    >>> run_directory("runs/k3x9q2ab/best.ckpt").as_posix()
    'runs/k3x9q2ab'
    """
    path = Path(path)
    return path.parent if path.suffix == ".ckpt" else path


def _raise(error: OSError) -> None:
    raise error


def is_hidden_folder(name: str) -> bool:
    """Whether programs keep their own files in it: `.thumbnails`, Synology's `@eaDir`, macOS's."""
    return name.startswith((".", "@")) or name == "__MACOSX"


def walk(
    folder: Path, on_error: Callable[[OSError], None] = _raise, follow_links: bool = False
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` without hidden files and folders: each folder with its folders and files, sorted.

    As with `os.walk`, the walk doesn't enter what is removed from the list of folders. With
    `follow_links`, it enters linked folders, but none twice and none that it started from.
    `on_error` gets the `OSError` of a folder that can't be read; by default it is raised.
    """
    entered = set(map(str, folder.resolve().parents))
    for place, folders, files in os.walk(folder, onerror=on_error, followlinks=follow_links):
        if (real := os.path.realpath(place)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden_folder(name))
        yield Path(place), folders, sorted(name for name in files if not name.startswith("."))


def write_atomically(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a complete file or nothing: to a temporary file beside it, then renamed.

    `sync` protects the content against a power failure too. Raises `OSError` with the path in it.
    """
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # the error of a write doesn't name the file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote this file."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        try:
            os.kill(int(temporary.name.split(".")[-2]), 0)
        except (ValueError, ProcessLookupError):
            temporary.unlink(missing_ok=True)
        except PermissionError:  # a living process of another user
            continue


def load_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file that should be `what`, in plain values.

    Raises `ConfigError`, also for nested aliases or merges that would expand without limit.
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
    count, remaining = 0, [node]
    while remaining:
        node = remaining.pop()
        count += 1
        if count > _MAX_VALUES:
            raise ValueError(f"it holds more than {_MAX_VALUES} values; are aliases nested?")
        if isinstance(node, yaml.CollectionNode):
            for part in node.value:
                remaining += part if isinstance(part, tuple) else [part]
