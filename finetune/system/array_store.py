"""A cache of large arrays on disk, computed once and shared by all processes that need them.

An array is identified by a description of everything that its bytes depend on. It is built under a
lock, renamed into place when complete, and memory-mapped once its hash has been checked. The least
recently used arrays are deleted first, never one that a process has open.

    CACHE_DIR/KIND-KEY/{data.npy, manifest.json}     an array; the manifest is written last
    CACHE_DIR/KIND-KEY/checked.json                  the state of data.npy whose hash was right
    CACHE_DIR/locks/KIND-KEY                         shared by readers, exclusive to the builder
"""

import fcntl
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from finetune.system.files import write_atomically

FORMAT = 2
"""Part of every key: increase it when the same description would give other bytes."""

_ZEROS_BYTES = 1 << 22  # written at once
_SETTLED_SECONDS = 2.0
"""A file that was changed more recently could be changed again at the same time stamp."""

Array = np.ndarray[Any, np.dtype[Any]]
Description = Mapping[str, Any]
"""Everything that an array's bytes depend on."""
Build = Callable[[Array], Mapping[str, Any]]
"""Fills the array that it is given and returns notes to store with it."""


def digest(content: object) -> str:
    """A short hash of anything that JSON can hold."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class _Lock:
    """The lock file of one array: shared by readers, exclusive to whoever builds or deletes it."""

    _descriptor = -1

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def acquire_shared(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def acquire_exclusive(self, wait: bool = False) -> bool:
        """False if another process holds it and this one doesn't wait."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a shared lock would block the other
            return False
        return True

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close


@dataclass(frozen=True)
class StoredArray:
    """An array in the cache, opened and checked. It isn't evicted as long as this object lives."""

    array: Array
    notes: Mapping[str, Any]
    """What its builder returned."""
    _lock: _Lock


