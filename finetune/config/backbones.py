"""Networks as data: how each is built, and the parts into which it is divided.

A network of torchvision is one more entry of `BACKBONES`; one of your own is registered by
`register_model` or an entry point. What each part computes is found by tracing
(`finetune.model.chain`).

    >>> find_backbone("resnet18").head, list(find_backbone("convnext_tiny").parts)[:2]
    ('fc', ['stem', 'stage1'])
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from finetune.config import timm_backbones
from finetune.system.errors import ConfigError
from finetune.system.text import nearest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

ENTRY_POINTS = "finetune.models"
"""The group of entry points whose objects are `Backbone`s; a point's name is the model's."""


@dataclass(frozen=True)
class Backbone:
    """A network, divided into parts that run one after the other.

    Strategies freeze and unfreeze whole parts. Where possible, one part has one resolution of
    activations, so that `head + 2 parts` means the same depth in every network.
    """

    build: str
    """`package.module:function`, called with `num_classes`, and with `image_size` if
    `has_fixed_size`; it returns a torch.nn.Module that takes normalised pictures, (B, 3, H, W)."""
    parts: Mapping[str, str]
    """Each part, from input to output, with the path of the module at which it begins. The last one
    is the head, which ends in the linear layer of the classes."""
    weights_file: str | None = None
    """The file of torchvision's IMAGENET1K_V1 weights, if `build` is a function of torchvision."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of `build`."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    min_image_size: int = 32
    image_size_step: int = 1
    """`image_size` must be a multiple of it."""
    has_fixed_size: bool = False
    """The network is built for one size of pictures."""

    @property
    def part_names(self) -> tuple[str, ...]:
        return tuple(self.parts)

    @property
    def head(self) -> str:
        return self.part_names[-1]

    def check(self, model: str, image_size: int, unfreeze_from: str | None) -> None:
        """Raises `ConfigError` for a size of pictures or a part that this network doesn't have."""
        *below, _ = self.part_names
        if unfreeze_from not in (None, *below):
            raise ConfigError(
                f"unfreeze_from: got {unfreeze_from!r}; {model} has the parts {', '.join(below)} "
                f"below its head{nearest(str(unfreeze_from), below)}"
            )
        step = self.image_size_step
        if image_size % step or image_size < self.min_image_size:
            multiple = f" and a multiple of {step}" if step > 1 else ""
            raise ConfigError(
                f"image_size: got {image_size}; {model} needs at least {self.min_image_size}"
                f"{multiple}"
            )

    @property
    def function(self) -> str:
        """The name of the function that builds it."""
        return self.build.rpartition(":")[2]


def _torchvision(
    function: str, weights_file: str, parts: Mapping[str, str], step: int = 1
) -> Backbone:
    build = f"torchvision.models:{function}"
    return Backbone(build, parts, weights_file, image_size_step=step, has_fixed_size=step > 1)


_RESNET = {"stem": "conv1"} | {
    name: name for name in ("layer1", "layer2", "layer3", "layer4", "fc")
}


def _stages(begins: str) -> dict[str, str]:
    """Parts named stem, stage1, stage2, ..., head, which begin at these modules."""
    stem, *stages, head = begins.split()
    return {"stem": stem, **{f"stage{i}": path for i, path in enumerate(stages, 1)}, "head": head}


BACKBONES: Mapping[str, Backbone] = {
    "resnet18": _torchvision("resnet18", "resnet18-f37072fd.pth", _RESNET),
    "resnet34": _torchvision("resnet34", "resnet34-b627a593.pth", _RESNET),
    "resnet50": _torchvision("resnet50", "resnet50-0676ba61.pth", _RESNET),
    "convnext_tiny": _torchvision(
        "convnext_tiny",
        "convnext_tiny-983f1562.pth",
        _stages("features.0 features.1 features.2 features.4 features.6 classifier.2"),
    ),
    "efficientnet_b0": _torchvision(
        "efficientnet_b0",
        "efficientnet_b0_rwightman-7f5810bc.pth",
        _stages("features.0 features.2 features.3 features.4 features.6 classifier"),
    ),
    "mobilenet_v3_large": _torchvision(
        "mobilenet_v3_large",
        "mobilenet_v3_large-8738ca79.pth",
        _stages("features.0 features.2 features.4 features.7 features.13 classifier.2"),
    ),
    "vit_b_16": _torchvision(
        "vit_b_16",
        "vit_b_16-c867db91.pth",
        _stages(
            "conv_proj encoder.layers.encoder_layer_0 encoder.layers.encoder_layer_3 "
            "encoder.layers.encoder_layer_6 encoder.layers.encoder_layer_9 heads.head"
        ),
        step=16,
    ),
}
"""The networks of torchvision that are known by name."""

HEADS = ("fc", "head", "heads", "classifier")
"""The modules that map features to classes in files of weights, of these and other networks."""

POSITIONS = "encoder.pos_embedding"
"""Of torchvision's vision transformers: one row per patch, after that of the class token."""

DEFAULT_MODEL = "resnet18"
"""Also the network of checkpoints that don't name theirs, which version 0.1.0 wrote."""

_registered: dict[str, Backbone] = {}


def register_model(name: str, backbone: Backbone) -> None:
    """Make a network available as `model=name` in this process.

    For other processes, such as those of a sweep, give your package an entry point of the group
    `finetune.models` instead. Raises `ConfigError` if the name is taken or unusual.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ConfigError(f"model: got {name!r}; a name of letters, digits, - _ and . is needed")
    if name in BACKBONES or _registered.get(name, backbone) != backbone:
        raise ConfigError(f"model: {name} is taken")
    _registered[name] = backbone


def find_backbone(name: str) -> Backbone:
    """The network of this name. Raises `ConfigError`; for `timm:NAME` it imports timm."""
    if name in BACKBONES or name in _registered:
        return _registered.get(name) or BACKBONES[name]
    if timm_backbones.is_timm(name):
        return _of_timm(name)
    if found := _of_entry_point(name):
        return found
    known = [*BACKBONES, *_registered, *(point.name for point in entry_points(group=ENTRY_POINTS))]
    raise ConfigError(
        f"model: got {name!r}; must be one of {', '.join(known)}, or timm:NAME"
        f"{nearest(name, known)}. Your own network is known once it is registered: in Python by "
        f"finetune.register_model, for commands by an entry point of the group {ENTRY_POINTS}"
    )


def known_backbone(name: str) -> Backbone | None:
    """`find_backbone`, or None where only an import of timm could tell. Raises `ConfigError`."""
    return None if timm_backbones.is_timm(name) else find_backbone(name)


@cache
def _of_timm(name: str) -> Backbone:
    return Backbone(**timm_backbones.describe(name))


@cache
def _of_entry_point(name: str) -> Backbone | None:
    for point in entry_points(group=ENTRY_POINTS, name=name):
        backbone = point.load()
        if not isinstance(backbone, Backbone):
            raise ConfigError(f"model: {name}: the entry point {point.value} is not a Backbone")
        return backbone
    return None
