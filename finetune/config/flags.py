"""The command line of one run: `--field value` for each field of the config.

Values stay text here; `RunConfig` checks them, however a run is started.
"""

import argparse
import json
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import annotated_types as at
from pydantic.fields import FieldInfo

from finetune.config.aliases import unknown_field
from finetune.config.field_types import choices_of, takes_boolean
from finetune.config.fields import RunConfig
from finetune.system.errors import ConfigError

_SHORT = {"learning_rate": ("--lr",), "batch_size": ("--bs",), "weight_decay": ("--wd",)}
"""Other flags of a field, besides those with - for _."""

_STRATEGY, _PICTURES = "the network and what of it trains", "the pictures"
_GROUPS = {
    **dict.fromkeys(("model", "strategy", "unfreeze_from", "unfreeze_every", "weights"), _STRATEGY),
    "searched": "the training",
    "seed": "the training",
    **dict.fromkeys(("data_dir", "labels", "val_fraction", "fold", "skip_unreadable"), _PICTURES),
    **dict.fromkeys(("data_aug", "mixup", "image_size", "background", "pixel_range"), _PICTURES),
    "environment": "the machine and the output",
    "label": "names in Weights & Biases",
}
"""The group of each field in the help, by its name, or else by its role."""

_SIGNS = {at.Ge: ("≥", "ge"), at.Gt: (">", "gt"), at.Le: ("≤", "le"), at.Lt: ("<", "lt")}


def _bounds(field: FieldInfo) -> str:
    """A field's range from its constraints, such as `≥ 1`."""
    metadata = list(field.metadata)
    for option in getattr(field.annotation, "__args__", ()):  # those of X in X | None
        metadata += getattr(option, "__metadata__", ())
    signs = [(_SIGNS[type(m)], m) for m in metadata if type(m) in _SIGNS]
    return ", ".join(f"{sign} {getattr(m, attribute):g}" for (sign, attribute), m in signs)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def parser(program: str) -> argparse.ArgumentParser:
    """The parser of a run's flags; values stay text."""
    made = Parser(
        prog=program,
        usage=f"{program} [--FIELD VALUE ...] [--config FILE] [--resume RUN_DIR] [--verbose]",
        description="One run: fine-tune a network on a folder of pictures.",
        epilog="A value of None means the default. Exit codes: 0 done, 1 the run failed, "
        "2 the command line or a config is wrong.",
        allow_abbrev=False,
    )
    groups = {title: made.add_argument_group(title) for title in dict.fromkeys(_GROUPS.values())}
    for name, field in RunConfig.model_fields.items():
        bounds = f" [{found}]" if (found := _bounds(field)) else ""
        default = "" if field.default is None else f" (default: {field.default})"
        about: Any = field.json_schema_extra
        groups[_GROUPS.get(name) or _GROUPS[about["role"]]].add_argument(
            f"--{name}",
            *_SHORT.get(name, ()),
            metavar="|".join(choices_of(field)) or "VALUE",
            help=f"{field.description}{bounds}{default}".replace("%", "%%"),
            # `--skip_unreadable` without a value means true
            nargs="?" if takes_boolean(field) else None,
            const="true" if takes_boolean(field) else None,
        )
    made.add_argument("--verbose", action="store_true", help="print what the cache does too")
    made.add_argument("--config", metavar="FILE", help="a YAML file of fields; flags override it")
    made.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="continue the run of this directory after its last finished epoch; only a larger "
        "--epochs, the device and the places of data, weights and caches may differ from its "
        "config",
    )
    return made


def given_fields(
    arguments: Sequence[str], program: str = "agent.py", swept: Container[str] = ()
) -> dict[str, Any]:
    """The fields of a command line. Raises `ConfigError` for unknown ones.

    Besides flags it may have what W&B's agents make of the macros in a sweep's command: NAME=VALUE,
    +NAME=VALUE, ++NAME=VALUE, a JSON object, the path of a .json file, and the bare names of the
    sweep's parameters, `swept`, whose values come from the agent's file.
    """
    flags, rest = parser(program).parse_known_args(list(_spelled_out(arguments)))
    words = list(_without_internal(rest))
    if unknown := [word.lstrip("-").partition("=")[0] for word in words if word.startswith("-")]:
        raise ConfigError(_unknown(unknown))
    given: dict[str, Any] = {}
    for word in words:
        if assigned := re.fullmatch(r"\+{0,2}(\w[\w.-]*)=(.*)", word, re.DOTALL):
            given[assigned[1]] = assigned[2]
        elif word.startswith("{") or word.endswith(".json"):
            given |= _read_json(word)
        elif word not in swept:
            raise ConfigError(f"unexpected argument {word!r}")
    if unknown := [name for name in given if name not in vars(flags)]:
        raise ConfigError(_unknown(unknown))
    given |= {name: value for name, value in vars(flags).items() if value is not None}
    del given["verbose"]  # it is no field
    return {name: value for name, value in given.items() if value not in (None, "None")}


def _unknown(names: Iterable[str]) -> str:
    return "; ".join(unknown_field(name, RunConfig.model_fields) for name in names)


def _spelled_out(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments with _ for - in names of flags, and with the value of a flag without one."""
    for word, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        field = RunConfig.model_fields.get(name)
        if not word.startswith("--") or field is None:
            yield word
            continue
        has_value = following.isalnum() and following not in RunConfig.model_fields
        if takes_boolean(field) and not equals and not has_value:
            equals, value = "=", "true"
        yield f"--{name}{equals}{value}"


def _without_internal(words: Sequence[str]) -> Iterator[str]:
    """The words but `_wandb...`, which W&B's agent adds to a run that it queues again."""
    is_its_value = False
    for word in words:
        if re.match(r"(--|\+{0,2})_wandb", word):
            is_its_value = word.startswith("--") and "=" not in word
        elif is_its_value and not word.startswith("-"):
            is_its_value = False
        else:
            yield word


def _read_json(word: str) -> dict[str, Any]:
    """The fields of a JSON object, or of a file that holds one."""
    try:
        text = word if word.startswith("{") else Path(word).read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"unexpected argument {word!r}, which is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f'{word}: must hold a JSON object with fields, such as {{"epochs": 10}}')
    return {name: value for name, value in found.items() if not name.startswith("_wandb")}