@dataclass(eq=False)
class Cache:
    """The arrays of one directory, at most `limit_bytes` in total."""

    directory: Path
    limit_bytes: float
    log: Callable[[str], None] = print
    _opened: dict[str, StoredArray] = field(default_factory=dict, init=False)

    def open(self, kind: str, description: Description) -> StoredArray | None:
        """The array of this description, or None if it is missing or damaged."""
        name = self._name(kind, description)
        exists = name in self._opened or (self.directory / name).exists()
        return self._open(name) if exists else None

    def open_or_build(
        self, kind: str, description: Description, shape: tuple[int, ...], dtype: str, build: Build
    ) -> StoredArray | None:
        """The array of this description, built by one process while the others wait.

        None if the array doesn't fit into the cache, or the directory can't be used; the reason is
        logged.
        """
        name = self._name(kind, description)
        return self._open(name, partial(self._build, name, shape, dtype, build))

    def _name(self, kind: str, description: Description) -> str:
        return f"{kind}-{digest({'format': FORMAT, **description})}"

    def _open(self, name: str, build: Callable[[], bool] | None = None) -> StoredArray | None:
        if name in self._opened:
            return self._opened[name]
        try:
            lock = _Lock(self.directory / "locks" / name)
            while True:
                lock.acquire_shared()
                if stored := self._read(name, lock):
                    return stored
                if build is None:
                    break
                # Waiting here could take as long as another process reads what it has just built.
                if not lock.acquire_exclusive():
                    time.sleep(random.uniform(0.01, 0.05))
                elif not (self.directory / name).exists() and not build():
                    break
            lock.close()
        except OSError as error:
            self.log(f"cache: {self.directory} can't be used ({error}); continuing without it")
        return None

    def _read(self, name: str, lock: _Lock) -> StoredArray | None:
        """Open an array under its shared lock. A damaged one is logged and deleted; as long as the
        lock is shared, no process can have built another in its place."""
        place = self.directory / name
        try:
            manifest = json.loads((place / "manifest.json").read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            manifest = None
        data_path = place / "data.npy"
        if not _is_intact(data_path, manifest):
            self.log(f"cache: {place} is damaged; it is deleted and built again")
            self._delete(place)
            return None
        os.utime(place / "manifest.json")
        # Copy-on-write: torch wants a writable array, and the file must not change.
        stored = StoredArray(np.load(data_path, mmap_mode="c"), manifest["notes"], lock)
        self._opened[name] = stored
        return stored

    def _build(self, name: str, shape: tuple[int, ...], dtype: str, build: Build) -> bool:
        """Build an array under its exclusive lock; False if there is no space for it."""
        for leftover in self.directory.glob(f".{name}.*.tmp"):
            shutil.rmtree(leftover)
        temporary = self._temporary(name)
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            with self._exclusive("room", wait=True):  # the next process counts what is allocated
                free_bytes = self._free_space(num_bytes)
                if free_bytes < num_bytes:
                    self.log(
                        f"cache: {name.partition('-')[0]} need {num_bytes / 1e9:.2f} GB, but "
                        f"{free_bytes / 1e9:.2f} GB are free (--cache_gb); continuing without them"
                    )
                    return False
                temporary.mkdir()
                array = _allocate(temporary / "data.npy", shape, dtype)
            notes = dict(build(array))
            array.flush()
            del array
            manifest = _manifest(temporary / "data.npy", notes)
            (temporary / "manifest.json").write_text(json.dumps(manifest))
            temporary.rename(self.directory / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True

    def _temporary(self, name: str) -> Path:
        return self.directory / f".{name}.{os.getpid()}.tmp"

    def _free_space(self, num_bytes: int) -> float:
        """Evict arrays that no process uses until `num_bytes` fit; the free bytes."""
        for temporary in self.directory.glob(".*-*.tmp"):  # what killed processes have left
            with self._exclusive(temporary.name[1:].split(".")[0]) as is_unused:
                if is_unused:
                    shutil.rmtree(temporary, ignore_errors=True)
        free_bytes = self.limit_bytes - num_stored_bytes(self.directory)
        if num_bytes <= self.limit_bytes:
            for manifest in sorted(self.directory.glob("[!.]*/manifest.json"), key=_last_used):
                if free_bytes >= num_bytes:
                    break
                with self._exclusive(manifest.parent.name) as is_unused:
                    if is_unused:
                        free_bytes += _num_bytes(manifest.parent)
                        self._delete(manifest.parent)
        return min(free_bytes, shutil.disk_usage(self.directory).free)

    @contextmanager
    def _exclusive(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Whether the lock of an array could be acquired; it is released at the end."""
        lock = _Lock(self.directory / "locks" / name)
        try:
            yield lock.acquire_exclusive(wait)
        finally:
            lock.close()

    def _delete(self, place: Path) -> None:
        """Rename first: nobody reads a half-deleted array, and another process may be faster."""
        temporary = self._temporary(place.name)
        with suppress(FileNotFoundError):
            place.rename(temporary)
            shutil.rmtree(temporary)


def num_stored_bytes(directory: Path) -> int:
    """The size of a cache directory, including arrays under construction."""
    return sum(_num_bytes(place) for place in directory.glob("*-*"))


def _num_bytes(place: Path) -> int:
    with suppress(FileNotFoundError):  # evicted or renamed meanwhile
        return sum(file.stat().st_size for file in place.iterdir())
    return 0


def _last_used(manifest: Path) -> float:
    with suppress(FileNotFoundError):
        return manifest.stat().st_mtime
    return 0


def _manifest(data_path: Path, notes: object) -> dict[str, Any]:
    """The manifest of a complete array. The hash finds damage; it is not cryptographic."""
    try:
        with data_path.open("rb") as file:
            xxh3 = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    except FileNotFoundError:
        xxh3 = None
    return {"xxh3": xxh3, "notes": notes, "notes_digest": digest(notes)}


def _is_intact(data_path: Path, manifest: Any) -> bool:
    """Whether an array is the one of its manifest.

    Its content is hashed once for each state of the file and each start of the machine: whatever a
    process writes changes the state, and a power failure may lose what was written.
    """
    notes = manifest.get("notes") if isinstance(manifest, dict) else None
    record = data_path.with_name("checked.json")
    found = {"state": _file_state(data_path), "manifest": manifest}
    with suppress(OSError, ValueError):
        if json.loads(record.read_text()) == found:
            return True
    if manifest != _manifest(data_path, notes):
        return False
    _, _, changed_ns, *_ = found["state"]
    if time.time() - changed_ns / 1e9 > _SETTLED_SECONDS:
        with suppress(OSError):  # the next process hashes it again
            write_atomically(record, json.dumps(found).encode(), sync=False)
    return True


def _file_state(path: Path) -> list[Any] | None:
    """What a write or another file in its place changes, and the start of this machine."""
    try:
        found, boot = path.stat(), Path("/proc/sys/kernel/random/boot_id")
    except FileNotFoundError:
        return None
    started = boot.read_text() if boot.exists() else ""
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, started]


def _allocate(path: Path, shape: tuple[int, ...], dtype: str) -> np.memmap[Any, Any]:
    """A new .npy with its disk blocks reserved: a full disk is an error here, no SIGBUS later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    num_bytes = path.stat().st_size
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        else:  # on macOS, writing is the only way
            file.seek(array.offset)
            for start in range(array.offset, num_bytes, _ZEROS_BYTES):
                file.write(bytes(min(_ZEROS_BYTES, num_bytes - start)))
    return array
