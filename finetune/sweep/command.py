"""A sweep file's `command`: the command lines that W&B's agent makes of it.

    >>> expand(["${interpreter}", "${program}", "${args_no_hyphens}"], {"epochs": 3})
    ['python', 'agent.py', 'epochs=3']

The macros are those of `wandb/sdk/launch/sweeps/utils.py` in version 0.31.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from finetune.config.fields import RunConfig
from finetune.config.flags import given_fields
from finetune.config.given_values import differences
from finetune.sweep.distributions import Value
from finetune.system.errors import ConfigError
from finetune.system.text import nearest

PROGRAM = "agent.py"
Values = Mapping[str, Value]
_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
_LAUNCHER = rf"python[\d.]*|env|-[uBOsE]+|-m|{re.escape(PROGRAM)}"


def _without_false(values: Values) -> list[str]:
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in values.items() if v is not False]


MACROS: Mapping[str, Callable[[Values], list[str]]] = {
    "env": lambda values: ["/usr/bin/env"],
    "interpreter": lambda values: ["python"],
    "program": lambda values: [PROGRAM],
    "args": lambda values: [f"--{k}={v}" for k, v in values.items()],
    "args_no_equals": lambda values: [w for k, v in values.items() for w in (f"--{k}", str(v))],
    "args_no_hyphens": lambda values: [f"{k}={v}" for k, v in values.items()],
    "args_no_boolean_flags": _without_false,
    "args_json": lambda values: [json.dumps(values)],
    # The agent passes the path of a file with this content.
    "args_json_file": lambda values: [json.dumps(values)],
    # The agent appends a dictionary to a list, which appends its keys.
    "args_dict": list,
    "args_append_hydra": lambda values: [f"+{k}={v}" for k, v in values.items()],
    "args_override_hydra": lambda values: [f"++{k}={v}" for k, v in values.items()],
}


def fields_of_command(command: Sequence[str | int], values: Values) -> dict[str, Value]:
    """The fields that a command sets besides the sweep's parameters, for example `values`.

    Raises `ConfigError` if agent.py would not start, or would refuse the command line.
    """
    given = given_fields(_arguments(expand(command, values)), swept=values)
    if "resume" in given:
        raise ConfigError("resume: a sweep starts new runs; remove it")
    shared = {name: given.pop(name) for name in list(given) if name in values}
    for name, (swept, fixed) in _contradictions(values, shared).items():
        raise ConfigError(
            f"{name}: got {fixed}, and {swept} in parameters; set it in one of them only"
        )
    return given


def expand(command: Sequence[str | int], values: Values) -> list[str]:
    """The command line of the run with these values. Raises `ConfigError`."""
    words: list[str] = []
    for given in map(str, command):
        word = _VARIABLE.sub(_of_environment, given)
        macro = re.search(r"\$\{([^{}]*)\}", word)
        if macro is None:
            words.append(word)
        elif macro[1] not in MACROS:
            raise ConfigError(_unknown(macro[1]))
        elif macro[0] != word:
            raise ConfigError(
                f"{given!r}: W&B's agent expands {macro[0]} only as a word of its own, a line of "
                "the list; ${envvar:NAME} may stand within a word"
            )
        else:
            words += MACROS[macro[1]](values)
    return words


def _unknown(macro: str) -> str:
    if macro.startswith("envvar:"):
        allowed = "; W&B's agent reads variables whose names have only capital letters, digits, _"
    else:
        known = ", ".join(f"${{{name}}}" for name in MACROS)
        allowed = f"{nearest(macro, MACROS)}; W&B's macros are {known} and ${{envvar:NAME}}"
    return f"unknown macro '${{{macro}}}'{allowed}"


def _of_environment(found: re.Match[str]) -> str:
    value = os.environ.get(found[1])
    if value is None:
        raise ConfigError(
            f"{found[0]}: the environment variable {found[1]} is not set, and W&B's agent would "
            f"pass the text {found[1]!r}; set it before this command and before the agents"
        )
    return value


def _arguments(words: list[str]) -> list[str]:
    """What follows the program. Raises `ConfigError` if the command starts something else."""
    for at, word in enumerate(words):
        as_module = words[at : at + 2] == ["-m", Path(PROGRAM).stem]
        if as_module or Path(word).name == PROGRAM:
            before, after = words[:at], words[at + 1 + as_module :]
            break
    else:
        before, after = [word for word in words if not word.startswith("--")], None
    for word in before:
        if not re.fullmatch(_LAUNCHER, Path(word).name):
            raise ConfigError(f"{word!r} is not supported; use {PROGRAM} and its flags")
    if after is None:
        raise ConfigError(f"{PROGRAM} is missing; write ${{program}} before the arguments")
    return after


def _contradictions(
    values: Values, given: Mapping[str, Value]
) -> Mapping[str, tuple[object, object]]:
    """Fields with another value on the command line than in the sweep, which agent.py refuses."""
    try:
        of_sweep = {name: value for name, value in values.items() if name in RunConfig.model_fields}
        shared = {name: value for name, value in given.items() if name in of_sweep}
        return differences(RunConfig.from_fields(of_sweep), shared)
    except ConfigError:
        return {}  # an invalid value is found and reported elsewhere
