"""Storages that several processes open at once."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

from finetune.sweep.storage import open_storage, sqlite_url


def test_a_sqlite_file_that_another_process_writes_is_opened_once_it_has_ended(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sweep.db"
    open_storage(sqlite_url(path))
    other = sqlite3.connect(path, check_same_thread=False)
    # The second process is about to switch to the write-ahead log, as the first one has done.
    other.execute("PRAGMA journal_mode=DELETE")
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(1, other.rollback).start()
    assert open_storage(sqlite_url(path)).get_all_studies() == []
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)
