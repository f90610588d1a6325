"""A sweep's command: what W&B's agent makes of it, and that agent.py reads that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from finetune.config.fields import RunConfig
from finetune.config.flags import given_fields
from finetune.config.given_values import differences
from finetune.sweep.command import MACROS, expand
from finetune.sweep.sweep_file import read_sweep
from finetune.system.errors import ConfigError

VALUES: dict[str, Any] = {
    "strategy": "gradual",
    "epochs": 3,
    "learning_rate": 1e-5,
    "data_aug": True,
    "skip_unreadable": True,
    "cache": False,
    "weights": None,
    "name": "a b=c, {d}",
}
BY_CLIENT = create_sweep_command_args({"args": {k: {"value": v} for k, v in VALUES.items()}})
OF_ARGUMENTS = sorted([*BY_CLIENT, "args_json_file"])
START = ["${env}", "${interpreter}", "${program}"]


def words_of_agent(macro: str, tmp_path: Path, values: dict[str, Any] = VALUES) -> list[str]:
    """What the agent of the installed client makes of a macro."""
    if macro == "args_json_file":
        path = tmp_path / "config-run.json"
        path.write_text(json.dumps(values))
        return [str(path)]
    made = create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})
    return [*made[macro]]


def check(command: list[Any], **more: Any) -> dict[str, Any]:
    """The fields that a sweep with this command fixes."""
    parameters = {"seed": {"values": [1, 2]}, "momentum": {"value": 0.5}}
    content = {"program": "agent.py", "method": "grid", "parameters": parameters}
    return dict(read_sweep({**content, "command": command, **more}).fixed)


def test_the_macros_are_those_of_the_installed_client(tmp_path: Path) -> None:
    assert {name for name in MACROS if name.startswith("args")} == set(OF_ARGUMENTS)
    for macro in BY_CLIENT:
        assert expand([f"${{{macro}}}"], VALUES) == words_of_agent(macro, tmp_path)


@pytest.mark.parametrize("before", [[], ["--skip-unreadable"], ["--image_size", "64"]])
@pytest.mark.parametrize("macro", OF_ARGUMENTS)
def test_agent_py_reads_every_macro(macro: str, before: list[str], tmp_path: Path) -> None:
    given = given_fields([*before, *words_of_agent(macro, tmp_path)], swept=VALUES)
    assert given.keys() <= VALUES.keys() | {"image_size"}
    given.pop("image_size", None)
    assert differences(RunConfig.from_fields(VALUES), given) == {}
    if macro == "args_dict":
        assert given.keys() == ({"skip_unreadable"} if "--skip-unreadable" in before else set())
    else:
        assert given.keys() >= VALUES.keys() - {"weights", "cache"}


@pytest.mark.parametrize("macro", OF_ARGUMENTS)
def test_agent_py_reads_every_macro_of_a_run_that_is_queued_again(
    macro: str, tmp_path: Path
) -> None:
    values = {"_wandb": {"code_path": "code/agent.py"}, "epochs": 3, "_wandb_more": {"a": 1}}
    words = words_of_agent(macro, tmp_path, values)
    assert given_fields(words, swept=values) in ({"epochs": "3"}, {"epochs": 3}, {})


def test_bare_names_are_refused_outside_of_a_sweep() -> None:
    with pytest.raises(ConfigError, match="unexpected argument 'epochs'"):
        given_fields(["epochs"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lerning_rate=1"], "unknown field 'lerning_rate'; did you mean learning_rate"),
        (["++lerning_rate=1"], "unknown field 'lerning_rate'"),
        (['{"lerning_rate": 1}'], "unknown field 'lerning_rate'"),
        (['{"epochs": 3'], "which is not JSON"),
        (["missing.json"], "No such file"),
        (["[" * 5000 + ".json"], "unexpected argument"),
        (['{"a":' * 5000], "unexpected argument"),
    ],
)
def test_wrong_words_are_refused_with_the_reason(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        given_fields(words)


@pytest.mark.parametrize("macro", [None, *OF_ARGUMENTS])
def test_the_check_accepts_every_macro(macro: str | None) -> None:
    words = [f"${{{macro}}}"] if macro else []
    fixed = check([*START, "--epochs=3", "--cache", "off", *words])
    assert fixed == {"epochs": "3", "cache": "off", "momentum": 0.5}


@pytest.mark.parametrize(
    "start",
    [
        ["${interpreter}", "${program}"],
        ["python3.11", "-u", "agent.py"],
        ["${env}", "${interpreter}", "-m", "agent"],
        ["/opt/venv/bin/python", "-uB", "-m", "agent"],
        ["./agent.py"],
    ],
)
def test_the_check_accepts_what_starts_agent_py(start: list[str]) -> None:
    assert check([*start, "${args}", "--epochs", 3])["epochs"] == "3"


def test_variables_are_expanded_as_the_agent_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH_1", "/scratch")
    monkeypatch.setenv("PART", "a=b")
    command = [*START, "${args}", "--out=${envvar:SCRATCH_1}/x/${envvar:PART}", "--name"]
    command.append("${envvar:PART}")
    assert check(command) == {"out": "/scratch/x/a=b", "name": "a=b", "momentum": 0.5}
    by_client = create_sweep_command(list(command))
    assert expand(command, {})[-3:] == by_client[-3:]


UNSUITABLE: list[tuple[list[Any], str]] = [
    ([*START, "${arg}"], "command: unknown macro '${arg}'; did you mean args"),
    ([*START, "${args_yaml}"], "command: unknown macro '${args_yaml}'"),
    (["${evn}", *START[1:]], "command: unknown macro '${evn}'; did you mean env"),
    ([*START, "--params=${args_json}"], "expands ${args_json} only as a word of its own"),
    ([*START, "${args} --epochs=3"], "expands ${args} only as a word of its own"),
    ([*START, "--out=${envvar:NOT_SET}/x"], "the environment variable NOT_SET is not set"),
    ([*START, "--out=${envvar:home}"], "unknown macro '${envvar:home}'; W&B's agent reads"),
    (["python", "-m", "train", "${args}"], "'train' is not supported; use agent.py"),
    (["python", "${args}"], "command: agent.py is missing; write ${program}"),
    ([*START, "${args}", "--seed=7"], "seed: got 7, and 1 in parameters; set it in one"),
    ([*START, "--momentum", "0.9"], "momentum: got 0.9, and 0.5 in parameters"),
    ([*START, "lerning_rate=1"], "command: unknown field 'lerning_rate'"),
]


@pytest.mark.parametrize(("command", "message"), UNSUITABLE, ids=lambda x: str(x)[:60])
def test_the_check_refuses_what_would_fail_in_each_run(command: list[Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(command)
    assert message in str(refused.value)


def test_a_command_with_the_macro_of_the_program_needs_a_program(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    content = {"method": "grid", "parameters": {"seed": {"values": [1]}}, "command": START}
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"program: missing; W&B's agents need 'program: agent"):
        read_sweep(path)
