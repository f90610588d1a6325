"""Networks of timm (https://github.com/huggingface/pytorch-image-models) as `timm:NAME`.

What a network of timm says about itself is used: `group_matcher` gives the parts, `pretrained_cfg`
the head, the normalisation and whether its picture size is fixed.
"""

from collections.abc import Mapping
from typing import Any

from finetune.system.errors import ConfigError, MissingPackage
from finetune.system.text import nearest

PREFIX = "timm:"


def is_timm(name: str) -> bool:
    return name.startswith(PREFIX)


def create(
    model: str,
    num_classes: int | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
) -> Any:
    """A network of timm such as `timm:resnet26`; None: with as many classes as it had.

    Raises `ConfigError` for an unknown one.
    """
    timm, name = _import_timm(), model.removeprefix(PREFIX)
    if not timm.is_model(name):
        choices = nearest(name, timm.list_models())
        raise ConfigError(f"model: got {model!r}; timm {timm.__version__} has no {name}{choices}")
    options = {"num_classes": num_classes, "img_size": image_size}
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return timm.create_model(name, pretrained=pretrained, **given)
    except (TypeError, AssertionError) as error:
        reason = f"can't be built for image_size {image_size}: {error}"
        raise ConfigError(f"model: {model} {reason}") from None


def describe(model: str) -> dict[str, Any]:
    """The fields of a `Backbone`. Raises `ConfigError`, also if timm is not installed."""
    network = create(model, num_classes=2)
    about = network.pretrained_cfg
    if not isinstance(classifier := about.get("classifier"), str):
        raise ConfigError(f"model: {model}: timm names no single classifier of it")
    return {
        "build": f"{__name__}:create",
        "options": {"model": model},
        "parts": parts_of(network, classifier),
        "mean": tuple(about["mean"]),
        "std": tuple(about["std"]),
        "has_fixed_size": bool(about.get("fixed_input_size")),
    }


def parts_of(network: Any, classifier: str) -> dict[str, str]:
    """The coarse groups of the parameters as parts; each with the module at which it begins.

    Parameters that timm groups with the classifier belong to the part before it.
    """
    from timm.models import group_parameters

    matcher = network.group_matcher(coarse=True)
    groups: Mapping[str, int] = group_parameters(network, matcher, reverse=True)
    begins: dict[int, str] = {}
    for key, group in groups.items():
        if group not in begins and not key.startswith(f"{classifier}."):
            begins[group] = _begin(key, group, groups)
    head_group = max(groups.values())
    stem, *others = [begins[group] for group in sorted(begins) if group != head_group]
    return {"stem": stem, **{path.replace(".", "_"): path for path in others}, "head": classifier}


def _begin(key: str, group: int, groups: Mapping[str, int]) -> str:
    """The outermost module around a parameter that holds no parameter of another group."""
    modules = key.split(".")[:-1]
    for depth in range(1, len(modules) + 1):
        path = ".".join(modules[:depth])
        if all(other == group for k, other in groups.items() if k.startswith(f"{path}.")):
            return path
    return key


def _import_timm() -> Any:
    try:
        import timm
    except ImportError:
        raise MissingPackage("timm", "timm", "a model timm:NAME") from None
    return timm
