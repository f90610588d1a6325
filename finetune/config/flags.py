"""The command line of one run: `--field value` for every field of the config.

Turns arguments into a mapping of given fields, unchecked: `RunConfig` checks them, as it does for
every other door. Knows nothing about torch.

    python agent.py --help
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

import annotated_types as at
from pydantic.fields import FieldInfo

from finetune.config.fields import RunConfig, unknown_field
from finetune.system.errors import ConfigError

_SIGNS = {at.Ge: ("≥", "ge"), at.Gt: (">", "gt"), at.Le: ("≤", "le"), at.Lt: ("<", "lt")}


def _bounds(field: FieldInfo) -> str:
    """A field's numeric range, such as `≥ 1`, read off its own constraints."""
    metadata = list(field.metadata)
    for option in getattr(field.annotation, "__args__", ()):  # X | None keeps them inside
        metadata += getattr(option, "__metadata__", ())
    signs = [(_SIGNS[type(m)], m) for m in metadata if type(m) in _SIGNS]
    return ", ".join(f"{sign} {getattr(m, attribute):g}" for (sign, attribute), m in signs)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose mistakes are `ConfigError`s."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def parser(program: str) -> argparse.ArgumentParser:
    """The parser of a run's flags; every value stays text."""
    made = Parser(
        prog=program,
        description="Fine-tune ResNet18 on a folder of pictures: one run.",
        epilog="A value of None means the default. Exit codes: 0 done, 1 the run failed, "
        "2 the command line or a config is wrong.",
        allow_abbrev=False,
    )
    for name, field in RunConfig.model_fields.items():
        notes = [field.description or ""]
        if bounds := _bounds(field):
            notes.append(f"[{bounds}]")
        if field.default is not None:
            notes.append(f"(default: {field.default})")
        made.add_argument(
            f"--{name}",
            metavar="VALUE",
            help=" ".join(notes).replace("%", "%%"),
            default=None,
            # `--skip_unreadable` alone means yes
            nargs="?" if field.annotation is bool else None,
            const="true" if field.annotation is bool else None,
        )
    made.add_argument("--config", metavar="FILE", help="a YAML file of fields; flags win over it")
    made.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="go on with this run directory after its last finished epoch; of the other flags only "
        "a larger --epochs may differ from its config",
    )
    return made


def given_fields(arguments: Sequence[str], program: str = "agent.py") -> dict[str, Any]:
    """The fields that a command line names. Raises `ConfigError` for what it can't mean."""
    known, rest = parser(program).parse_known_args(arguments)
    # W&B's agent adds arguments of its own to a run that it queues again.
    rest = [word for word in rest if not word.startswith("--_wandb")]
    if rest:
        named = [word.lstrip("-").partition("=")[0] for word in rest if word.startswith("-")]
        raise ConfigError(
            "; ".join(map(unknown_field, named)) if named else f"unexpected argument {rest[0]!r}"
        )
    return {k: v for k, v in vars(known).items() if v not in (None, "None")}
