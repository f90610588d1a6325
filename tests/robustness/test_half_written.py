"""Processes killed during a write: no partial file is ever read, and no remains are permanent."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune
from finetune.__main__ import main
from finetune.datasets.download import fetch_data
from finetune.runs.run_dir import RunDir
from finetune.system.array_store import Cache, num_stored_bytes
from tests.conftest import Train
from tests.robustness.test_interrupted import outcome
from tests.support.file_server import FileServer, serve
from tests.support.picture_trees import tree, zipped


def die_at(place: str) -> None:
    """End by SIGKILL just before a half-written file or folder is renamed to this name."""
    rename, replace = Path.rename, Path.replace

    def killing(act: Any) -> Any:
        def carry_out(self: Path, target: Any) -> Any:
            if Path(target).name.startswith(place) or self.name.startswith(place):
                for file in [self] if self.is_file() else self.glob("data.npy"):
                    os.truncate(file, file.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return act(self, target)

        return carry_out

    Path.rename, Path.replace = killing(rename), killing(replace)  # type: ignore[method-assign]


def child(place: str, call: str, given: Any) -> None:
    os.environ["WANDB_MODE"] = "disabled"
    torch.set_num_threads(1)
    die_at(place)
    if call == "main":
        main(given)
    elif call == "run":
        os.environ["WANDB_RUN_ID"] = "run"
        finetune.train_and_finetune(**given)
    elif call == "fetch":
        fetch_data(*given)
    else:
        build(Path(given))


def build(place: Path) -> None:
    def fill(array: Any) -> dict[str, str]:
        array[:] = 1
        return {}

    Cache(place, 1e9).open_or_build("rows", {"key": place.name}, (1000,), "float32", fill)


@pytest.fixture(scope="module")
def children() -> Iterator[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune.sweep.preload", "tests.robustness.test_half_written"])
    yield context


def killed(children: Any, place: str, call: str, given: Any) -> None:
    process: BaseProcess = children.Process(target=child, args=(place, call, given))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def left_in(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.name.endswith((".tmp", ".unpacking"))]


@pytest.fixture(scope="module")
def finished(train_once: Train) -> Path:
    return train_once(epochs=1).path


@pytest.mark.slow
@pytest.mark.real_network
@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("report.html", ["report", "RUNS"]),
        ("runs.csv", ["report", "RUNS"]),
        ("evaluation.json", ["evaluate", "RUN"]),
        ("model.pth", ["export", "RUN", "--format", "state_dict"]),
        ("model.onnx", ["export", "RUN", "--format", "onnx"]),
    ],
)
def test_a_command_killed_during_a_write_keeps_the_old_file_and_can_be_repeated(
    file: str, command: list[str], children: Any, finished: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "run"
    shutil.copytree(finished, run_dir)
    places = {"RUNS": str(run_dir.parent), "RUN": str(run_dir)}
    words = [places.get(word, word) for word in command]
    target = (run_dir.parent if command[0] == "report" else run_dir) / file
    if file == "runs.csv":
        target.write_text("the old one")
    killed(children, file, "main", words)
    assert not target.exists() or target.read_text() == "the old one"
    assert left_in(tmp_path), "it was killed before it wrote"
    assert not main(words)
    assert target.stat().st_size > 100
    assert left_in(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    ["config.yaml", "metrics.csv", "best.ckpt", "predictions.npz", "last.ckpt", "result.json",
     "images-", "activations-"],
)  # fmt: skip
def test_a_run_killed_during_a_write_has_the_result_of_an_uninterrupted_run(
    file: str,
    children: Any,
    fields: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    fields |= {"strategy": "freeze", "epochs": 2, "image_size": 32, "keep_last": True}
    monkeypatch.setenv("WANDB_RUN_ID", "run")
    finetune.train_and_finetune(
        **fields | {"out": tmp_path / "other", "cache_dir": tmp_path / "other-cache"}
    )
    killed(children, file, "run", fields)
    assert left_in(tmp_path)
    assert not RunDir(tmp_path / "runs" / "run").finished
    finetune.train_and_finetune(**fields)
    assert outcome(tmp_path / "runs" / "run") == outcome(tmp_path / "other" / "run")
    assert left_in(tmp_path) == []


@pytest.mark.slow
def test_remains_of_a_killed_eviction_or_build_are_deleted(children: Any, tmp_path: Path) -> None:
    killed(children, "rows-", "build", tmp_path)
    assert left_in(tmp_path)
    Cache(tmp_path, 1e9).open_or_build("other", {}, (10,), "float32", lambda array: {})
    assert left_in(tmp_path) == []
    assert num_stored_bytes(tmp_path) < 1000


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve(zipped(tree())) as served:
        yield served


@pytest.mark.parametrize("note", ["whole", "half", "gone"])
def test_a_download_killed_while_unpacking_resumes_from_the_archive(
    note: str, children: Any, server: FileServer, tmp_path: Path
) -> None:
    target = tmp_path / "data"
    killed(children, ".data.unpacking", "fetch", (target, server.url, None))
    assert left_in(tmp_path)
    assert not target.exists()
    note_path = tmp_path / "data.zip.part.json"
    if note == "half":
        os.truncate(note_path, 20)
    elif note == "gone":
        note_path.unlink()
    fetch_data(target, server.url, None)
    assert sorted(p.name for p in target.iterdir()) == ["manifest.json", "train", "val"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]
    assert all(asked is None or not asked.startswith("bytes=0") for asked in server.requests[1:])
