"""The commands' table."""

from __future__ import annotations

import inspect
import json
from importlib import import_module

import pytest

import finetune
from finetune.__main__ import COMMANDS, main, parse
from finetune.system.errors import ConfigError, RunDirError
from tests.conftest import Train

REQUIRED = {
    "sweep": ["sweep.yaml"],
    "gpus": ["me/finetune/ab12cd34"],
    "predict": ["runs/a", "picture.png"],
    "evaluate": ["runs/a"],
    "export": ["runs/a", "--format", "onnx"],
    "confirm": ["runs"],
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


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "many"])
def test_a_count_must_be_a_positive_integer(count: str) -> None:
    with pytest.raises(ConfigError, match=r"--seeds: got .*; must be an integer >= 1"):
        main(["confirm", "runs", f"--seeds={count}"])
