"""Where a sweep's trials are stored, and which of its processes on this machine are alive."""

import json
import os
import platform
import sqlite3
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.system.errors import ConfigError, FinetuneError, MissingPackage

try:
    import optuna
except ImportError:
    raise MissingPackage("optuna", "sweep", "the local sweep") from None

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 90
"""After this long without a heartbeat, a trial of a database is requeued."""

_JOURNAL = "journal:"
_DRIVERS = {"postgresql": "psycopg[binary]", "mysql": "mysqlclient"}
_TRIES = 6
_SQLITE_TIMEOUT_SECONDS = 60

_OnStale = Callable[[optuna.Study, FrozenTrial], None]


def open_storage(where: str, on_stale: _OnStale | None = None) -> BaseStorage:
    """The storage at a database's URL or `journal:PATH`, created if it does not exist.

    `on_stale` is called for a running trial of a database whose heartbeat has stopped. Raises
    `ConfigError` for an invalid `where`, and `FinetuneError` if it can't be reached.
    """
    if where.startswith(_JOURNAL):
        return _open_journal(Path(where.removeprefix(_JOURNAL)))
    url = _parse_url(where)
    backend, described = url.get_backend_name(), f"storage: {_without_password(where)}"
    for attempt in range(_TRIES):
        try:
            return _open_database(where, backend == "sqlite", on_stale)
        except NoSuchModuleError:
            problem = f"{described}: SQLAlchemy knows no database {url.drivername!r}"
            raise ConfigError(problem) from None
        except ImportError:
            raise MissingPackage(_DRIVERS.get(backend, backend), "sweep", described) from None
        except DBAPIError as error:
            # If two processes create the tables at the same time, one of them fails once.
            if attempt == _TRIES - 1:
                raise FinetuneError(f"{described} can't be used: {_first_line(error)}") from None
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def _parse_url(where: str) -> URL:
    try:
        url = make_url(where)
        url.get_backend_name()
    except (ArgumentError, ValueError):
        allowed = "sqlite:///FILE.db, postgresql://USER@HOST/DATABASE or journal:PATH"
        raise ConfigError(f"storage: not a URL; pass {allowed}") from None
    if "@" in (url.host or ""):  # error messages would show the rest of the password as the host
        raise ConfigError("storage: an @ in a user's name or password must be written as %40")
    return url


def _open_database(where: str, is_sqlite: bool, on_stale: _OnStale | None) -> RDBStorage:
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        storage = RDBStorage(
            where,
            engine_kwargs={
                "connect_args": {"timeout": _SQLITE_TIMEOUT_SECONDS} if is_sqlite else {}
            },
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=on_stale,
        )
    if is_sqlite:
        _configure_sqlite(storage)
    return storage


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file; its path may hold any characters."""
    return URL.create("sqlite", database=str(path)).render_as_string()


@contextmanager
def storage_errors_as_messages(where: str) -> Iterator[None]:
    """Within it, a storage that fails or is damaged raises `FinetuneError`."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:  # damaged content makes Optuna raise exceptions of any type
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        is_optuna_s = any(Path(optuna.storages.__file__).parent in Path(f).parents for f in files)
        if not is_optuna_s and not isinstance(error, json.JSONDecodeError):
            raise
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        raise FinetuneError(
            f"storage: {_without_password(where)} can't be used any more: {_first_line(cause)} "
            "(once this is fixed, start the sweep again to resume it)"
        ) from None


def _without_password(where: str) -> str:
    if where.startswith(_JOURNAL):
        return where
    # The query may hold a password too.
    return make_url(where).set(query={}).render_as_string(hide_password=True)


def _first_line(error: BaseException | None) -> str:
    error = getattr(error, "orig", None) or error
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _configure_sqlite(storage: RDBStorage) -> None:
    """Lock before reading, and commit without waiting for the disk.

    Optuna reads a trial and then updates it, but Python's driver begins a transaction only at the
    update, so two processes could both claim a trial. Commits that don't wait for the disk can be
    lost in a power failure, which never damages the file.
    """

    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver begins no transaction by itself
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous=NORMAL")

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(storage.engine, "connect", connect)
    event.listen(storage.engine, "begin", begin)
    storage.engine.dispose()  # open connections were made without these listeners


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Set the write-ahead log. SQLite's own timeout doesn't hold for this statement."""
    deadline = time.monotonic() + _SQLITE_TIMEOUT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _open_journal(path: Path) -> BaseStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        lock = JournalFileSymlinkLock(str(path))
        lock.acquire()
        try:  # a last line that a full disk cut short: appending to it would damage the journal
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        finally:
            lock.release()
        return JournalStorage(JournalFileBackend(str(path)))
    except OSError as error:
        raise FinetuneError(f"storage: journal {path} can't be used: {error.strerror}") from None


def machine() -> str:
    """This machine, its boot and its process namespace, within which a process id is unique."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return "/".join(parts)


def this_process() -> dict[str, Any]:
    """Identifies this process, also among later ones with the same id."""
    return {"machine": machine(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def has_ended(owner: Mapping[str, Any]) -> bool:
    """Whether a process of this machine has ended; False for those of other machines."""
    if owner.get("machine") != machine():
        return False
    pid = int(owner["pid"])
    try:
        with suppress(PermissionError):
            os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return bool(_start_time(pid) != owner["started"])


def _start_time(pid: int) -> str | None:
    """In clock ticks since boot, or on macOS as a date; None for a zombie."""
    if not Path("/proc/self/stat").exists():
        return start_date(pid)
    try:
        # The process name, in parentheses, may hold spaces; the fields after it do not.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def start_date(pid: int) -> str | None:
    """When a process was started, to the second, as `ps` prints it; None for a zombie."""
    command = ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=30, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    state, _, started = done.stdout.strip().partition(" ")
    return None if state.startswith("Z") else started.strip() or None
