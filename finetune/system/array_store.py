"""Large arrays on disk, computed once and shared by every process that wants the same.

Turns a description of an array (everything that its bytes depend on) into a memory-mapped file.
Built under a lock, written aside and renamed when whole, checked against its hash when opened, and
evicted least recently used first, never while a process reads it. Knows nothing about what the
arrays hold.

    CACHE_DIR/KIND-KEY/{data.npy, manifest.json}     an entry; the manifest is written last
    CACHE_DIR/locks/KIND-KEY                         held shared by readers, alone by the builder
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

FORMAT = 2
"""Part of every key: raise it when the same description would give other bytes."""

Array = np.ndarray[Any, np.dtype[Any]]


def digest(content: object) -> str:
    """A short hash of anything that JSON can say."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Entry:
    """An array in the cache, opened and checked; no process evicts it while this one runs."""

    array: Array
    notes: Mapping[str, Any]
    """What its builder returned beside the array."""
    _lock: _Lock


class _Lock:
    """One entry's lock file: shared by readers, exclusive to a builder or an evictor."""

    _descriptor = -1

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def share(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def hold(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def try_to_hold(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def let_go(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close


class Cache:
    """The entries of one directory, together at most `limit_bytes` large."""

    def __init__(
        self, directory: Path, limit_bytes: float, say: Callable[[str], None] = print
    ) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self._say = say
        self._opened: dict[str, Entry] = {}

    def open(self, kind: str, description: Mapping[str, Any]) -> Entry | None:
        """The entry of this description if it is there and whole, else None."""
        name = self._name(kind, description)
        if name in self._opened:
            return self._opened[name]
        if not (self.directory / name).exists():
            return None
        try:
            lock = _Lock(self.directory / "locks" / name)
            lock.share()
            entry = self._read(name, lock)
        except OSError as error:
            self._refuse(error)
            return None
        if entry is None:
            lock.close()
        return entry

    def open_or_build(
        self,
        kind: str,
        description: Mapping[str, Any],
        shape: tuple[int, ...],
        dtype: str,
        build: Callable[[Array], Mapping[str, Any]],
    ) -> Entry | None:
        """The entry of this description, built by one process while the others wait.

        `build` fills the array that it is given, of `shape` and `dtype`, and returns notes to keep
        beside it. None, after a line that says so, when there is too little room.
        """
        name = self._name(kind, description)
        if name in self._opened:
            return self._opened[name]
        try:
            lock = _Lock(self.directory / "locks" / name)
            while True:
                lock.share()
                if entry := self._read(name, lock):
                    return entry
                # Not waited for: who is quicker builds it, and then reads it to its own end.
                if not lock.try_to_hold():
                    lock.let_go()
                    time.sleep(random.uniform(0.01, 0.05))
                    continue
                if not (self.directory / name).exists() and not self._build(
                    name, kind, shape, dtype, build
                ):
                    lock.close()
                    return None
        except OSError as error:
            self._refuse(error)
            return None

    def _refuse(self, error: OSError) -> None:
        self._say(f"cache: {self.directory} can't be used ({error}); going on without it")

    def _name(self, kind: str, description: Mapping[str, Any]) -> str:
        return f"{kind}-{digest({'format': FORMAT, **description})}"

    def _read(self, name: str, lock: _Lock) -> Entry | None:
        """Open an entry under its shared lock. A damaged one is said, removed, and not opened:
        while the lock is shared nobody can have built another in its place."""
        place = self.directory / name
        try:
            manifest = json.loads((place / "manifest.json").read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict):
            manifest = None
        data_path = place / "data.npy"
        if manifest is None or manifest != _manifest(data_path, manifest.get("notes")):
            self._say(f"cache: {place} is damaged; it is removed and built again")
            self._remove(place)
            return None
        os.utime(place / "manifest.json")
        # Copy-on-write keeps torch content with a writable array and the file as it is.
        entry = Entry(np.load(data_path, mmap_mode="c"), manifest["notes"], lock)
        self._opened[name] = entry
        return entry

    def _build(
        self,
        name: str,
        kind: str,
        shape: tuple[int, ...],
        dtype: str,
        build: Callable[[Array], Mapping[str, Any]],
    ) -> bool:
        """Build an entry under its exclusive lock; False when there is no room for it."""
        for left_behind in self.directory.glob(f".{name}.*.tmp"):
            shutil.rmtree(left_behind)
        aside = self.directory / f".{name}.{os.getpid()}.tmp"
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            with self._make_room(num_bytes) as free_bytes:
                if free_bytes < num_bytes:
                    self._say(
                        f"cache: {kind} wants {num_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB "
                        "are free for it; going on without (raise --cache_gb to keep it)"
                    )
                    return False
                aside.mkdir()
                array = _allocate(aside / "data.npy", shape, dtype)
            notes = dict(build(array))
            array.flush()
            del array
            manifest = _manifest(aside / "data.npy", notes)
            (aside / "manifest.json").write_text(json.dumps(manifest))
            aside.rename(self.directory / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return True

    @contextmanager
    def _make_room(self, num_bytes: int) -> Iterator[float]:
        """Evict until `num_bytes` fit, and yield what is free; one process at a time.

        Space allocated inside counts for the next process that asks.
        """
        room = _Lock(self.directory / "locks" / "room")
        room.hold()
        try:
            self._remove_left_behind()
            free = self.limit_bytes - num_kept_bytes(self.directory)
            if num_bytes <= self.limit_bytes:
                for place in sorted(self.directory.glob("[!.]*/manifest.json"), key=_last_used):
                    if free >= num_bytes:
                        break
                    free += self._evict(place.parent)
            yield min(free, shutil.disk_usage(self.directory).free)
        finally:
            room.close()

    def _remove_left_behind(self) -> None:
        """What processes that were killed have half built or half removed; its lock is free."""
        for aside in self.directory.glob(".*-*.tmp"):
            name = aside.name[1:].split(".")[0]
            lock = _Lock(self.directory / "locks" / name)
            if lock.try_to_hold():
                shutil.rmtree(aside, ignore_errors=True)
            lock.close()

    def _evict(self, place: Path) -> int:
        """Remove an entry unless a process uses it; the bytes won."""
        lock = _Lock(self.directory / "locks" / place.name)
        try:
            if not lock.try_to_hold():
                return 0
            num_bytes = _size(place)
            self._remove(place)
            return num_bytes
        finally:
            lock.close()

    def _remove(self, place: Path) -> None:
        """Rename first, so that a half-removed entry is never read. Another may be quicker."""
        aside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        with suppress(FileNotFoundError):
            place.rename(aside)
            shutil.rmtree(aside)


def _manifest(data_path: Path, notes: object) -> dict[str, Any]:
    """What a whole entry's manifest says."""
    return {"xxh3": _hash(data_path), "notes": notes, "notes_digest": digest(notes)}


def num_kept_bytes(directory: Path) -> int:
    """What a cache directory takes, entries under construction included."""
    return sum(_size(place) for place in directory.glob("*-*"))


def _size(place: Path) -> int:
    try:
        return sum(file.stat().st_size for file in place.iterdir())
    except FileNotFoundError:  # evicted or renamed meanwhile
        return 0


def _last_used(manifest: Path) -> float:
    try:
        return manifest.stat().st_mtime
    except FileNotFoundError:
        return 0


def _hash(path: Path) -> str | None:
    """xxh3 of a file's bytes: for damage, not for enemies."""
    found = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                found.update(block)
    except FileNotFoundError:
        return None
    return found.hexdigest()


def _allocate(path: Path, shape: tuple[int, ...], dtype: str) -> np.memmap[Any, Any]:
    """A new .npy whose blocks are reserved: a full disk is an error here, not a SIGBUS later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
