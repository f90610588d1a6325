"""The command line of one run: `--field value` for each field of the config.

Values stay text here; `RunConfig` checks them, however a run is started.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

import annotated_types as at
from pydantic.fields import FieldInfo

from finetune.config.fields import RunConfig, unknown_field
from finetune.system.errors import ConfigError

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
        description="One run: fine-tune ResNet18 on a folder of pictures.",
        epilog="A value of None means the default. Exit codes: 0 done, 1 the run failed, "
        "2 the command line or a config is wrong.",
        allow_abbrev=False,
    )
    for name, field in RunConfig.model_fields.items():
        bounds = f" [{found}]" if (found := _bounds(field)) else ""
        default = "" if field.default is None else f" (default: {field.default})"
        made.add_argument(
            f"--{name}",
            metavar="VALUE",
            help=f"{field.description}{bounds}{default}".replace("%", "%%"),
            # `--skip_unreadable` without a value means true
            nargs="?" if field.annotation is bool else None,
            const="true" if field.annotation is bool else None,
        )
    made.add_argument("--config", metavar="FILE", help="a YAML file of fields; flags override it")
    made.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="continue the run of this directory after its last finished epoch; only a larger "
        "--epochs may differ from its config",
    )
    return made


def given_fields(arguments: Sequence[str], program: str = "agent.py") -> dict[str, Any]:
    """The fields of a command line. Raises `ConfigError` for unknown ones."""
    known, rest = parser(program).parse_known_args(arguments)
    # W&B's agent adds such arguments to a run that it queues again.
    rest = [word for word in rest if not word.startswith("--_wandb")]
    if rest:
        named = [word.lstrip("-").partition("=")[0] for word in rest if word.startswith("-")]
        raise ConfigError(
            "; ".join(map(unknown_field, named)) if named else f"unexpected argument {rest[0]!r}"
        )
    return {k: v for k, v in vars(known).items() if v not in (None, "None")}
