"""One run's config: every field, its default, its range and its meaning.

Turns flags, a YAML file, W&B's parameters or keyword arguments into one frozen, checked
`RunConfig`. Knows nothing about torch, the machine or the data: what only those can answer stays
`auto` here and is resolved in `train.py` before anything is recorded.

    >>> RunConfig.from_fields({"strategy": "gradual", "learning_rate": "1e-2"}).lr_decay
    0.5
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import annotated_types as at
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from finetune.config.strategies import PARTS, SCHEDULES, STRATEGIES, Plan, plan
from finetune.system.errors import ConfigError
from finetune.system.files import load_yaml
from finetune.system.text import nearest

_YES = {"y", "yes", "on", "true"}
_NO = {"n", "no", "off", "false"}


def _switch(on: str, off: str) -> BeforeValidator:
    """YAML's and W&B's many spellings of a boolean -> this field's two words."""

    def read(value: object) -> object:
        word = str(value).lower() if isinstance(value, bool | str) else value
        return on if word in _YES else off if word in _NO else value

    return BeforeValidator(read)


def _not_a_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("must be a number of a usual size")
    return value


def _one_of(choices: Mapping[str, object] | tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{nearest(value, choices)}")
        return value

    return AfterValidator(check)


def _auto_or_number(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        try:
            return float(value)
        except ValueError:
            raise ValueError("must be auto or a number") from None
    return _not_a_boolean(value)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


def _absolute_weights(value: object) -> object:
    if value == "imagenet" or not isinstance(value, str | Path):
        return value
    return str(_absolute(Path(value)))


_number = BeforeValidator(_not_a_boolean)
Count = Annotated[int, _number, at.Ge(1)]
Number = Annotated[float, _number, Field(allow_inf_nan=False)]
Directory = Annotated[Path, AfterValidator(_absolute)]

SCHEDULED_PATIENCE, CONSTANT_PATIENCE = 0, 3


class RunConfig(BaseModel):
    """Everything that a run depends on, as one flat value.

    A field that means nothing to the chosen strategy is None, whatever was asked for, so that it
    can't tell two equal runs apart.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    strategy: Annotated[str, _one_of(STRATEGIES)] = Field(
        "partial",
        description="; ".join(f"{name}: {s.summary}" for name, s in STRATEGIES.items()),
    )
    epochs: Count = Field(10, description="passes over the training pictures, at the most")
    batch_size: Count = Field(
        32,
        description="pictures a step; a last batch of a single picture joins the one before",
    )
    data_aug: Annotated[Literal["y", "n", "strong"], _switch("y", "n")] = Field(
        "y",
        description="y: flip each picture with probability 1/2; n: nothing; strong: random "
        "resized crop (scale 0.35 to 1), flip, TrivialAugment",
    )
    learning_rate: Annotated[Number, at.Gt(0)] = Field(
        0.001, description="SGD's learning rate of the head, fc"
    )
    lr_decay: Annotated[Number, at.Gt(0), at.Le(1)] | None = Field(
        None,
        description="a part's share of the learning rate of the part above it; default: "
        "0.5 for gradual, else 1.0",
    )
    lr_schedule: Annotated[str, _one_of(SCHEDULES)] = Field(
        "constant",
        description=f"multiplier of all learning rates over the run: {', '.join(SCHEDULES)}",
    )
    momentum: Annotated[Number, at.Ge(0), at.Lt(1)] = Field(0.9, description="SGD's momentum")
    weight_decay: Annotated[Number, at.Ge(0)] = Field(0.0, description="SGD's L2 penalty")
    label_smoothing: Annotated[Number, at.Ge(0), at.Lt(1)] = Field(
        0.0, description="share of the target spread over all classes, in training only"
    )
    unfreeze_from: Annotated[str, _one_of(PARTS[:-1])] | None = Field(
        None,
        description=f"the deepest part that trains: {', '.join(PARTS[:-1])}; default: layer3 for "
        "partial, layer2 for gradual",
    )
    unfreeze_every: Count | None = Field(
        None, description="gradual: epochs between two unfreezings; default: 1"
    )
    image_size: Annotated[int, _number, at.Ge(32), at.Le(1024)] = Field(
        256, description="pixels a side; pictures become squares, their aspect isn't kept"
    )
    data_dir: Directory = Field(
        Path("data/inaturalist_12K"),
        description="holds train/CLASS/* and val/CLASS/*, perhaps test/CLASS/*",
    )
    val_fraction: Annotated[Literal["auto"] | float, BeforeValidator(_auto_or_number)] = Field(
        "auto",
        description="from 0 to 0.9; above 0: this stratified share of train/ validates and val/ "
        "is kept as the test set; 0: val/ validates; auto: 0 where test/ exists, else 0.2",
    )
    skip_unreadable: bool = Field(
        False, description="go on without the pictures that can't be read, and record them"
    )
    weights: Annotated[str, BeforeValidator(_absolute_weights)] | None = Field(
        None,
        description="imagenet (torchvision's ResNet18 weights, the default), or the path of a "
        "state dict (.pth, .safetensors) or of a run directory",
    )
    patience: Annotated[int, _number, at.Ge(0)] | None = Field(
        None,
        description="stop after so many epochs without a better val_loss, counted once everything "
        "that will train is training; 0: never; default: 3, with a schedule 0",
    )
    seed: Annotated[int, _number, at.Ge(0), at.Lt(2**32)] = Field(
        42, description="of the new layers, the order of the pictures and their augmentation"
    )
    cache: Annotated[Literal["auto", "on", "off"], _switch("on", "off")] = Field(
        "auto",
        description="auto or off; auto keeps decoded pictures and the frozen layers' outputs, and "
        "shares them between runs",
    )
    cache_dir: Directory = Field(Path(".cache"), description="where they are kept")
    cache_gb: Annotated[Number, at.Ge(0)] | None = Field(
        None,
        description="gigabytes that they may take; default: 20, at most half of the free space",
    )
    cache_format: Literal["float32", "float16"] = Field(
        "float32",
        description="of the frozen layers' outputs as they are kept; float32 is exact; float16 "
        "takes half the room, rounds to 11 bits, and may move an accuracy by a picture or two",
    )
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = Field(
        "auto", description="Lightning's accelerator; a run uses one device"
    )
    precision: Annotated[
        Literal["auto", "32-true", "bf16-mixed", "16-mixed"],
        BeforeValidator(lambda v: "32-true" if str(v) == "32" else v),
    ] = Field(
        "auto",
        description="auto: bf16-mixed on CUDA from compute capability 8.0, 16-mixed on older "
        "ones, else 32-true",
    )
    out: Directory = Field(Path("runs"), description="where run directories go")
    project: str | None = Field(
        None, description="W&B's project; default: WANDB_PROJECT, else finetune"
    )
    entity: str | None = Field(None, description="W&B's entity; default: WANDB_ENTITY")
    group: str | None = Field(None, description="W&B's group; default: WANDB_RUN_GROUP")
    name: str | None = Field(
        None, description="the run's name; default: WANDB_NAME, else made from the settings"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        """None, and a field that means nothing to the strategy, take the strategy's default."""
        fields = {name: value for name, value in given.items() if value is not None}
        entry = STRATEGIES.get(str(fields.get("strategy", "partial")))
        if entry is None:
            return fields
        scheduled = fields.get("lr_schedule", "constant") != "constant"
        defaults: dict[str, Any] = {
            "lr_decay": entry.lr_decay,
            "unfreeze_from": entry.deepest_part,
            "unfreeze_every": 1,
            "weights": "imagenet",
            "patience": SCHEDULED_PATIENCE if scheduled else CONSTANT_PATIENCE,
            "project": os.environ.get("WANDB_PROJECT") or "finetune",
            "entity": os.environ.get("WANDB_ENTITY") or None,
            "group": os.environ.get("WANDB_RUN_GROUP") or None,
            "name": os.environ.get("WANDB_NAME") or None,
        }
        return defaults | fields | dict.fromkeys(entry.ignores)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if not (self.val_fraction == "auto" or 0 <= self.val_fraction <= 0.9):
            raise ValueError(f"val_fraction: got {self.val_fraction}; must be auto or 0 to 0.9")
        if (
            self.batch_size == 1
            and self.image_size <= 32
            and self.plan.start_epochs.keys() != {"fc"}
        ):
            raise ValueError(
                "batch_size: got 1 with image_size 32: layer4's BatchNorm would see one value a "
                "channel; pass a batch_size of 2 or more or a larger image_size"
            )
        if self.name is None:
            object.__setattr__(self, "name", self._readable_name())
        return self

    @classmethod
    def from_fields(cls, given: Mapping[str, Any]) -> Self:
        """The config of these values, of whatever spelling. Raises `ConfigError`, naming each."""
        unknown = [name for name in given if name not in cls.model_fields]
        if unknown:
            raise ConfigError("; ".join(unknown_field(name) for name in unknown))
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(cls, one) for one in error.errors())) from None

    def to_fields(self) -> dict[str, Any]:
        """Plain values, as YAML, JSON and W&B keep them; `from_fields` reads them back."""
        return self.model_dump(mode="json")

    @property
    def plan(self) -> Plan:
        return plan(self.strategy, self.unfreeze_from, self.unfreeze_every, self.lr_decay)

    @property
    def pretrained(self) -> bool:
        return STRATEGIES[self.strategy].pretrained

    @property
    def patience_epochs(self) -> int:
        return self.patience or 0

    def _readable_name(self) -> str:
        words = [self.strategy]
        entry = STRATEGIES[self.strategy]
        if self.unfreeze_from not in (None, entry.deepest_part):
            words.append(f"from-{self.unfreeze_from}")
        words += [f"lr{self.learning_rate:g}", f"bs{self.batch_size}"]
        words += {"y": ["aug"], "n": [], "strong": ["strong"]}[self.data_aug]
        return "-".join(words)


