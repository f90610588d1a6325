"""The tree: a file imports from its own folder and from folders above it, never from below."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.config.strategies import STRATEGIES

from .conftest import ROOT

FOLDERS = (
    *("system", "config", "data", "runs", "model", "features", "tracking", "training"),
    *("inference", "sweep", "analysis", "datasets"),
)

HOMES = {
    "wandb": {"tracking"},
    "optuna": {"sweep", "analysis/importances.py"},
    "pytorch_lightning": {"training"},
}
"""The folders or files that may import a library."""

LIGHT_COMMANDS = {
    "help": ["agent.py", "--help"],
    "config error": ["agent.py", "--epochs", "0"],
    "commands": ["-m", "finetune", "--help"],
    "sweep check": ["-m", "finetune", "sweep", "--check", "sweep.yaml"],
    "report": ["-m", "finetune", "report", "/nonexistent"],
}

PATHS = sorted((ROOT / "finetune").rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT / "finetune").as_posix()


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", PATHS, ids=relative)
def test_imports_come_from_the_same_folder_or_from_above(path: Path) -> None:
    folder = relative(path).partition("/")[0]
    if folder.endswith(".py"):  # the entry points
        return
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "finetune":
            other = rest.partition(".")[0]
            assert FOLDERS.index(other) <= FOLDERS.index(folder), f"{relative(path)} imports {name}"


def test_some_libraries_are_imported_in_one_folder() -> None:
    for path in PATHS:
        for name in imports(path):
            if homes := HOMES.get(name.partition(".")[0]):
                place = relative(path)
                assert place in homes or place.partition("/")[0] in homes, f"{place}: {name}"


@pytest.mark.parametrize("command", LIGHT_COMMANDS)
def test_light_commands_import_no_torch(command: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = {LIGHT_COMMANDS[command][-len(LIGHT_COMMANDS[command]) :]!r}\n"
        "sys.path.insert(0, '')\n"
        "try:\n"
        "    if sys.argv[0] == '-m':\n"
        "        sys.argv.pop(0)\n"
        "        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "    else:\n"
        "        runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'torchvision', 'pytorch_lightning'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_nothing_outside_the_table_compares_a_strategys_name() -> None:
    names = set(STRATEGIES)
    for path in PATHS:
        if relative(path) in ("config/strategies.py", "demo.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not constants & names, f"{relative(path)}:{node.lineno}"


def test_no_layer_and_no_network_is_named_outside_the_table() -> None:
    pattern = re.compile(r"resnet|convnext|layer\d|\bfc\b|\bstem\b|conv1|classifier\.", re.I)
    for path in PATHS:
        if relative(path) in ("config/backbones.py", "config/timm_backbones.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            match node:
                case ast.Constant(value=str() as word) if id(node) not in texts:
                    pass
                case ast.Attribute(attr=word) if word != "stem":  # of a path
                    pass
                case _:
                    continue
            assert not pattern.search(word), f"{relative(path)}:{node.lineno}: {word}"


def test_every_module_has_a_docstring() -> None:
    for path in PATHS:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), relative(path)


@pytest.mark.parametrize("path", PATHS, ids=relative)
def test_no_file_is_over_300_lines_and_no_function_over_50(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 50, node.name
