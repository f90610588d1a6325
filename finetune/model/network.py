"""torchvision's ResNet18 as ordered parts, with random, source or fine-tuned weights.

Turns a network into `frozen prefix / trained suffix` at a boundary between parts. Knows nothing
about strategies' schedules, data sets or training loops.

    >>> model = build(num_classes=10, seed=42)  # doctest: +SKIP
    >>> logits_BK = forward(model, pictures_BCHW, "stem", None)  # doctest: +SKIP

Legend: B batch, H height, W width, C channels, D=512 features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18

from finetune.config.strategies import PARTS
from finetune.model.weights import State, fingerprint, read_checkpoint, read_source
from finetune.runs.result import RunResult
from finetune.system.errors import WeightsError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's, as torchvision's weights expect them."""


def build(num_classes: int, seed: int) -> ResNet:
    """A ResNet18 with random weights that follow from the seed; torch's generator stays as it was.

    torchvision's own initialisation (He et al. 2015 for convolutions).
    """
    num_features = on_meta(num_classes).fc.in_features
    with torch.random.fork_rng(devices=[]):
        fc = _seeded_fc(num_features, num_classes, seed)
        model = resnet18(num_classes=num_classes)
    model.fc = fc
    return model.to(memory_format=torch.channels_last)


def on_meta(num_classes: int) -> ResNet:
    """The network without values: shapes only."""
    with torch.device("meta"):
        return resnet18(num_classes=num_classes)


def build_from(weights: str, num_classes: int, seed: int) -> tuple[ResNet, str]:
    """`build`'s ResNet18 with its weights from `load_source`, and their fingerprint.

    Only `fc` is drawn; drawing the other weights, to be overwritten, takes 0.1 s. Raises
    `WeightsError`.
    """
    model = on_meta(num_classes).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        model.fc = _seeded_fc(model.fc.in_features, num_classes, seed)
    model = model.to(memory_format=torch.channels_last)
    return model, load_source(model, weights)


def _seeded_fc(num_features: int, num_classes: int, seed: int) -> nn.Linear:
    """Drawn first, so that it is the same whether or not anything else is drawn."""
    torch.default_generator.manual_seed(seed)
    return nn.Linear(num_features, num_classes)


def load_source(model: ResNet, weights: str) -> str:
    """Load `imagenet`, a state-dict file or a run directory into a model; its fingerprint.

    An `fc` of another size is left out, so the model's own stays. The fingerprint is of what was
    in the source, fc apart. Raises `WeightsError` for whatever else doesn't fit.
    """
    state = read_source(weights)
    wanted = model.state_dict()
    missing = sorted(k for k in wanted if k not in state and part_of_key(k) != "fc")
    foreign = sorted(k for k in state if k not in wanted)
    misshapen = sorted(
        f"{k} {tuple(state[k].shape)}, not {tuple(wanted[k].shape)}"
        for k in state.keys() & wanted.keys()
        if state[k].shape != wanted[k].shape and part_of_key(k) != "fc"
    )
    problems = [
        f"{what}: {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
        for what, keys in (("missing", missing), ("unknown", foreign), ("of shape", misshapen))
        if keys
    ]
    if problems:
        raise WeightsError(
            f"weights: {weights} don't fit torchvision's ResNet18: {'; '.join(problems)}"
        )
    fitting = {k: v for k, v in state.items() if wanted[k].shape == v.shape}
    if any(part_of_key(k) == "fc" for k in wanted.keys() - fitting.keys()):
        fitting = {k: v for k, v in fitting.items() if part_of_key(k) != "fc"}
    model.load_state_dict(fitting, strict=False)
    return fingerprint({k: v for k, v in state.items() if part_of_key(k) != "fc"})


def part_modules(model: ResNet, part: str) -> list[nn.Module]:
    """The modules with parameters or buffers of one part."""
    if part == "stem":
        return [model.conv1, model.bn1]
    module: nn.Module = getattr(model, part)
    return [module]


def part_parameters(model: ResNet, part: str) -> list[nn.Parameter]:
    return [p for module in part_modules(model, part) for p in module.parameters()]


