"""ResNet18 as an ordered list of parts, with random, pretrained or fine-tuned weights.

Legend: B batch, H height, W width, C channels, D=512 features, K classes.
"""

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18

from finetune.config.fields import RunConfig
from finetune.config.strategies import PARTS
from finetune.data.decode import Preprocessing
from finetune.model.state_dicts import adapt
from finetune.model.weights import State, fingerprint, read_checkpoint, read_source
from finetune.runs.result import RunResult
from finetune.system.errors import ConfigError, WeightsError
from finetune.system.files import run_directory

MODEL_NAME = "resnet18"  # in checkpoints
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, which torchvision's weights expect."""


def build(num_classes: int, seed: int) -> ResNet:
    """A ResNet18 with torchvision's initialisation, drawn from `seed` (He et al. 2015)."""
    with torch.random.fork_rng(devices=[]):
        fc = _draw_fc(on_meta(num_classes), seed)
        model = resnet18(num_classes=num_classes)
    model.fc = fc
    return model.to(memory_format=torch.channels_last)


def build_from(
    weights: str | None, num_classes: int, seed: int, log: Callable[[str], None]
) -> tuple[ResNet, str | None]:
    """`build`'s network with weights from `load_source`, if any, and their fingerprint."""
    if weights is None:
        return build(num_classes, seed), None
    model = on_meta(num_classes).to_empty(device="cpu")  # random weights would take 0.1 s
    with torch.random.fork_rng(devices=[]):
        model.fc = _draw_fc(model, seed)
    model = model.to(memory_format=torch.channels_last)
    return model, load_source(model, weights, log)


def on_meta(num_classes: int) -> ResNet:
    """The network on the meta device: shapes without values."""
    with torch.device("meta"):
        return resnet18(num_classes=num_classes)


def _draw_fc(model: ResNet, seed: int) -> nn.Linear:
    """Drawn before any other weight, so that it is the same for every source of weights."""
    torch.default_generator.manual_seed(seed)
    return nn.Linear(model.fc.in_features, model.fc.out_features)


def load_source(model: ResNet, weights: str, log: Callable[[str], None]) -> str:
    """Load `imagenet`, a file of weights or a run directory into `model`.

    A head that doesn't fit is not loaded: the model keeps its own. What else `adapt` changed in a
    file is logged in one line. Returns the fingerprint of the source's weights without `fc`.
    Raises `WeightsError` if anything else doesn't fit.
    """
    content = read_source(weights)
    try:
        state, note = adapt(content, model.state_dict())
    except WeightsError as error:
        needed = "a ResNet18 state dict in torchvision's layout is needed"
        raise WeightsError(f"weights: {weights} don't fit; {needed}: {error}") from None
    if note and weights != "imagenet":  # its head of 1000 classes is never needed
        log(f"weights: {weights}: {note}")
    model.load_state_dict(state, strict=False)
    return fingerprint({key: value for key, value in state.items() if part_of_key(key) != "fc"})


def part_module(model: ResNet, part: str) -> nn.Module:
    """The module of a part, which shares its parameters and buffers with the model."""
    modules = {"stem": nn.ModuleList([model.conv1, model.bn1])} | dict(model.named_children())
    return modules[part]


def part_of_key(key: str) -> str:
    """The part that an entry of the state dict belongs to."""
    first = key.partition(".")[0]
    return "stem" if first in ("conv1", "bn1") else first


def part_state(model: ResNet, parts: Collection[str]) -> State:
    """The entries of the state dict that belong to these parts."""
    return {k: v for k, v in model.state_dict().items() if part_of_key(k) in parts}


def parts_before(boundary: str) -> tuple[str, ...]:
    return PARTS[: PARTS.index(boundary)]


def forward(model: ResNet, x: Tensor, start: str, stop: str | None) -> Tensor:
    """Run the parts from `start` up to, but not including, `stop`; None: up to the logits, (B, K).

    The input of `stem` is normalised pictures, (B, 3, H, W); the input of `fc` is pooled features,
    (B, D); the input of a part between them is activations, (B, C, H, W).
    """
    end = len(PARTS) if stop is None else PARTS.index(stop)
    for part in PARTS[PARTS.index(start) : end]:
        if part == "stem":
            x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        else:
            x = getattr(model, part)(x)
        if part == "layer4":
            x = torch.flatten(model.avgpool(x), 1)
    return x


