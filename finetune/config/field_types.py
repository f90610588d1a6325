"""The types of a config's values, and what each field says about itself."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types as at
from PIL import ImageColor
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic.fields import FieldInfo

from finetune.config.augmentations import AUGMENTATIONS
from finetune.system.files import absolute
from finetune.system.text import brief, nearest

Role = Literal["searched", "environment", "label", "repeat"]
"""`searched` fields make a setting; `environment` is where and on what a run computes; `label` is
how it is named and filed; the seed and the fold make a repeat of the same setting."""


def field(
    role: Role, default: Any, description: str, title: str = "", shown: dict[Any, str] | None = None
) -> Any:
    """A field with its role.

    `title` is its name in tables and figures, if that is not the field's name with spaces. `shown`
    has the words for its values, in the order in which figures list them.
    """
    extra: dict[str, Any] = {"role": role, "shown": shown or {}}
    return Field(default, description=description, title=title or None, json_schema_extra=extra)


searched = partial(field, "searched")
environment = partial(field, "environment")
label = partial(field, "label")


def _refuse_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("must be a number below 2**63")
    return value


@dataclass(frozen=True)
class _OneOf:
    choices: tuple[str, ...]

    def __call__(self, value: str) -> str:
        if value not in self.choices:
            raise ValueError(
                f"must be one of {', '.join(self.choices)}{nearest(value, self.choices)}"
            )
        return value


def one_of(choices: Iterable[str]) -> AfterValidator:
    return AfterValidator(_OneOf(tuple(choices)))


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The values of a field that has few; nothing for the others."""
    options = [field.annotation, *get_args(field.annotation)]  # X, and those of X | None
    entries = [*field.metadata, *(e for o in options for e in getattr(o, "__metadata__", ()))]
    checks = [getattr(entry, "func", None) for entry in entries]
    found = [check.choices for check in checks if isinstance(check, _OneOf)]
    literals = [get_args(option) for option in options if get_origin(option) is Literal]
    found += [] if float in options else literals  # auto or a number
    return tuple(map(str, found[0])) if found else ()


def _auto_or_number(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        try:
            return float(value)
        except ValueError:
            raise ValueError("must be auto or a number") from None
    return _refuse_boolean(value)


_YES, _NO = {"y", "yes", "on", "true"}, {"n", "no", "off", "false"}


def _augmentation(value: object) -> object:
    """YAML and W&B spell a boolean in many ways."""
    word = str(value).lower() if isinstance(value, bool | str) else value
    return "y" if word in _YES else "n" if word in _NO else value


def takes_boolean(field: FieldInfo) -> bool:
    """Whether true is a value of the field, so that its flag needs none."""
    reads_words = any(getattr(entry, "func", None) is _augmentation for entry in field.metadata)
    return field.annotation is bool or reads_words


def _weights(value: object) -> object:
    is_path = isinstance(value, str | Path) and value != "imagenet"
    return str(absolute(Path(str(value)))) if is_path else value


def _colour(value: str) -> str:
    try:
        if len(ImageColor.getrgb(value)) == 3:
            return value
    except ValueError:
        pass
    raise ValueError("must be a colour such as white, black or #f0f0f0")


def bounds(pixel_range: str) -> tuple[float, float] | None:
    """LOW and HIGH of `LOW..HIGH`; None for the words. Raises `ValueError`.

    >>> bounds("0..4095"), bounds("none")
    ((0.0, 4095.0), None)
    """
    if pixel_range in ("auto", "none"):
        return None
    low, _, high = pixel_range.partition("..")
    found = float(low), float(high)
    if not (all(map(math.isfinite, found)) and found[0] < found[1]):
        raise ValueError
    return found


def fold_of(text: str) -> tuple[int, int]:
    """Number and count of a fold. Raises `ValueError`.

    >>> fold_of("2/5")
    (2, 5)
    """
    number, _, count = text.partition("/")
    found = int(number), int(count)
    if not 1 <= found[0] <= found[1] or found[1] < 2:
        raise ValueError
    return found


def _fold(value: str) -> str:
    try:
        return "{}/{}".format(*fold_of(value))
    except ValueError:
        raise ValueError("must be K/N with 1 <= K <= N and N >= 2, such as 2/5") from None


def _pixel_range(value: object) -> str:
    try:
        bounds(str(value))
    except ValueError:
        raise ValueError("must be auto, none or LOW..HIGH, such as 0..4095") from None
    return str(value)


_number = BeforeValidator(_refuse_boolean)
Integer = Annotated[int, _number]
Count = Annotated[Integer, at.Ge(1)]
Number = Annotated[float, _number, Field(allow_inf_nan=False)]
Positive = Annotated[Number, at.Gt(0)]
Share = Annotated[Number, at.Ge(0), at.Lt(1)]
AutoOrNumber = Annotated[Literal["auto"] | float, BeforeValidator(_auto_or_number)]
Directory = Annotated[Path, AfterValidator(absolute)]
Augmentation = Annotated[str, BeforeValidator(_augmentation), one_of(AUGMENTATIONS)]
AutoOrOff = Annotated[bool, BeforeValidator(lambda value: True if value == "auto" else value)]
Colour = Annotated[str, AfterValidator(_colour)]
Fold = Annotated[str, AfterValidator(_fold)]
PixelRange = Annotated[str, BeforeValidator(_pixel_range)]
Weights = Annotated[str, BeforeValidator(_weights)]
Precision = Annotated[
    Literal["auto", "32-true", "bf16-mixed", "16-mixed"],
    BeforeValidator(lambda value: "32-true" if str(value) == "32" else value),
]


def explain(model: type[BaseModel], error: Any) -> str:
    """A pydantic error as a message: the field, the value found, what is allowed."""
    message = str(error["msg"]).removeprefix("Value error, ")
    name = next((str(part) for part in error["loc"]), "")
    if not name:
        return message
    message = message.replace("Input should be", "must be")
    allowed = model.model_fields[name].description
    return f"{name}: got {brief(error['input'])}; {message[0].lower()}{message[1:]} ({allowed})"
