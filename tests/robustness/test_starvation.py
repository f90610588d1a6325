"""Lack of memory, disk space and file handles: one clear message, and a resume once it is fixed."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.fields import RunConfig
from finetune.data.decode import Preprocessing
from finetune.data.images import open_images
from finetune.data.layout import list_pictures
from finetune.data.pictures import find_pictures
from finetune.model.network import load_best
from finetune.model.weights import read_checkpoint
from finetune.runs.result import RunResult, read_failure
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.sweep.trial_queue import TrialQueue
from finetune.system.array_store import Cache
from finetune.system.errors import DataError, FinetuneError, Shortage
from finetune.training.train import run, train_and_finetune
from tests.conftest import ROOT, Train
from tests.robustness.test_interrupted import outcome
from tests.sweep.test_runner import base, check_complete, complete, content, environment, start
from tests.sweep.test_trial_queue import grid, work_off
from tests.system.test_array_store import ask, forbidden, found
from tests.test_agent import agent, as_flags

__all__ = ["base"]

pytestmark = pytest.mark.real_network  # the sizes of the disks are those of its files

# memory

WITH_LITTLE_MEMORY = """
import resource, sys
import agent, finetune.training.train
from finetune.system.shutdown import run_cli
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv.pop(1)) * 1_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run_cli(agent.main)
"""


def with_little_memory(num_mb: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """agent.py with this much memory beyond what its imports need."""
    return subprocess.run(
        [sys.executable, "-c", WITH_LITTLE_MEMORY, str(num_mb), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_lack_of_memory_names_the_batch_size_and_the_run_can_be_resumed(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    changed = {"strategy": "scratch", "image_size": 256, "batch_size": 20, "epochs": 1}
    done = with_little_memory(300, *as_flags(fields | changed))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "out of memory at batch_size 20" in done.stderr
    (place,) = (tmp_path / "runs").iterdir()
    failure = read_failure(place / "failure.json")
    assert failure and "--batch_size" in failure["reason"]
    assert with_little_memory(8000, f"--resume={place}").returncode == 0
    assert RunResult.load(place).epochs_run == 1
    assert not (place / "failure.json").exists()


def test_lack_of_gpu_memory_gives_the_same_message(config: RunConfig, tmp_path: Path) -> None:
    def run_out(row: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(FinetuneError, match="out of memory at batch_size 5"):
        run(config, RunDir(tmp_path / "run"), run_out)
    failure = read_failure(tmp_path / "run" / "failure.json")
    assert failure and failure["state"] == "failed"
    assert "pass a smaller --batch_size" in failure["reason"]


# disk


def mount(disk: Path, *options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and os.geteuid() != 0:
        pytest.skip(f"a disk of its own needs the right to mount: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A separate disk, so far with almost no space."""
    place = tmp_path / "disk"
    place.mkdir()
    mount(place, "size=4k")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def make_room(disk: Path) -> None:
    (disk / "ballast").unlink(missing_ok=True)
    mount(disk, "remount", "size=500m")


