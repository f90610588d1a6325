"""Where a sweep's trials are kept, so that several processes and machines share them.

Turns `--storage` into one of Optuna's storages: SQLite, another database by its URL, or a journal
file; and tells which processes of this machine are still alive. Knows nothing about trials.

    >>> open_storage("journal:/shared/sweep.journal")  # doctest: +SKIP
"""

from __future__ import annotations

import json
import os
import platform
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from finetune.errors import ConfigError, FinetuneError, MissingPackage

HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 90
"""A trial without a heartbeat for so long is given to another process."""

_JOURNAL = "journal:"
_OPTUNAS = str(Path(optuna.storages.__file__).parent)
_TRIES = 6


def open_storage(
    where: str,
    on_stale: Callable[[Any, Any], None] | None = None,
    heartbeat_seconds: int | None = None,
    grace_seconds: int | None = None,
) -> BaseStorage:
    """The storage at a URL or `journal:PATH`, made where there is none.

    Databases have heartbeats; `on_stale(study, trial)` is called for a trial that lost its own.
    Raises `ConfigError` for what is no storage and `FinetuneError` for one that can't be reached.
    """
    if where.startswith(_JOURNAL):
        return _open_journal(Path(where.removeprefix(_JOURNAL)))
    try:
        url = make_url(where)
        shown = _without_secrets(url)
        arguments = {"timeout": 60} if url.get_backend_name() == "sqlite" else {}
    except (ArgumentError, ValueError):
        raise ConfigError(
            "storage: it is no URL; pass sqlite:///FILE.db, postgresql://USER@HOST/DATABASE, "
            "another of SQLAlchemy's URLs, or journal:PATH"
        ) from None
    if "@" in (url.host or ""):  # messages would tell what follows it, as a host
        raise ConfigError("storage: an @ in a user's name or password must be written as %40")
    for attempt in range(_TRIES):
        try:
            with experimental():
                storage = RDBStorage(
                    where,
                    engine_kwargs={"connect_args": arguments},
                    heartbeat_interval=heartbeat_seconds or HEARTBEAT_SECONDS,
                    grace_period=grace_seconds or GRACE_SECONDS,
                    heartbeat_stale_trial_callback=on_stale,
                )
            if url.get_backend_name() == "sqlite":
                _write_ahead(storage)
            return storage
        except NoSuchModuleError:
            raise ConfigError(
                f"storage: {shown}: SQLAlchemy knows no database {url.drivername!r}"
            ) from None
        except ImportError:
            package = url.get_backend_name()
            raise MissingPackage(
                {"postgresql": "psycopg[binary]", "mysql": "mysqlclient"}.get(package, package),
                "sweep",
                f"storage {shown}",
            ) from None
        except DBAPIError as error:
            # Two processes that make the tables at the same moment: the second finds them.
            if attempt == _TRIES - 1:
                reason = str(error.orig).strip().splitlines()[0] if error.orig else str(error)
                raise FinetuneError(f"storage: {shown} can't be used: {reason}") from None
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file, whatever its path is made of."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def _without_secrets(url: URL) -> str:
    """A URL as it may be told; a password can stand behind the question mark too."""
    return url.set(query={}).render_as_string(hide_password=True)


def _write_ahead(storage: RDBStorage) -> None:
    """Let SQLite commit without waiting for the disk, which takes 16 ms a time on a busy one.

    A killed process loses nothing. A machine that loses its power may lose the last commits, never
    the file; run directories then tell what had ended.
    """

    def prepare(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(storage.engine, "connect", prepare)
    storage.engine.dispose()  # connections that are open already haven't heard of it


def _open_journal(path: Path) -> BaseStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend_journal(path)
        return JournalStorage(JournalFileBackend(str(path)))
    except OSError as error:
        raise FinetuneError(f"storage: journal {path} can't be used: {error.strerror}") from None


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Within it, a storage that breaks or turns out to be damaged raises `FinetuneError`."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:  # damaged content makes Optuna raise whatever it likes
        places = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        is_content = isinstance(error, json.JSONDecodeError)
        if not is_content and not any(place.startswith(_OPTUNAS) for place in places):
            raise
        shown = where if where.startswith(_JOURNAL) else _without_secrets(make_url(where))
        cause = (error.orig if isinstance(error, DBAPIError) else None) or error
        reason = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        raise FinetuneError(
            f"storage: {shown} can't be read or written: {reason}. Runs that have ended are whole "
            "in their directories; with another --storage or --name the sweep starts afresh"
        ) from None


def _mend_journal(path: Path) -> None:
    """Cut off a last line that was only half written: the next one would be appended to it."""
    if not path.exists() or path.read_bytes()[-1:] in (b"\n", b""):
        return
    with get_lock_file(JournalFileSymlinkLock(str(path))):
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


@contextmanager
def experimental() -> Iterator[None]:
    """Optuna calls its heartbeats experimental, each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def machine() -> str:
    """This machine, its boot and its process namespace: where a process id means something."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return "/".join(parts)


def this_process() -> dict[str, Any]:
    """What tells this process from every other one, also from a later one with its id."""
    return {"machine": machine(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether a process of this machine has ended; one of another machine never counts as gone."""
    if owner.get("machine") != machine():
        return False
    pid = int(owner["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return bool(_start_of(pid) != owner["started"])


def _start_of(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None where there is no /proc."""
    try:
        # The name, in parentheses, may hold anything; the fields after it are numbers.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