PLACES = frozenset({"config", "resume"})
"""Flags and keyword arguments that say where a config comes from; a config doesn't hold them."""


def unknown_field(name: str) -> str:
    """The message for a name that isn't a field, with the nearest ones that are."""
    names = [*RunConfig.model_fields, *sorted(PLACES)]
    return f"unknown field {name!r}{nearest(name, names) or ' (see agent.py --help)'}"


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file's mapping of fields. Raises `ConfigError`."""
    fields = load_yaml(path, "a config")
    if not isinstance(fields, dict):
        raise ConfigError(f"config: {path} holds no mapping of fields, such as 'epochs: 10'")
    return {str(name): value for name, value in fields.items()}


def advice(given: Mapping[str, Any], config: RunConfig) -> list[str]:
    """What a user should know of the values given: fields without a meaning, too few epochs."""
    lines = []
    ignored = sorted(
        name for name in STRATEGIES[config.strategy].ignores if given.get(name) is not None
    )
    if ignored:
        lines.append(f"{', '.join(ignored)}: no meaning for strategy {config.strategy}; ignored")
    late = config.plan.opened_too_late(config.epochs)
    if late:
        starts = ", ".join(f"{part} at epoch {start}" for part, start in late.items())
        lines.append(
            f"epochs={config.epochs} is too few to open every part: {starts} would come after the "
            f"end; epochs={config.plan.all_open_epoch + 1} or more trains them"
        )
    return lines


def differences(ours: RunConfig, given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields of `given` that mean something else than in `ours`, as (ours, given)."""
    asked = {k: v for k, v in given.items() if v is not None and v != "auto"}
    theirs = RunConfig.from_fields(ours.to_fields() | asked)
    return {
        name: (getattr(ours, name), getattr(theirs, name))
        for name in asked
        if getattr(ours, name) != getattr(theirs, name)
    }


def _explain(model: type[BaseModel], error: Any) -> str:
    """One of pydantic's errors as: what was wrong, what was found, what is allowed."""
    message = str(error["msg"]).removeprefix("Value error, ")
    name = next((str(part) for part in error["loc"]), "")
    if not name:
        return message
    message = message.replace("Input should be", "must be")
    allowed = model.model_fields[name].description
    return f"{name}: got {_shown(error['input'])}; {message[0].lower()}{message[1:]} ({allowed})"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes out no whole number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."
