"""Names of files, classes, folders and runs are always shown as text and never interpreted."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import onnxruntime
import pytest
import yaml

from finetune.model.weights import write_checkpoint
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir
from tests.conftest import ROOT
from tests.support.chromium import Browser
from tests.support.picture_trees import jpeg
from tests.support.process_server import fast_python
from tests.support.tiny_network import tiny

pytestmark = pytest.mark.slow

CLASSES = [
    b"<img src=x onerror=window.owned=1>",
    b"$(touch owned);`touch owned`",
    b"[bold]red[nothing]",
    b"[",
    b"up..%2f..%2f ..",
    b"new\nline\t'\"\\",
    b"\x1b[31mred\x1b]0;owned\x07",
    b"%s %d %n {0} %(x)s",
    "snö☃\u202e".encode(),
    b"latin\xe9",
]
# "[/x]" is a path: the folder "[" and a name in it. rich would read the end of a style.
FILES = [b"a\n'\"$(touch owned).jpg", b"x]<b>%s.jpg", b"\xff\xfe\x1b[2J.jpg"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a hostile name, and data in which every name is hostile."""
    folder = tmp_path_factory.mktemp("names") / "[/x] $(touch owned)?a=b&<i>%41#"
    for i, name in enumerate(CLASSES):
        for split in ("train", "val"):
            class_dir = folder / "data" / split / os.fsdecode(name)
            class_dir.mkdir(parents=True)
            for j, file in enumerate(FILES):
                (class_dir / os.fsdecode(file)).write_bytes(
                    jpeg(100 * i + j + 50 * (split == "val"))
                )
    bad = (
        folder / "data" / "train" / os.fsdecode(CLASSES[0]) / os.fsdecode(b"bad\n\x1b[31m\xff.png")
    )
    bad.write_bytes(b"no picture")
    return folder


def command(folder: Path, *words: object, code: int = 0, **environment: str) -> str:
    """The standard output and errors of a command."""
    done = subprocess.run(
        [fast_python(), *map(str, words)],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
        check=False,
    )
    output = done.stdout.decode()  # strictly: a terminal may refuse output that is not text
    assert done.returncode == code, output
    assert "Traceback" not in output
    assert "\x1b" not in output and "\x07" not in output
    assert not list(folder.rglob("owned"))
    return output


@pytest.fixture(scope="module")
def run(place: Path, weights: Path) -> RunDir:
    """A complete run with W&B offline."""
    output = command(
        place,
        ROOT / "agent.py",
        *("--data_dir", "data", "--strategy", "freeze", "--epochs", 1, "--image_size", 32),
        *("--model", weights.stem, "--weights", weights, "--skip_unreadable"),
        *("--val_fraction", 0.4, "--batch_size", 4),
        *("--name", "[/bold]<b>$(touch owned)\n%{x}", "--accelerator", "cpu"),
        WANDB_MODE="offline",
    )
    assert "best val_acc" in output
    (result,) = (place / "runs").glob("*/result.json")
    return RunDir(result.parent)


def test_a_run_keeps_every_name_unchanged(run: RunDir) -> None:
    result = RunResult.load(run.path)
    assert sorted(map(os.fsencode, result.class_names)) == sorted(CLASSES)
    assert len(result.unreadable) == 1
    assert result.config["name"] == "[/bold]<b>$(touch owned)\n%{x}"
    assert run.read_config().data_dir.name == "data"
    assert list(run.path.glob("wandb/offline-run-*/*.wandb"))
    _, _, paths = run.read_predictions()
    assert all(Path(path).exists() for path in paths)


def test_check_returns_the_names_as_json(place: Path) -> None:
    content = command(place, "-m", "finetune", "check", "--data_dir", "data", "--json", code=1)
    held = json.loads(content)["counts"]["val"]
    assert sorted(map(os.fsencode, held)) == sorted(CLASSES)


def test_predict_returns_the_names_as_json(place: Path, run: RunDir) -> None:
    answers = json.loads(
        command(place, "-m", "finetune", "predict", run.path, "data/val", "--json")
    )
    assert len(answers) == len(CLASSES) * len(FILES)
    assert {os.fsencode(a["class"]) for a in answers} <= set(CLASSES)
    assert all((place / answer["path"]).exists() for answer in answers)


def test_evaluate_records_and_shows_the_names(place: Path, run: RunDir) -> None:
    assert "accuracy" in command(place, "-m", "finetune", "evaluate", run.path)
    (record,) = run.read_evaluations()
    assert sorted(os.fsencode(one["class"]) for one in record["per_class"]) == sorted(CLASSES)


def test_export_keeps_the_names(place: Path, run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "$(touch owned)[/x].onnx"
    command(place, "-m", "finetune", "export", run.path, "--format", "onnx", "--out", out)
    held = onnxruntime.InferenceSession(str(out)).get_modelmeta().custom_metadata_map
    assert sorted(map(os.fsencode, json.loads(held["class_names"]))) == sorted(CLASSES)


def test_the_page_shows_the_names_as_text_and_executes_nothing(place: Path, run: RunDir) -> None:
    output = command(place, "-m", "finetune", "report", "runs")
    assert "report.html" in output
    with Browser() as browser:
        browser.open(place / "runs" / "report.html", 1280, 900)
        assert browser.complaints == []
        assert browser.run("window.owned") is None
        assert browser.run("document.querySelectorAll('img[onerror], main b > b, i').length") == 0
        shown = browser.run("document.body.innerText + document.querySelector('#confusion').textContent")  # noqa: E501  # fmt: skip
    assert "<img src=x onerror" in shown
    assert "[/bold]<b>$(touch owned)" in shown
    assert "[bold]red[nothing]" in shown


def test_a_sweep_shows_brackets_unchanged(place: Path, weights: Path) -> None:
    fields = {
        "data_dir": "data",
        "model": weights.stem,
        "weights": str(weights),
        "strategy": "freeze",
        "epochs": 1,
        "image_size": 32,
        "skip_unreadable": True,
        "accelerator": "cpu",
        "out": "[/swept]?x=1",
    }
    content = {
        "program": "agent.py",
        "name": "[/bold]../$(touch owned)%s",
        "method": "grid",
        "parameters": {k: {"value": v} for k, v in fields.items()}
        | {"name": {"values": ["[/red]one\n", "<b>two\x1b[31m"]}},
    }
    (place / "sweep.yaml").write_text(yaml.safe_dump(content))
    output = command(place, "-m", "finetune", "sweep", "sweep.yaml")
    assert "2 finished" in output
    assert "[/red]one" in output
    assert len(list((place / "[/swept]?x=1").glob("*.db"))) == 1
    assert len(list((place / "[/swept]?x=1").glob("*/result.json"))) == 2


def test_a_class_name_of_a_checkpoint_is_shown_as_text(place: Path, tmp_path: Path) -> None:
    content = {
        "model": "tiny",
        "state_dict": tiny(2, seed=3).state_dict(),
        "class_names": ["\x1b[31m", "two\nlines"],
        "image_size": 32,
    }
    write_checkpoint(content, tmp_path / "best.ckpt")
    output = command(place, "-m", "finetune", "predict", tmp_path, "data/val")
    assert len(output.splitlines()) == len(CLASSES) * len(FILES)