def boundary_shape(boundary: str, image_size: int) -> tuple[int, ...]:
    """The shape of one picture's activations that enter this part: (H, W, C), or (D,) for fc."""
    model = on_meta(num_classes=1).eval()
    pictures = torch.empty(1, 3, image_size, image_size, device="meta")
    with torch.inference_mode():
        x = forward(model, pictures, "stem", boundary)
    return (*x.shape[2:], x.shape[1]) if x.ndim == 4 else (x.shape[1],)


def normalise(images_BHWC: Tensor, flips: Tensor | None) -> Tensor:
    """uint8 pictures -> normalised float32, (B, 3, H, W) in channels_last.

    The pictures at the positions `flips` are flipped. To the bit torchvision's ToTensor and
    Normalize, but computed over rows of W x 3 values, which is faster than over single channels.
    """
    device = images_BHWC.device
    if flips is not None and device.type != "cpu":
        images_BHWC = images_BHWC.index_copy(0, flips, images_BHWC[flips].flip(2))
    elif flips is not None:
        images_BHWC = images_BHWC.clone()
        for i in flips.tolist():  # on a CPU several times faster than index_copy
            images_BHWC[i] = images_BHWC[i].flip(1)
    batch, height, width, _ = images_BHWC.shape
    mean, std = _repeated(MEAN, width, device), _repeated(STD, width, device)
    rows = images_BHWC.reshape(batch, height, width * 3)
    normalised = torch.empty(rows.shape, device=device)
    chunk_size = 4 if device.type == "cpu" else batch
    for start in range(0, batch, chunk_size):
        chunk = slice(start, start + chunk_size)
        normalised[chunk].copy_(rows[chunk]).div_(255).sub_(mean).div_(std)
    return normalised.view(batch, height, width, 3).permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def _repeated(channels: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """One value per channel, repeated for each pixel of a row."""
    return torch.tensor(channels, device=device).repeat(width)


def load_best(run_dir: Path | str) -> ResNet:
    """A run's model at its best epoch, in eval mode, on the CPU.

    `.result` is the run's `RunResult`, or None if the run hasn't finished; `.class_names`,
    `.image_size` and `.preprocessing` are those it was trained with. Raises `WeightsError`.
    """
    run_dir = run_directory(run_dir)
    content = _read_best(run_dir)
    model = on_meta(len(content["class_names"]))
    try:
        model.load_state_dict(content["state_dict"], assign=True)
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{run_dir}/best.ckpt doesn't fit ResNet18: {reason}") from None
    model = model.to(memory_format=torch.channels_last)
    model.result = RunResult.load(run_dir) if (run_dir / "result.json").exists() else None
    model.class_names = content["class_names"]
    model.image_size = content["image_size"]
    model.preprocessing = _preprocessing(content)
    return model.eval()


def _read_best(run_dir: Path) -> dict[str, Any]:
    """The content of a run's best.ckpt; unknown entries are ignored. Raises `WeightsError`."""
    path = run_dir / "best.ckpt"
    if not path.exists():
        reason = "it is not a run directory, or no epoch has finished"
        if (run_dir / "metrics.csv").exists():  # which is written after it
            reason = (
                "it was removed, as `sweep --keep_best` does for all but the best trials. "
                f"python agent.py --config {run_dir / 'config.yaml'} trains it again"
            )
        raise WeightsError(f"{run_dir} has no best.ckpt: {reason}")
    content = read_checkpoint(path)
    if (name := content.get("model", MODEL_NAME)) != MODEL_NAME:
        raise WeightsError(f"{path} holds an unknown model: got {name!r}, must be {MODEL_NAME}")
    names, size = content.get("class_names"), content.get("image_size")
    are_names = isinstance(names, list) and names and all(isinstance(n, str) for n in names)
    if not are_names or not isinstance(size, int) or not 32 <= size <= 1024:
        raise WeightsError(f"{path} is no run's checkpoint: class_names or image_size is wrong")
    return content


def _preprocessing(content: Mapping[str, Any]) -> Preprocessing:
    """How a checkpoint's pictures are read; 0.1.0 wrote the size alone."""
    given = {name: content[name] for name in ("background", "pixel_range") if name in content}
    try:
        return Preprocessing.of(
            RunConfig.from_fields(given | {"image_size": content["image_size"]})
        )
    except ConfigError as error:
        raise WeightsError(f"best.ckpt is damaged: {error}") from None
