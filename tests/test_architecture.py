"""The floors: imports go downward only, or to a named neighbour."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

from .conftest import ROOT

FLOORS: dict[str, int] = {
    "errors": 0, "strategies": 0, "config": 0, "flags": 0, "result": 0, "progress": 0,
    "layout": 0, "files": 0, "stopping": 0,
    "cache": 1, "sources": 1, "data": 1, "weights": 1, "model": 1, "archive": 1, "members": 1,
    "fetch": 1, "download": 1, "check": 1,
    "settle": 2, "activations": 2, "module": 2, "record": 2, "tracking": 2,
    "train": 3,
    "outcomes": 4, "sweep": 4, "intervals": 4, "standings": 4, "compare": 4, "report": 4,
    "predict": 4, "evaluate": 4, "export": 4,
    "gpus": 5, "demo": 5, "__main__": 6, "__init__": 6,
}  # fmt: skip

NEIGHBOURS = {
    ("stopping", "errors"), ("progress", "stopping"),
    ("config", "strategies"), ("config", "errors"), ("flags", "config"),
    ("flags", "errors"), ("files", "errors"), ("config", "files"),
    ("result", "config"), ("result", "errors"), ("result", "strategies"), ("result", "files"),
    ("layout", "errors"),
    ("model", "weights"), ("data", "cache"), ("check", "data"), ("download", "fetch"),
    ("download", "archive"), ("download", "members"), ("archive", "members"),
    ("module", "activations"), ("record", "module"),
    ("outcomes", "intervals"), ("compare", "outcomes"), ("compare", "intervals"),
    ("standings", "outcomes"), ("standings", "intervals"), ("compare", "standings"),
    ("report", "standings"), ("sweep", "standings"),
    ("report", "compare"), ("report", "outcomes"), ("report", "sweep"), ("sweep", "outcomes"),
    ("evaluate", "predict"), ("export", "predict"),
}  # fmt: skip

LIGHT = (
    "errors", "stopping", "strategies", "config", "flags", "files", "result", "progress", "layout",
    "archive", "members", "fetch", "download", "sources", "cache", "standings", "compare", "report",
    "sweep",
)  # fmt: skip
"""Rooms that import no torch when they are imported."""

HEAVY = {"torch", "torchvision", "pytorch_lightning", "torchmetrics"}


def rooms() -> list[Path]:
    return sorted((ROOT / "finetune").rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "finetune").parts[0].removesuffix(".py")


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", rooms(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward_or_to_a_named_neighbour(path: Path) -> None:
    room = room_of(path)
    assert room in FLOORS, f"{room} has no floor yet"
    for name in imports(path):
        if not name.startswith("finetune."):
            continue
        other = name.split(".")[1]
        allowed = other == room or FLOORS[other] < FLOORS[room] or (room, other) in NEIGHBOURS
        assert allowed, f"{room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"


@pytest.mark.parametrize("path", rooms(), ids=lambda p: str(p.relative_to(ROOT)))
def test_light_rooms_import_no_torch(path: Path) -> None:
    if room_of(path) in LIGHT and path.name != "preload.py":
        tops = {name.split(".")[0] for name in imports(path, top_level_only=True)}
        assert not tops & HEAVY


def test_wandb_and_optuna_have_one_room_each() -> None:
    homes: dict[str, set[str]] = {"wandb": {"tracking", "sweep", "report"}, "optuna": {"sweep"}}
    for path in rooms():
        for name in imports(path):
            allowed = homes.get(name.split(".")[0])
            assert allowed is None or room_of(path) in allowed, f"{path} imports {name}"


def test_nobody_else_compares_a_strategys_name() -> None:
    names = {"freeze", "partial", "gradual", "scratch"}
    for path in rooms():
        if room_of(path) in ("strategies", "demo"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not constants & names, f"{path}:{node.lineno}"


@pytest.mark.parametrize("package", ["finetune", "finetune.sweep"])
def test_no_lazy_name_is_that_of_a_room(package: str) -> None:
    """Importing the room would put it where the name is looked up."""
    door = import_module(package)
    places = {path.stem for path in Path(door.__path__[0]).glob("*")}
    assert not places & set(door.__all__)


def test_no_room_is_a_drawer() -> None:
    assert not {room_of(path) for path in rooms()} & {"utils", "helpers", "common", "misc"}
    page = (ROOT / "agent.py").read_text().splitlines()
    assert len(page) < 60


def test_every_module_says_what_it_turns_into_what() -> None:
    for path in rooms():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, path
