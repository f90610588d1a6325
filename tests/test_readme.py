"""The README's commands: every one is understood, and those of its main line are run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.__main__ import parse
from finetune.config.backbones import BACKBONES
from finetune.config.fields import RunConfig
from finetune.config.flags import given_fields
from finetune.config.strategies import STRATEGIES
from finetune.datasets.digits import write_digits
from finetune.model.network import build
from finetune.sweep.sweep_file import read_sweep
from tests.conftest import ROOT
from tests.test_architecture import FOLDERS

README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Indented lines and inline code that start with a program's name, comments left out."""
    text = README.replace("\\\n", " ")
    found = re.findall(r"^ {4}!?((?:python|wandb|make|pip|optuna-dashboard) .*)$", text, re.M)
    found += re.findall(r"`(python -m finetune [^`]+|python agent.py [^`]+)`", text)
    return [re.sub(r"\s+#.*", "", line).strip() for line in found]


def test_the_readme_opens_with_a_picture() -> None:
    found = re.match(r"# finetune\n\n!\[[^\]]+\]\(([^)]+)\)", README)
    assert found
    picture = ROOT / found[1]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert picture.stat().st_size < 1_000_000


def test_the_readme_has_commands() -> None:
    assert len(commands()) > 25


@pytest.mark.parametrize("command", commands())
def test_each_command_is_understood(command: str) -> None:
    words = shlex.split(command.replace("\n", " "))
    match words:
        case ["python", "-m", "finetune", *rest]:
            path = parse(rest).get("sweep")
            if path is not None and str(path) != "FILE":
                read_sweep(ROOT / path)
        case ["python", "agent.py", "--help"]:
            pass
        case ["python", "agent.py", *rest]:
            given_without = given_fields(rest)
            given_without.pop("resume", None)
            RunConfig.from_fields(given_without)
        case ["make", target]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()
        case ["pip", "install", *rest]:
            for name in (word for word in rest if word.endswith(".txt")):
                assert (ROOT / name).exists()
        case ["wandb", "sweep", file]:
            assert (ROOT / file).exists()
        case _:
            assert words[0] in ("wandb", "optuna-dashboard")


def test_the_python_example_uses_the_pictures_of_its_section() -> None:
    (call,) = re.findall(r"finetuned_model = (train_and_finetune\(.*?\))\n", README, re.S)
    given = {k.arg: ast.literal_eval(k.value) for k in ast.parse(call).body[0].value.keywords}  # type: ignore[attr-defined]
    assert str(RunConfig.from_fields(given).data_dir).endswith("data/mine")
    assert "python -m finetune sweep sweep.yaml --data_dir data/mine" in commands()


def test_the_tables_of_strategies_and_networks_are_those_of_the_package() -> None:
    for name, strategy in STRATEGIES.items():
        assert f"| `{name}` | {strategy.summary} |" in README
    for name, backbone in BACKBONES.items():
        assert re.search(rf"^\|.*`{name}`.*\| {', '.join(backbone.part_names)} \|$", README, re.M)


def test_the_tree_describes_every_file_and_no_other() -> None:
    rows = re.findall(r"^\| (.+) \| (.+) \|$", README.partition("## The tree")[2], re.M)
    folder, described = "", []
    for names, _ in rows:
        folders = re.findall(r"\*\*`(finetune/.*)`\*\*", names)
        folder = folders[0] if folders else "" if names.startswith("**") else folder
        if folder and not folders:
            described += [folder + name for name in re.findall(r"`([^`]+)`", names)]
    files = (ROOT / "finetune").rglob("*.*")
    existing = [
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.suffix in (".py", ".css", ".js")
        and (path.name != "__init__.py" or path.parent.name == "finetune")
    ]
    assert sorted(described) == sorted(existing)
    top_level = [row[0].split("/")[1] for row in re.findall(r"\*\*`(finetune/(\w+)/)`\*\*", README)]
    assert top_level == list(FOLDERS)


@pytest.fixture
def shell(tmp_path: Path) -> Path:
    """A clone with pictures at data/mine, and ImageNet's weights where torch.hub keeps them."""
    for name in ("agent.py", "sweep.yaml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "finetune", tmp_path / "finetune")
    write_digits(tmp_path / "data" / "mine", range(5, 10), train_per_class=5, val_per_class=3)
    place = tmp_path / "torch" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    network = build("resnet18", 1000, 64, seed=7).network
    torch.save(network.state_dict(), place / "resnet18-f37072fd.pth")
    return tmp_path


@pytest.mark.real_network
@pytest.mark.slow
def test_the_main_line_runs_as_written(shell: Path) -> None:
    environment = os.environ | {"TORCH_HOME": str(shell / "torch"), "WANDB_MODE": "offline"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"

    def run(command: str, *more: str) -> str:
        assert command in commands(), f"the README does not say {command!r}"
        made = list((shell / "runs").glob("*/result.json"))
        words = shlex.split(command.replace("RUN_ID", made[0].parent.name if made else "RUN_ID"))
        done = subprocess.run(
            [*words, *more],
            cwd=shell,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    mine = ["--data_dir", "data/mine", "--epochs", "2", "--image_size", "64"]
    out = run("python agent.py --data_dir data/mine --strategy partial", *mine[2:])
    assert "best val_acc" in out
    assert "report.html" in run("python -m finetune report runs")
    assert (shell / "runs" / "report.html").exists()
    picture = next((shell / "data" / "mine" / "val").rglob("*.png"))
    shutil.copy(picture, shell / "picture.jpg")
    shutil.copytree(picture.parent, shell / "folder")
    assert "picture.jpg" in run("python -m finetune predict runs/RUN_ID picture.jpg folder/")
    assert "onnx" in run("python -m finetune export runs/RUN_ID --format onnx")
    assert "accuracy" in run("python -m finetune evaluate runs/RUN_ID")