def part_of_key(key: str) -> str:
    """The part that an entry of the state dict belongs to."""
    first = key.partition(".")[0]
    return "stem" if first in ("conv1", "bn1") else first


def part_state(model: ResNet, parts: Iterable[str]) -> State:
    """The entries of the state dict that belong to these parts."""
    wanted = frozenset(parts)
    return {k: v for k, v in model.state_dict().items() if part_of_key(k) in wanted}


def parts_before(boundary: str) -> tuple[str, ...]:
    return PARTS[: PARTS.index(boundary)]


def forward(model: ResNet, x: Tensor, start: str, stop: str | None) -> Tensor:
    """Run the parts from `start` up to, without, `stop`; None runs to the logits, (B, K).

    What enters `stem` is normalised pictures, (B, 3, H, W); what enters `fc` is the pooled
    features, (B, D); between them activations, (B, C, H, W).
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
    """uint8 pictures -> normalised float32, (B, 3, H, W) in channels_last, flipped at `flips`.

    Bit for bit what torchvision's ToTensor and Normalize give, computed over rows of W x 3 numbers,
    a few pictures at a time: on a CPU that runs at memory speed, where broadcasting over single
    channels does not.
    """
    if flips is not None and len(flips):
        images_BHWC = _flipped_at(images_BHWC, flips)
    batch, height, width, _ = images_BHWC.shape
    device = images_BHWC.device
    mean, std = _rows_of(MEAN, width, device), _rows_of(STD, width, device)
    rows = images_BHWC.reshape(batch, height, width * 3)
    normalised = torch.empty(rows.shape, device=device)
    num_in_cache = 4 if device.type == "cpu" else batch
    for start in range(0, batch, num_in_cache):
        some = slice(start, start + num_in_cache)
        normalised[some].copy_(rows[some]).div_(255).sub_(mean).div_(std)
    return normalised.view(batch, height, width, 3).permute(0, 3, 1, 2)


def _flipped_at(images_BHWC: Tensor, flips: Tensor) -> Tensor:
    flipped = images_BHWC.index_select(0, flips).flip(2)
    if images_BHWC.device.type != "cpu":
        return images_BHWC.index_copy(0, flips, flipped)
    images_BHWC = images_BHWC.clone()
    for row, i in enumerate(flips.tolist()):  # index_copy takes five times as long on a CPU
        images_BHWC[i] = flipped[row]
    return images_BHWC


@lru_cache(maxsize=8)
def _rows_of(channels: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """One value a channel, repeated along a row of pixels; made once a device."""
    return torch.tensor(channels, device=device).repeat(width)


def load_best(run_dir: Path | str) -> ResNet:
    """A run's model at its best epoch, in eval mode, on the CPU.

    Its `.result` is the run's `RunResult`, or None where the run has not ended well; `.class_names`
    and `.image_size` say what its logits mean and what it takes. Raises `WeightsError`.
    """
    run_dir = Path(run_dir)
    content = read_checkpoint_of(run_dir)
    model = on_meta(len(content["class_names"]))  # random weights would be overwritten
    try:
        model.load_state_dict(content["state_dict"], assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{run_dir}/best.ckpt doesn't fit ResNet18: {reason}") from None
    model = model.to(memory_format=torch.channels_last)
    model.result = RunResult.load(run_dir) if (run_dir / "result.json").exists() else None
    model.class_names = content["class_names"]
    model.image_size = content["image_size"]
    return model.eval()


def read_checkpoint_of(run_dir: Path) -> dict[str, Any]:
    """A run directory's best.ckpt. Raises `WeightsError`."""
    path = run_dir / "best.ckpt"
    if not path.exists():
        raise WeightsError(f"{run_dir} has no best.ckpt: it is no run directory, or has no epoch")
    content = read_checkpoint(path)
    if missing := {"state_dict", "class_names", "image_size"} - content.keys():
        raise WeightsError(f"{path} is no checkpoint of a run: it lacks {', '.join(missing)}")
    names, size = content["class_names"], content["image_size"]
    named = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if not named or not isinstance(size, int) or not 32 <= size <= 1024:
        raise WeightsError(f"{path} is no checkpoint of a run: class_names or image_size is wrong")
    return content
