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
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from finetune.system.errors import ConfigError, FinetuneError, MissingPackage

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
        url, shown = make_url(where), _shown(where)
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
                _set_up_sqlite(storage)
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
                raise FinetuneError(f"storage: {shown} can't be used: {_reason(error)}") from None
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file, whatever its path is made of."""
    return URL.create("sqlite", database=str(path)).render_as_string()


@contextmanager
def told(where: str) -> Iterator[None]:
    """Within it, a storage that breaks or turns out to be damaged is one message.

    What its trials had reached stays; raises `FinetuneError`.
    """
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:  # damaged content makes Optuna raise whatever it likes
        places = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        is_content = isinstance(error, json.JSONDecodeError)
        if not is_content and not any(place.startswith(_OPTUNAS) for place in places):
            raise
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        raise FinetuneError(
            f"storage: {_shown(where)} can't be used any more: {_reason(cause)} (start the sweep "
            "again once that is put right, and it goes on; runs that have ended are whole in their "
            "directories)"
        ) from None


def _shown(where: str) -> str:
    """A storage as it may be told; a password can stand behind the question mark too."""
    if where.startswith(_JOURNAL):
        return where
    return make_url(where).set(query={}).render_as_string(hide_password=True)


def _reason(error: BaseException | None) -> str:
    told_by = getattr(error, "orig", None) or error
    return next(iter(str(told_by).strip().splitlines()), type(told_by).__name__)


def _set_up_sqlite(storage: RDBStorage) -> None:
    """Let nobody read what another process is about to change, and commit without the disk.

    Optuna reads a trial and then updates it. SQLite knows no SELECT ... FOR UPDATE and Python's
    driver begins a transaction at the update, so two processes could both claim a trial; here it
    begins, with SQLite's lock, before the reading.

    Waiting for the disk takes 16 ms a commit on a busy one. A killed process loses nothing. A
    machine that loses its power may lose the last commits, never the file; run directories then
    tell what had ended.
    """

    def prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(storage.engine, "connect", prepare)
    event.listen(storage.engine, "begin", begin)
    storage.engine.dispose()  # connections that are open already haven't heard of it


def _open_journal(path: Path) -> BaseStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        _mend(path)
        return JournalStorage(JournalFileBackend(str(path)))
    except OSError as error:
        raise FinetuneError(f"storage: journal {path} can't be used: {error.strerror}") from None


def _mend(journal: Path) -> None:
    """Cut off a last line that a full disk cut short; one more line would make all unreadable."""
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()
    try:
        content = journal.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(journal, whole)
    finally:
        lock.release()


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
