"""Stored arrays are built once, shared, bounded, and never read when damaged."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.system import array_store
from finetune.system.array_store import Cache, StoredArray, num_stored_bytes

SHAPE = (10, 100)
NUM_BYTES = 10 * 100 * 4 + 128


def fill(array: Any) -> dict[str, str]:
    array[:] = np.arange(1000, dtype="float32").reshape(SHAPE)
    return {"note": "filled"}


def forbidden(array: Any) -> dict[str, str]:
    raise AssertionError("built again")


def ask(place: Path, key: str = "a", build: Any = fill, limit: float = 1e9) -> StoredArray | None:
    return Cache(place, limit).open_or_build("rows", {"key": key}, SHAPE, "float32", build)


def found(stored: StoredArray | None) -> StoredArray:
    assert stored is not None
    return stored


def test_a_stored_array_is_opened_and_not_built_again(tmp_path: Path) -> None:
    built = found(ask(tmp_path))
    opened = found(ask(tmp_path, build=forbidden))
    np.testing.assert_array_equal(built.array, opened.array)
    assert opened.notes == {"note": "filled"}
    assert Cache(tmp_path, 1e9).open("rows", {"key": "b"}) is None


def test_another_description_is_another_array(tmp_path: Path) -> None:
    found(ask(tmp_path))
    with pytest.raises(AssertionError, match="built again"):
        ask(tmp_path, key="b", build=forbidden)


def test_writing_to_an_opened_array_leaves_the_file_alone(tmp_path: Path) -> None:
    found(ask(tmp_path)).array[:] = 7
    assert found(ask(tmp_path, build=forbidden)).array[0, 1] == 1


def check_and_record(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open the array as a process does that finds it unchanged for some time."""
    with monkeypatch.context() as patched:
        patched.setattr(array_store, "_SETTLED_SECONDS", 0.02)
        time.sleep(0.04)
        found(ask(place, build=forbidden))
    assert list(place.glob("rows-*/checked.json"))


def test_an_unchanged_array_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found(ask(tmp_path))
    assert not list(tmp_path.glob("rows-*/checked.json"))  # it could change at the same time stamp
    check_and_record(tmp_path, monkeypatch)
    hashed, manifest = [], array_store._manifest
    monkeypatch.setattr(
        array_store, "_manifest", lambda *given: hashed.append(given) or manifest(*given)
    )
    found(ask(tmp_path, build=forbidden))
    assert not hashed
    (data_path,) = tmp_path.glob("rows-*/data.npy")
    os.utime(data_path)
    found(ask(tmp_path, build=forbidden))
    assert len(hashed) == 1


@pytest.mark.parametrize("is_recorded", [False, True], ids=["new", "checked"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest", "list", "notes", "gone"])
def test_a_damaged_array_is_reported_and_built_again(
    damage: str,
    is_recorded: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found(ask(tmp_path))
    if is_recorded:
        check_and_record(tmp_path, monkeypatch)
    (data_path,) = tmp_path.glob("rows-*/data.npy")
    if damage == "flip":
        content = bytearray(data_path.read_bytes())
        content[-1] ^= 1
        data_path.write_bytes(content)
    elif damage == "truncate":
        os.truncate(data_path, 1000)
    elif damage == "manifest":
        (data_path.parent / "manifest.json").write_text("{")
    elif damage == "list":
        (data_path.parent / "manifest.json").write_text("[]")
    elif damage == "notes":
        manifest = data_path.parent / "manifest.json"
        manifest.write_text(manifest.read_text().replace("filled", "filmed"))
    else:
        data_path.unlink()
    assert found(ask(tmp_path)).array[0, 5] == 5
    assert "damaged" in capsys.readouterr().out


def test_an_array_without_a_manifest_was_never_finished(tmp_path: Path) -> None:
    found(ask(tmp_path))
    (manifest,) = tmp_path.glob("rows-*/manifest.json")
    manifest.unlink()
    assert Cache(tmp_path, 1e9).open("rows", {"key": "a"}) is None


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        ask(tmp_path, build=forbidden)
    assert num_stored_bytes(tmp_path) == 0
    assert found(ask(tmp_path)).array[0, 5] == 5


def _die_while_building(place: Path) -> None:
    def build(array: Any) -> dict[str, str]:
        array[:5] = 1
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    ask(place, build=build)


def _count_a_build(place: Path, counted: Any) -> None:
    def build(array: Any) -> dict[str, str]:
        with counted.get_lock():
            counted.value += 1
        time.sleep(0.3)
        return fill(array)

    stored = found(ask(place, build=build))
    assert stored.array[9, 99] == 999


def test_what_a_killed_builder_leaves_is_not_read(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    process = context.Process(target=_die_while_building, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert found(ask(tmp_path)).array[0, 5] == 5
    assert not list(tmp_path.glob(".rows-*"))


def test_eight_processes_at_once_build_an_array_once(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    counted = context.Value("i", 0)
    processes = [context.Process(target=_count_a_build, args=(tmp_path, counted)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert counted.value == 1


def test_the_least_recently_used_array_is_evicted_first(tmp_path: Path) -> None:
    for age, key in enumerate("abc"):
        ask(tmp_path, key)
        for manifest in tmp_path.glob("rows-*/manifest.json"):
            if manifest.stat().st_mtime > 10:
                os.utime(manifest, (age, age))
    space_for_three = 3.5 * (NUM_BYTES + 100)
    found(ask(tmp_path, "d", limit=space_for_three))
    with pytest.raises(AssertionError, match="built again"):
        ask(tmp_path, "a", build=forbidden)
    for key in "bcd":
        found(ask(tmp_path, key, build=forbidden))


def test_an_open_array_is_never_evicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_use = found(ask(tmp_path, "a"))
    assert ask(tmp_path, "b", limit=1.5 * NUM_BYTES) is None
    assert "continuing without" in capsys.readouterr().out
    assert in_use.array[9, 99] == 999
    del in_use
    found(ask(tmp_path, "b", limit=1.5 * NUM_BYTES))


def test_an_array_larger_than_the_limit_evicts_nothing(tmp_path: Path) -> None:
    ask(tmp_path, "a")
    assert ask(tmp_path, "b", limit=100) is None
    found(ask(tmp_path, "a", build=forbidden))


def test_an_unusable_directory_is_reported_and_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert ask(tmp_path / "file" / "cache") is None
    assert "continuing without" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", [False, True], ids=["missing", "damaged"])
def test_two_readers_of_a_missing_or_damaged_array_both_get_it(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faster one keeps it open, and the other must not wait for that."""
    if damaged:
        ask(tmp_path)
        (data,) = tmp_path.glob("*/data.npy")
        data.write_bytes(data.read_bytes()[:-8])
    meet, acquire = threading.Barrier(2), array_store._Lock.acquire_shared

    def acquire_together(self: array_store._Lock) -> None:
        acquire(self)
        with suppress(threading.BrokenBarrierError):
            meet.wait(1)

    monkeypatch.setattr(array_store._Lock, "acquire_shared", acquire_together)
    got: list[StoredArray | None] = []
    both = [threading.Thread(target=lambda: got.append(ask(tmp_path)), daemon=True) for _ in "ab"]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(20)
    first, second = (found(stored).array for stored in got)
    assert np.array_equal(first, second)
