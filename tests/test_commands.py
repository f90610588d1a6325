"""The commands' table."""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path

import pytest

import finetune
from finetune.__main__ import _RUN_FIELDS, COMMANDS, argument, main, parse
from finetune.config import backbones
from finetune.system.errors import ConfigError, FinetuneError, RunDirError
from tests.conftest import Train
from tests.support.synthetic import write_run
from tests.support.tiny_backbone import TINY

REQUIRED = {
    "sweep": ["sweep.yaml"],
    "gpus": ["me/finetune/ab12cd34"],
    "workspace": ["me/finetune/ab12cd34"],
    "predict": ["runs/a", "picture.png"],
    "evaluate": ["runs/a"],
    "export": ["runs/a", "--format", "onnx"],
    "confirm": ["runs"],
    "refit": ["runs/a"],
    "best": ["data/mine", "--minutes", "5"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_s_arguments_are_those_of_its_function(command: str) -> None:
    given = parse([command, *REQUIRED.get(command, [])])
    module, _, name = given.pop("function").partition(":")
    inspect.signature(getattr(import_module(module), name)).bind(**given)


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
@pytest.mark.parametrize("command", ["predict", "evaluate", "export"])
def test_a_checkpoint_stands_for_its_run(command: str, name: str) -> None:
    words = REQUIRED[command]
    given = parse([command, f"{words[0]}/{name}", *words[1:]])
    assert given["run_dir"].as_posix() == words[0]


def test_a_checkpoint_stands_for_its_run_from_prediction_to_resume(
    train_once: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train_once(epochs=1)
    picture = run_dir.read_predictions()[2][0]
    capsys.readouterr()
    assert not main(["predict", str(run_dir.best_path), str(picture), "--json"])
    assert json.loads(capsys.readouterr().out)[0]["class"] in "56789"
    assert not main(["evaluate", str(run_dir.best_path)])
    assert not main(["export", str(run_dir.best_path), "--format", "state_dict"])
    assert (run_dir.path / "model.pth").exists()
    assert finetune.load_best(run_dir.best_path).result.run_id == run_dir.path.name
    with pytest.raises(RunDirError, match="is finished"):
        finetune.train_and_finetune(resume=run_dir.last_path)


def test_a_run_of_a_network_that_is_not_registered_says_how_to_register_it(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "_registered", {"mine": TINY})
    run_dir = train(model="mine", strategy="scratch", epochs=1)
    monkeypatch.setattr(backbones, "_registered", {})
    picture = str(run_dir.read_predictions()[2][0])
    words = r"'mine'; must be one of .* once it is registered: in Python by finetune.register_model"
    for command in (["predict", str(run_dir.path), picture], ["refit", str(run_dir.path)]):
        with pytest.raises(FinetuneError, match=words) as refused:
            main(command)
        assert "damaged" not in str(refused.value)
    with pytest.raises(FinetuneError, match=words):
        finetune.load_best(run_dir.path)
    with pytest.raises(FinetuneError, match=words):
        finetune.train_and_finetune(resume=run_dir.path)


@pytest.mark.parametrize("command", ["predict", "evaluate", "export", "refit"])
def test_a_run_directory_that_does_not_exist_is_said_at_once_with_those_that_do(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.__main__.import_module", None)  # no module is imported
    write_run(tmp_path / "runs", "b", 0.5)
    _, *rest = REQUIRED[command]
    words = r"runs/a is not a run directory: it does not exist; finished runs in .*runs: b$"
    with pytest.raises(RunDirError, match=words):
        main([command, str(tmp_path / "runs" / "a"), *rest])
    with pytest.raises(RunDirError, match=r"does not exist$"):
        main([command, str(tmp_path / "other" / "a"), *rest])


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "many"])
def test_a_count_must_be_a_positive_integer(count: str) -> None:
    with pytest.raises(ConfigError, match=r"--seeds: got .*; must be an integer >= 1"):
        main(["confirm", "runs", f"--seeds={count}"])


def test_a_command_with_run_fields_keeps_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    own = (argument("file", "positional"), argument("--out", "its own"), argument("--max_runs", ""))
    monkeypatch.setitem(COMMANDS, "fields", ("summary", "module:function", *own, _RUN_FIELDS))
    given = parse(["fields", "a.yaml", "--epochs", "3", "--out", "b", "--skip_unreadable"])
    assert given == {
        "function": "module:function",
        "file": "a.yaml",
        "out": "b",
        "max_runs": None,
        "fields": {"epochs": "3", "skip_unreadable": "true"},
    }
    with pytest.raises(ConfigError, match="unknown field 'max'"):
        parse(["fields", "a.yaml", "--max", "3"])


def test_the_help_of_a_command_with_run_fields_names_agent_py(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["lr_find", "--help"])
    assert ended.value.code == 0
    assert "agent.py --help" in capsys.readouterr().out
