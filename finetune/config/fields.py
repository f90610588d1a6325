"""One run's config: every field with its default, range, meaning and role.

What only the machine or the data can tell stays `auto` here; `finetune.runs.resolve` replaces it
before anything is recorded.

    >>> RunConfig.from_fields({"strategy": "gradual", "learning_rate": "1e-2"}).lr_decay
    0.5
"""

import os
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import annotated_types as at
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from finetune.config import field_types as types
from finetune.config.aliases import unknown_field
from finetune.config.augmentations import AUGMENTATIONS, Augmentation
from finetune.config.backbones import (
    BACKBONES,
    DEFAULT_MODEL,
    Backbone,
    find_backbone,
    known_backbone,
)
from finetune.config.field_types import environment, field, label, one_of, searched
from finetune.config.optimizers import OPTIMIZERS, ignored_fields
from finetune.config.strategies import SCHEDULES, STRATEGIES, Plan, plan
from finetune.system.errors import ConfigError

NAMED_FIELDS = ("model", "strategy", "learning_rate", "batch_size", "data_aug")
"""The fields whose values a run's default name has, besides `unfreeze_from` where it is given."""


class RunConfig(BaseModel):
    """Everything that a run depends on.

    A field that the strategy ignores is None, whatever value was given, so that two runs that do
    the same have the same config.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    model: str = searched(
        DEFAULT_MODEL,
        f"the network: {', '.join(BACKBONES)}, timm:NAME where timm is installed, or one that is "
        "registered",
        title="network",
        shown={name: name for name in BACKBONES},
    )
    strategy: Annotated[str, one_of(STRATEGIES)] = searched(
        "partial",
        "; ".join(f"{name}: {s.summary}" for name, s in STRATEGIES.items()),
        shown={name: name for name in STRATEGIES},
    )
    epochs: types.Count | None = searched(10, "maximum number of passes over the training pictures")
    batch_size: types.Count | None = searched(
        32, "pictures per step; a last batch of a single picture is merged with the previous one"
    )
    data_aug: types.Augmentation = searched(
        "y",
        "; ".join(f"{name}: {a.summary}" for name, a in AUGMENTATIONS.items()),
        title="augmentation",
        shown={name: a.title for name, a in AUGMENTATIONS.items()},
    )
    mixup: Annotated[types.Number, at.Ge(0)] | None = searched(
        0.0,
        "alpha of the Beta distribution from which the share of one of two mixed training pictures "
        "is drawn, once per batch; 0: off (Zhang et al. 2018)",
    )
    class_weights: Literal["none", "balanced"] = searched(
        "none",
        "balanced: a class's weight in the training loss is inverse to its number of pictures",
    )
    learning_rate: types.Positive | None = searched(0.001, "the learning rate of the head")
    lr_decay: Annotated[types.Positive, at.Le(1)] | None = searched(
        None,
        "factor from a part's learning rate to that of the next part towards the input; default: "
        "0.5 for gradual, else 1.0",
        title="learning rate decay",
    )
    lr_schedule: Annotated[str, one_of(SCHEDULES)] | None = searched(
        "constant", f"multiplier of all learning rates: {', '.join(SCHEDULES)}", title="schedule"
    )
    optimizer: Annotated[str, one_of(OPTIMIZERS)] | None = searched(
        "sgd", f"one of torch.optim: {', '.join(OPTIMIZERS)}"
    )
    momentum: types.Share | None = searched(None, "SGD's momentum; default: 0.9")
    weight_decay: Annotated[types.Number, at.Ge(0)] | None = searched(
        None, "SGD's L2 penalty, AdamW's weight decay; default: 0"
    )
    label_smoothing: types.Share | None = searched(
        0.0, "share of the target that is spread over all classes, in training only"
    )
    unfreeze_from: str | None = searched(
        None,
        "the part nearest the input that trains, by the network's own names "
        f"({DEFAULT_MODEL}: {', '.join(BACKBONES[DEFAULT_MODEL].part_names[:-1])}); default: the "
        "second part below the head for partial, the third for gradual, the first part for lp-ft",
    )
    unfreeze_every: types.Count | None = searched(
        None,
        "gradual: epochs from one unfreezing to the next; default: 1",
    )
    image_size: Annotated[types.Integer, at.Ge(32), at.Le(1024)] = searched(
        256, "pixels per side; pictures are resized to a square without keeping their aspect ratio"
    )
    background: types.Colour = searched(
        "white", "the colour behind transparent pixels: a name or #rrggbb"
    )
    pixel_range: types.PixelRange = searched(
        "auto",
        "the values LOW..HIGH that become black and white in pictures of more than 8 bits; auto: "
        "found over train/; none: the range of their type",
    )
    data_dir: types.Directory = environment(
        Path("data/inaturalist_12K"), "holds train/CLASS/*, val/CLASS/* and optionally test/CLASS/*"
    )
    labels: types.Directory | None = environment(
        None,
        "a CSV (path, label, perhaps split) or metadata.jsonl, for pictures without class folders",
    )
    val_fraction: types.AutoOrNumber = searched(
        "auto",
        "0 to 0.9; above 0: this stratified share of train/ is the validation set and val/ is kept "
        "as the test set; 0: val/ is the validation set; auto: 0 where test/ exists, else 0.2",
    )
    skip_unreadable: bool = environment(
        False, "continue without the pictures that can't be read, and record them"
    )
    weights: types.Weights | None = searched(
        None,
        "imagenet (the network's ImageNet weights, the default), or the path of a state dict or "
        "checkpoint (.pth, .ckpt, .safetensors) or of a run directory; {model} in it stands for "
        "the network's name",
    )
    patience: Annotated[types.Integer, at.Ge(0)] | None = searched(
        None,
        "stop after this many epochs without a better val_loss, counted from the epoch at which "
        "every part that will train is training; 0: never; default: 3, with a schedule 0",
    )
    fold: types.Fold | None = field(
        "repeat",
        None,
        "K/N, such as 2/5: of N stratified folds of train/, the K-th validates; instead of "
        "val_fraction",
    )
    seed: Annotated[types.Integer, at.Ge(0), at.Lt(2**32)] = field(
        "repeat", 42, "seed of the new layers, the order of the pictures and their augmentation"
    )
    cache: types.AutoOrOff = environment(
        "auto",
        "auto or off; auto keeps decoded pictures and the frozen layers' outputs for all runs",
        shown={True: "auto", False: "off"},
    )
    cache_dir: types.Directory = environment(Path(".cache"), "directory of the cache")
    cache_gb: Annotated[types.Number, at.Ge(0)] | None = environment(
        None, "maximum size of the cache in gigabytes; default: 20, at most half of the free space"
    )
    cache_format: Literal["float32", "float16"] = environment(
        "float32",
        "data type of the frozen layers' outputs in the cache; float32: as computed, exact; "
        "float16: half the space, 11 bits; an accuracy may change by one or two pictures",
    )
    gpu_cache_fraction: types.Share = environment(
        0.5, "share of a GPU's free memory that pictures and activations may fill; 0: none"
    )
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = environment(
        "auto", "Lightning's accelerator; a run uses one device"
    )
    precision: types.Precision = environment(
        "auto", "auto: bf16-mixed on CUDA from capability 8.0, 16-mixed on older GPUs, else 32-true"
    )
    out: types.Directory = environment(Path("runs"), "parent of the run directories")
    keep_last: bool = environment(False, "keep last.ckpt of a finished run, to train it further")
    project: str | None = label(None, "W&B's project; default: WANDB_PROJECT, else finetune")
    entity: str | None = label(None, "W&B's entity; default: WANDB_ENTITY")
    group: str | None = label(None, "W&B's group; default: WANDB_RUN_GROUP")
    name: str | None = label(None, "the run's name; default: WANDB_NAME, else from the settings")

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Replace None by the default, which may depend on the strategy and the environment."""
        fields = {name: value for name, value in given.items() if value is not None}
        entry = STRATEGIES.get(str(fields.get("strategy", "partial")))
        optimizer = str(fields.get("optimizer", "sgd"))
        if entry is None or optimizer not in OPTIMIZERS:
            return fields
        scheduled = fields.get("lr_schedule", "constant") != "constant"
        defaults: dict[str, Any] = {
            "momentum": 0.9,
            "weight_decay": 0.0,
            "lr_decay": entry.lr_decay,
            "unfreeze_every": entry.unfreeze_every,
            "weights": "imagenet",
            "patience": 0 if scheduled else 3,
            "project": os.environ.get("WANDB_PROJECT") or "finetune",
            "entity": os.environ.get("WANDB_ENTITY") or None,
            "group": os.environ.get("WANDB_RUN_GROUP") or None,
            "name": os.environ.get("WANDB_NAME") or None,
        }
        model = str(fields.get("model", DEFAULT_MODEL))
        if isinstance(weights := fields.get("weights"), str):
            fields["weights"] = weights.replace("{model}", model.partition(":")[2] or model)
        with suppress(ConfigError):  # an unknown model is reported with the other errors
            if backbone := known_backbone(model):
                defaults["unfreeze_from"] = entry.deepest(backbone.part_names)
        return defaults | fields | dict.fromkeys(entry.ignores | ignored_fields(optimizer))

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if not (self.val_fraction == "auto" or 0 <= self.val_fraction <= 0.9):
            raise ValueError(f"val_fraction: got {self.val_fraction}; must be auto or 0 to 0.9")
        try:
            if self.epochs is None and self.augmentation.transform:
                reason = f"{self.strategy} solves the head on features of unchanged pictures"
                raise ConfigError(f"data_aug: got {self.data_aug}; {reason}: pass y or n")
            if backbone := known_backbone(self.model):  # timm's are checked when one is built
                backbone.check(self.model, self.image_size, self.unfreeze_from)
                self._check_batch_size(backbone.head)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.name is None:
            object.__setattr__(self, "name", self.readable_name())
        return self

    def _check_batch_size(self, head: str) -> None:
        only_head = set(self.plan.start_epochs) == {head}
        if self.batch_size == 1 and self.image_size <= 32 and not only_head:
            raise ValueError(
                "batch_size: got 1 with image_size 32, where the last part's BatchNorm has one "
                "value per channel; pass a batch_size of 2 or more or a larger image_size"
            )

    @classmethod
    def from_fields(cls, given: Mapping[str, Any]) -> Self:
        """The config of these values, in any spelling. Raises `ConfigError` with all errors."""
        if unknown := [name for name in given if name not in cls.model_fields]:
            raise ConfigError("; ".join(unknown_field(name, cls.model_fields) for name in unknown))
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            raise ConfigError("; ".join(types.explain(cls, e) for e in error.errors())) from None

    def to_fields(self) -> dict[str, Any]:
        """Plain values for YAML, JSON and W&B; the inverse of `from_fields`."""
        return self.model_dump(mode="json")

    @property
    def backbone(self) -> Backbone:
        """The network's entry; of `timm:NAME` it imports timm. Raises `ConfigError`."""
        backbone = find_backbone(self.model)
        backbone.check(self.model, self.image_size, self.unfreeze_from)
        return backbone

    @property
    def augmentation(self) -> Augmentation:
        return AUGMENTATIONS[self.data_aug]

    @property
    def plan(self) -> Plan:
        parts = self.backbone.part_names
        return plan(self.strategy, parts, self.unfreeze_from, self.unfreeze_every, self.lr_decay)

    @property
    def num_epochs(self) -> int:
        """`epochs`, or 1 for a strategy without epochs: the one in which its head is measured."""
        return self.epochs or 1

    @property
    def solves_head(self) -> bool:
        return STRATEGIES[self.strategy].solves_head

    @property
    def pixel_bounds(self) -> tuple[float, float] | None:
        return types.bounds(self.pixel_range)

    def readable_name(self, of: Container[str] = (*NAMED_FIELDS, "unfreeze_from")) -> str:
        """A name from the values of these fields."""
        backbone, deepest = known_backbone(self.model), self.unfreeze_from
        if backbone and deepest == STRATEGIES[self.strategy].deepest(backbone.part_names):
            deepest = None  # the default
        words = {
            "model": "" if self.model == DEFAULT_MODEL else self.model,
            "strategy": self.strategy,
            "unfreeze_from": deepest and f"from-{deepest}",
            "learning_rate": self.learning_rate and f"lr{self.learning_rate:g}",
            "batch_size": self.batch_size and f"bs{self.batch_size}",
            "data_aug": self.augmentation.label,
            "fold": self.fold and f"fold{self.fold.replace('/', 'of')}",
        }
        return "-".join(word for name, word in words.items() if word and name in of)
