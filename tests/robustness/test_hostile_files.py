"""Files from untrusted sources: content that would be executed is refused by every reader."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import finetune
from finetune.__main__ import main
from finetune.analysis.read_runs import read_runs
from finetune.model.weights import read_file, write_checkpoint
from finetune.runs.run_dir import RunDir
from finetune.system.errors import FinetuneError
from tests.support.process_server import fast_python
from tests.support.synthetic import write_run
from tests.support.tiny_network import tiny

pytestmark = pytest.mark.real_network  # an exported state dict is tried in torchvision's


class Explosive:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.place),))


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """The file that an executed pickle would create."""
    place = tmp_path / "owned"
    pickle.loads(pickle.dumps(Explosive(place)))  # it does
    place.rmdir()
    return place


def plain(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def zipped(content: Any, path: Path) -> None:
    torch.save(content, path)


def legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [plain, zipped, legacy])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "best.ckpt", "last.ckpt"])
def test_a_pickle_is_never_executed(
    name: str,
    write: Callable[[Any, Path], None],
    owned: Path,
    fields: dict[str, Any],
    tmp_path: Path,
    digits: Path,
) -> None:
    run_dir = RunDir(tmp_path / "runs" / "run")
    run_dir.path.mkdir(parents=True)
    path = run_dir.path / name
    write({"state_dict": Explosive(owned), "class_names": ["a"], "image_size": 32}, path)
    calls: list[Callable[[], Any]] = [
        lambda: finetune.train_and_finetune(**fields | {"weights": path})
    ]
    if name == "best.ckpt":
        calls += [
            lambda: main(["predict", str(run_dir.path), str(digits)]),
            lambda: main(["evaluate", str(run_dir.path), str(digits / "val")]),
            lambda: main(["export", str(run_dir.path), "--format", "state_dict"]),
            lambda: finetune.load_best(run_dir.path),
            lambda: finetune.train_and_finetune(**fields | {"weights": run_dir.path}),
        ]
    if name == "last.ckpt":
        run_dir.write_config(finetune.RunConfig.from_fields(fields))
        calls.append(lambda: finetune.train_and_finetune(resume=run_dir.path))
    for call in calls:
        with pytest.raises(FinetuneError, match=name):
            call()
        assert not owned.exists()


@pytest.mark.parametrize("key", ["logits", "labels", "paths"])
def test_a_pickle_among_predictions_is_never_executed(
    key: str, owned: Path, tmp_path: Path
) -> None:
    run_dir = RunDir(write_run(tmp_path / "runs", "run"))
    arrays = dict(zip(("logits", "labels", "paths"), run_dir.read_predictions(), strict=True))
    arrays[key] = np.array([Explosive(owned)] * len(arrays["labels"]), dtype=object)
    np.savez(run_dir.predictions_path, **arrays)
    (outcome,) = read_runs(tmp_path / "runs")
    assert outcome.state == "unreadable"
    assert "predictions.npz is damaged" in outcome.reason
    assert not owned.exists()


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000_000))
    with pytest.raises(FinetuneError, match="compressed"):
        read_file(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "content",
    [
        {"class_names": "ab", "image_size": 32},
        {"class_names": ["a", 7], "image_size": 32},
        {"class_names": [], "image_size": 32},
        {"class_names": ["a", "b"], "image_size": 10**9},
        {"class_names": ["a", "b"], "image_size": "32"},
        {"class_names": ["a", "b", "c"], "image_size": 32},
        {"class_names": ["a", "b"], "image_size": 32, "state_dict": {}},
        {"class_names": ["a", "b"], "image_size": 32, "state_dict": [1]},
        {"class_names": ["a", "b"], "image_size": 32, "state_dict": {"conv1.weight": 3}},
        {"class_names": ["a", "b"], "image_size": 32, "state_dict": None},
    ],
)
def test_an_invalid_checkpoint_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint({"state_dict": tiny(2, seed=1).state_dict()} | content, tmp_path / "best.ckpt")
    with pytest.raises(FinetuneError, match=r"best\.ckpt"):
        finetune.load_best(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", "<b>fast"), ("strategy", "<script>"), ("epochs", [])],
)
def test_an_invalid_result_is_left_out(field: str, value: Any, tmp_path: Path) -> None:
    good, bad = (write_run(tmp_path / "runs", name) for name in ("good", "odd"))
    content = json.loads((bad / "result.json").read_text())
    content["config"][field] = value
    (bad / "result.json").write_text(json.dumps(content))
    assert not main(["report", str(tmp_path / "runs")])
    states = {one.run_id: one.state for one in read_runs(tmp_path / "runs")}
    assert states == {good.name: "finished", "odd": "unreadable"}


def small_sweep(fields: dict[str, Any], place: Path, storage: str) -> tuple[int, str]:
    """Exit code and output of a sweep of two short runs, in its own process."""
    shared = fields | {"epochs": 1, "image_size": 32, "strategy": "freeze", "out": place / "runs"}
    parameters: dict[str, Any] = {
        k: {"value": str(v) if isinstance(v, Path) else v} for k, v in shared.items()
    }
    parameters["seed"] = {"values": [1, 2]}
    content = {"program": "agent.py", "method": "grid", "parameters": parameters}
    (place / "small.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [fast_python(), "-m", "finetune", "sweep", "small.yaml", "--storage", storage],
        cwd=place,
        env={**os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_damaged_storage_gives_one_message_or_the_sweep_resumes(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "sweep.db"
    where = f"sqlite:///{path}" if kind == "sqlite" else f"journal:{path}"
    assert small_sweep(fields, tmp_path, where)[0] == 0
    content = path.read_bytes()
    quarter = len(content) // 4
    if kind == "sqlite":
        damages = [content[:quarter] + bytes(2 * quarter) + content[3 * quarter :]]
    else:  # the second trial was interrupted during the write, and is resumed
        damages = [content.replace(b'"', b"'"), content[:-10]]
    for i, damaged in enumerate(damages):
        path.write_bytes(damaged)
        code, output = small_sweep(fields, tmp_path, where)
        assert "Traceback" not in output
        if i == 0:
            assert (code, str(path) in output) == (1, True), output
            assert output.count("error: ") == 1
        else:
            assert code == 0 and "2 finished" in output
