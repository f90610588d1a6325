"""Lists of fields and their names and values as tables and figures show them.

>>> title("data_aug"), shown("data_aug", "y"), shown("learning_rate", 1e-3)
('augmentation', 'flip', '0.001')
"""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from finetune.config.field_types import Role
from finetune.config.fields import RunConfig
from finetune.config.strategies import plan


def fields_with_role(role: Role) -> tuple[str, ...]:
    """The fields of this role, in the order of `RunConfig`."""
    return tuple(name for name in RunConfig.model_fields if _about(name)["role"] == role)


Function = TypeVar("Function", bound=Callable[..., Any])


def takes_fields(function: Function) -> Function:
    """Give a function of `**fields` a signature with the fields' names, types and defaults."""
    fields = [(name, f.annotation, f.default) for name, f in RunConfig.model_fields.items()]
    others = [(name, Path | str | None, None) for name in ("config", "resume")]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, kind, default in (*fields, *others)
    ]
    signature = inspect.signature(function).replace(parameters=parameters)
    setattr(function, "__signature__", signature)  # noqa: B010
    return function


def title(name: str) -> str:
    """A field's name in a table's head or along an axis."""
    field = RunConfig.model_fields.get(name)
    return (field and field.title) or name.replace("_", " ")


def shown(name: str, value: object) -> str:
    """A field's value in a table or figure; "–" for None."""
    words = _about(name)["shown"]
    if isinstance(value, str | bool) and value in words:
        return str(words[value])
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None else str(value)


def in_order(name: str, values: Iterable[Any]) -> list[Any]:
    """A field's values as a figure lists them: numbers by size, words as the field lists them."""
    known = list(_about(name)["shown"])

    def rank(value: Any) -> tuple[int, Any]:
        if value in known:
            return 1, known.index(value)
        return (2, value) if isinstance(value, str) else (0, -1 if value is None else value)

    return sorted(values, key=rank)


def _about(name: str) -> Any:
    field = RunConfig.model_fields.get(name)
    return field.json_schema_extra if field else {"shown": {}}


NUMERIC_FIELDS = frozenset(
    name
    for name, schema in RunConfig.model_json_schema()["properties"].items()
    if {"integer", "number"} & {kind.get("type") for kind in (schema, *schema.get("anyOf", ()))}
)
"""The fields that hold a number."""

TIMING_FIELDS = (
    *(name for name in inspect.signature(plan).parameters if name in RunConfig.model_fields),
    "model",
)
"""The fields that decide when each part starts to train."""
