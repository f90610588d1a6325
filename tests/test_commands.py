"""The commands' table."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from finetune.__main__ import COMMANDS, command_line, main
from finetune.system.errors import ConfigError

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
    given = vars(command_line().parse_args([command, *REQUIRED.get(command, [])]))
    module, _, name = given.pop("function").partition(":")
    inspect.signature(getattr(import_module(module), name)).bind(**given)


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "many"])
def test_a_count_must_be_a_positive_integer(count: str) -> None:
    with pytest.raises(ConfigError, match=r"--seeds: got .*; must be an integer >= 1"):
        main(["confirm", "runs", f"--seeds={count}"])