def one_message(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def undisturbed(
    digits: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a short run, and its expected result."""
    place = tmp_path_factory.mktemp("undisturbed")
    fields = {
        "data_dir": digits, "model": weights.stem, "weights": weights, "val_fraction": 0,
        "image_size": 64,
        "batch_size": 5, "learning_rate": 0.01, "epochs": 3, "accelerator": "cpu",
        "keep_last": True,
    }  # fmt: skip
    os.environ["WANDB_MODE"] = "disabled"
    train_and_finetune(**fields, out=place / "runs", cache_dir=place / "cache")
    (run_dir,) = (place / "runs").iterdir()
    return fields, outcome(run_dir)


@pytest.mark.parametrize(
    ("size", "full_after", "what"),
    [
        ("8k", None, "best.ckpt"),
        ("30m", None, "best.ckpt"),
        ("80m", None, "last.ckpt"),
        ("400m", 0, "No space left"),
        ("400m", 2, "result.json"),
    ],
)
def test_a_run_stopped_by_a_full_disk_resumes_with_the_same_result(
    size: str,
    full_after: int | None,
    what: str,
    disk: Path,
    undisturbed: tuple[dict[str, Any], dict[str, Any]],
    tmp_path: Path,
) -> None:
    fields, expected = undisturbed
    mount(disk, "remount", f"size={size}")
    fields = fields | {"out": disk / "runs", "cache_dir": tmp_path / "cache"}
    place = disk / "runs" / "it"

    def fill_up(row: Any) -> None:
        if row["epoch"] == full_after:
            fill(disk)

    with pytest.raises(Shortage, match="No space left on device; free some disk space") as short:
        run(RunConfig.from_fields(fields), RunDir(place), fill_up)
    assert what in str(short.value)
    rows = read_metrics(place / "metrics.csv")
    assert len(rows) == (size == "80m" if full_after is None else full_after + 1)
    if full_after is not None:
        assert read_checkpoint(place / "last.ckpt")["epoch"] == full_after
        assert read_checkpoint(place / "best.ckpt")["epoch"] <= full_after
    assert not (place / "result.json").exists() and not list(place.glob(".*.tmp"))
    make_room(disk)
    train_and_finetune(resume=place)
    assert outcome(place) == expected


@pytest.mark.slow
def test_a_full_disk_gives_one_message_that_says_how_to_resume(
    disk: Path, undisturbed: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    fields, expected = undisturbed
    mount(disk, "remount", "size=80m")
    flags = as_flags(fields | {"out": disk / "runs", "cache_dir": tmp_path / "cache"})
    said = one_message(agent(*flags, WANDB_MODE="offline"))
    (place,) = (disk / "runs").iterdir()
    assert f"free some disk space, then continue with --resume {place}" in said
    make_room(disk)
    done = agent(f"--resume={place}", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert outcome(place) == expected


@pytest.mark.slow
def test_output_to_a_full_disk_gives_one_message(digits: Path) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-m", "finetune", "check", "--data_dir", str(digits)],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120, check=False,
        )  # fmt: skip
    assert "No space left on device" in one_message(done)


@pytest.mark.parametrize("size", ["8k", "400k", "1m", "read-only"])
def test_a_cache_without_space_changes_no_result(
    size: str,
    disk: Path,
    undisturbed: tuple[dict[str, Any], dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields, expected = undisturbed
    fields = fields | {"out": tmp_path / "runs", "cache_dir": disk / "cache", "cache_gb": 1}
    if size == "read-only":
        mount(disk, "remount", "size=100m")
        config = RunConfig.from_fields(fields)
        run(config, RunDir(tmp_path / "first"))
        gc.collect()  # a disk that is written to can't be made read-only
        mount(disk, "remount", "ro")
    else:
        mount(disk, "remount", f"size={size}")
    capsys.readouterr()
    train_and_finetune(**fields)
    assert "continuing without" in capsys.readouterr().out
    (place,) = (tmp_path / "runs").iterdir()
    assert outcome(place) == expected
    assert not list(disk.glob("cache/.*"))


@pytest.mark.slow
def test_a_read_only_folder_gives_one_message_and_can_be_read(
    disk: Path, train: Train, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_room(disk)
    done = train(out=disk / "runs", epochs=1)
    result = RunResult.load(done.path)
    gc.collect()
    mount(disk, "remount", "ro")
    said = one_message(agent(*as_flags(fields | {"out": disk / "runs"})))
    assert "Read-only file system; pass another --out" in said
    assert load_best(done.path).result == result
    monkeypatch.setattr("finetune.sweep.storage._TRIES", 1)
    with pytest.raises(FinetuneError, match="can't be used: unable to open database file"):
        TrialQueue(grid(), f"sqlite:///{disk}/grid.db", 6)
    with pytest.raises(FinetuneError, match="Read-only file system"):
        TrialQueue(grid(), f"journal:{disk}/grid.journal", 6)


def end_of_each(folder: Path) -> dict[int, dict[str, Any]]:
    places = [path.parent for path in (folder / "runs").glob("*/result.json")]
    return {RunResult.load(place).seed: outcome(place) for place in places}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "num_trials", "workers", "num_before", "words"),
    [
        ("8k", 2, 1, 0, "can't be used: database or disk is full"),
        ("160k", 2, 1, 0, "can't be used any more: database or disk is full"),
        ("190m", 6, 2, 2, "free some disk space (the sweep has ended; start it again"),
    ],
)
def test_a_sweep_stopped_by_a_full_disk_resumes(
    size: str,
    num_trials: int,
    workers: int,
    num_before: int,
    words: str,
    base: Any,
    disk: Path,
    tmp_path: Path,
) -> None:
    given = content(base | {"strategy": "freeze", "keep_last": True}, seed=range(num_trials))
    mount(disk, "remount", f"size={size}")
    process = start(disk.parent, given, "--workers", str(workers), "--out", str(disk / "runs"))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert words in said and "Traceback" not in said
    earlier = {p: p.read_bytes() for p in disk.glob("runs/*/result.json")}
    assert len(earlier) >= num_before
    make_room(disk)
    said = complete(disk.parent, given, "--out", str(disk / "runs"))
    assert f"{num_trials} finished" in said and "failed" not in said
    check_complete(disk, num_trials)
    assert all(path.read_bytes() == content for path, content in earlier.items())
    complete(tmp_path, given)
    assert end_of_each(disk) == end_of_each(tmp_path)


@pytest.mark.slow
def test_a_journal_cut_short_by_a_full_disk_resumes_without_its_partial_line(
    disk: Path, tmp_path: Path
) -> None:
    where = f"journal:{disk}/grid.journal"
    mount(disk, "remount", "size=16k")
    with pytest.raises(OSError, match="No space left"):
        work_off(TrialQueue(grid(60), where, 60))
    assert not (disk / "grid.journal").read_bytes().endswith(b"\n")
    make_room(disk)
    trial_queue = TrialQueue(grid(60), where, 60)
    work_off(trial_queue)
    assert trial_queue.is_complete()
    assert [s.state for s in trial_queue.results()] == ["finished"] * 60


# file handles


@contextmanager
def few_handles(spare: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    plugs = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        with suppress(OSError):
            while True:
                plugs.append(os.open("/dev/null", os.O_RDONLY))
        for plug in plugs[:spare]:
            os.close(plug)
        del plugs[:spare]
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for plug in plugs:
            os.close(plug)


def test_a_cache_entry_is_not_called_damaged_for_lack_of_file_handles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found(ask(tmp_path))
    for spare in (0, 1):
        with few_handles(spare):
            assert ask(tmp_path) is None
        said = capsys.readouterr().out
        assert "Too many open files" in said and "continuing without it" in said
    found(ask(tmp_path, build=forbidden))


def test_pictures_are_not_called_unreadable_or_missing_for_lack_of_file_handles(
    digits: Path, tmp_path: Path
) -> None:
    pictures = find_pictures(digits / "train")
    cache = Cache(tmp_path, 1e9)
    open_images(pictures.subset([0]), Preprocessing(8), True, None)  # Pillow's plugins are imported
    with few_handles(0):
        with pytest.raises(OSError, match="Too many open files"):
            open_images(pictures, Preprocessing(32), True, None)
        with pytest.raises(DataError, match="can't be read: Too many open files"):
            list_pictures(digits / "train")
    for spare in range(4):
        with few_handles(spare), suppress(OSError, DataError):
            open_images(pictures, Preprocessing(32), True, cache)
    images, unreadable = open_images(pictures, Preprocessing(32), True, Cache(tmp_path, 1e9))
    assert unreadable == [] and len(images.pictures) == len(pictures)


WITH_FEW_HANDLES = """
import os, resource, sys
import agent, finetune.training.train, finetune.__main__, finetune.sweep.runner
from finetune.system.shutdown import run_cli
limit = len(os.listdir("/proc/self/fd")) - 1 + int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
run_cli(finetune.__main__.main if sys.argv[1] == "sweep" else agent.main)
"""


def with_few_handles(count: int, *words: str, **changed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITH_FEW_HANDLES, str(count), *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env=environment(**changed),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mode"), [(0, "disabled"), (1, "offline"), (12, "offline")])
def test_a_run_without_file_handles_gives_one_message_and_can_be_resumed(
    count: int,
    mode: str,
    undisturbed: tuple[dict[str, Any], dict[str, Any]],
    tmp_path: Path,
) -> None:
    fields, expected = undisturbed
    flags = as_flags(fields | {"out": tmp_path / "runs", "cache_dir": tmp_path / "cache"})
    said = one_message(with_few_handles(count, *flags, WANDB_MODE=mode))
    assert "Too many open files" in said
    if count > 1:  # with fewer the run has no directory yet
        (place,) = (tmp_path / "runs").iterdir()
        assert f"ulimit -n), then continue with --resume {place}" in said
        assert agent(f"--resume={place}").returncode == 0
        assert outcome(place) == expected


@pytest.mark.slow
@pytest.mark.parametrize("count", [pytest.param(4, marks=pytest.mark.long), 12])
def test_a_sweep_without_file_handles_gives_one_message_and_can_be_resumed(
    count: int, base: Any, tmp_path: Path
) -> None:
    given = content(base, seed=range(3))
    complete(tmp_path, given, "--max_runs", "1")
    words = ["sweep", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "runs")]
    said = one_message(with_few_handles(count, *words))
    assert "Too many open files" in said or "unable to open database file" in said
    complete(tmp_path, given)
    check_complete(tmp_path, 3)
