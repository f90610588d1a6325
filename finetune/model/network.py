"""Networks with random, pretrained or fine-tuned weights.

Legend: B batch, H height, W width, C channels, K classes.
"""

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config.backbones import DEFAULT_MODEL, find_backbone
from finetune.config.fields import RunConfig
from finetune.data.decode import Preprocessing
from finetune.model.chain import Chain
from finetune.model.state_dicts import adapt
from finetune.model.weights import fingerprint, read_checkpoint, read_source
from finetune.runs.result import RunResult
from finetune.system.errors import ConfigError, WeightsError
from finetune.system.files import run_directory
from finetune.system.text import listed


def build(model: str, num_classes: int, image_size: int, seed: int) -> Chain:
    """A network with random weights, drawn from `seed` as its own code initialises them.

    Raises `ConfigError` if it can't be divided into the parts of its `Backbone`.
    """
    with torch.random.fork_rng(devices=[]):
        state = _draw_head(on_meta(model, num_classes, image_size), seed)
        chain = _chain(model, _construct(model, num_classes, image_size))
        chain.network.load_state_dict(state, strict=False)
    return chain


def build_from(
    config: RunConfig, num_classes: int, log: Callable[[str], None]
) -> tuple[Chain, str | None]:
    """`build`'s network with the config's weights, if any, and their fingerprint."""
    if config.weights is None:
        return build(config.model, num_classes, config.image_size, config.seed), None
    with torch.random.fork_rng(devices=[]):
        chain = _chain(config.model, uninitialised(config.model, num_classes, config.image_size))
        state = _draw_head(chain, config.seed)
    chain.network.load_state_dict(state, strict=False)
    return chain, load_source(chain, config.model, config.weights, log)


def on_meta(model: str, num_classes: int, image_size: int) -> Chain:
    """The network on the meta device: shapes without values."""
    try:
        with torch.device("meta"):
            network = _construct(model, num_classes, image_size)
    except NotImplementedError:  # its constructor computes with tensors
        with torch.random.fork_rng(devices=[]):
            network = _construct(model, num_classes, image_size).to("meta")
    return _chain(model, network)


def _construct(model: str, num_classes: int, image_size: int) -> nn.Module:
    backbone = find_backbone(model)
    module, _, function = backbone.build.partition(":")
    size = {"image_size": image_size} if backbone.has_fixed_size else {}
    build_function = getattr(import_module(module), function)
    network: nn.Module = build_function(num_classes=num_classes, **backbone.options, **size)
    return network.to(memory_format=torch.channels_last)


def uninitialised(model: str, num_classes: int, image_size: int) -> nn.Module:
    """The network without meaningful weights on the CPU; random ones would take 0.1 s or more."""
    network = on_meta(model, num_classes, image_size).network
    state = network.state_dict()
    if all(name in state for name, _ in network.named_buffers()):
        return network.to_empty(device="cpu").to(memory_format=torch.channels_last)
    return _construct(model, num_classes, image_size)  # buffers that no checkpoint holds


def _chain(model: str, network: nn.Module) -> Chain:
    try:
        return Chain(network, find_backbone(model))
    except ConfigError as error:
        words = f"model: {model} can't be divided into a chain of parts"
        raise ConfigError(f"{words}: {error}") from None


def _draw_head(chain: Chain, seed: int) -> dict[str, Tensor]:
    """The state of the head as torch's modules initialise themselves.

    Drawn before any other weight, so that it is the same for every source of weights.
    """
    head, state = chain.parts[-1], dict[str, Tensor]()
    torch.default_generator.manual_seed(seed)
    for path, module in chain.network.named_modules():
        if chain.owner(path) == head and hasattr(module, "reset_parameters"):
            drawn: Any = copy.deepcopy(module).to_empty(device="cpu")
            drawn.reset_parameters()
            state |= {f"{path}.{key}": value for key, value in drawn.state_dict().items()}
    if others := [key for key in chain.state([head]) if key not in state]:
        raise ConfigError(f"model: its head holds {listed(others)}, which can't be initialised")
    return state


def load_source(chain: Chain, model: str, weights: str, log: Callable[[str], None]) -> str:
    """Load `imagenet`, a file of weights or a run directory into the network.

    A head that doesn't fit is not loaded: the network keeps its own. What else `adapt` changed in a
    file is logged in one line. Returns the fingerprint of the source's weights without the head.
    Raises `WeightsError` if anything else doesn't fit.
    """
    content, head = read_source(weights, model), chain.parts[-1]
    own_head = {key for key, part in chain.part_of_key.items() if part == head}
    try:
        state, note = adapt(content, chain.network.state_dict(), own_head)
    except WeightsError as error:
        needed = f"a state dict of {model} is needed, with the names of {chain.backbone.build}"
        raise WeightsError(f"weights: {weights} don't fit; {needed}: {error}") from None
    if note and weights != "imagenet":  # its head of 1000 classes is never needed
        log(f"weights: {weights}: {note}")
    chain.network.load_state_dict(state, strict=False)
    return fingerprint({key: value for key, value in state.items() if key not in own_head})


def boundary_shape(model: str, boundary: str, image_size: int) -> tuple[int, ...]:
    """The shape of one picture's activations that enter this part: (H, W, C), or as they are if
    they have no two spatial dimensions, such as (D,)."""
    chain = on_meta(model, num_classes=2, image_size=image_size)
    chain.network.eval()
    pictures = torch.empty(1, 3, image_size, image_size, device="meta")
    with torch.inference_mode():
        x = chain.forward(pictures, chain.parts[0], boundary)
    return (*x.shape[2:], x.shape[1]) if x.ndim == 4 else tuple(x.shape[1:])


Channels = tuple[float, float, float]
"""A value for each of red, green and blue."""


def normalise(images_BHWC: Tensor, flips: Tensor | None, mean: Channels, std: Channels) -> Tensor:
    """uint8 pictures -> normalised float32, (B, 3, H, W) in channels_last.

    The pictures for which `flips`, bool, (B,), is true are flipped. To the bit torchvision's
    ToTensor and Normalize, but computed over rows of W x 3 values, which is faster than over single
    channels.
    """
    device = images_BHWC.device
    if flips is not None and device.type != "cpu":  # fixed shapes: nothing waits for the device
        images_BHWC = torch.where(flips[:, None, None, None], images_BHWC.flip(2), images_BHWC)
    elif flips is not None:
        images_BHWC = images_BHWC.clone()
        for i in flips.nonzero()[:, 0].tolist():  # on a CPU several times faster than `where`
            images_BHWC[i] = images_BHWC[i].flip(1)
    batch, height, width, _ = images_BHWC.shape
    means, stds = _repeated(mean, width, device), _repeated(std, width, device)
    rows = images_BHWC.reshape(batch, height, width * 3)
    normalised = torch.empty(rows.shape, device=device)
    chunk_size = 4 if device.type == "cpu" else batch
    for start in range(0, batch, chunk_size):
        chunk = slice(start, start + chunk_size)
        normalised[chunk].copy_(rows[chunk]).div_(255).sub_(means).div_(stds)
    return normalised.view(batch, height, width, 3).permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def _repeated(channels: Channels, width: int, device: torch.device) -> Tensor:
    """One value per channel, repeated for each pixel of a row."""
    return torch.tensor(channels, device=device).repeat(width)


def load_best(run_dir: Path | str) -> nn.Module:
    """A run's network at its best epoch, in eval mode, on the CPU.

    `.predict(PICTURES)` gives classes and probabilities (`finetune.model.prediction`); `.run_dir`
    is the run's directory, `.result` its `RunResult`, or None if the run hasn't finished;
    `.model_name`, `.class_names`, `.image_size`, `.preprocessing`, `.mean` and `.std` are those it
    was trained with. Raises `WeightsError`.
    """
    from finetune.model.prediction import predict  # which imports this module

    run_dir = run_directory(run_dir)
    content = _read_best(run_dir)
    name, class_names, size = content["model"], content["class_names"], content["image_size"]
    try:
        network: Any = uninitialised(name, len(class_names), size)
        network.load_state_dict(content["state_dict"], assign=True)
    except ConfigError as error:
        words = f"{run_dir}/best.ckpt holds a network that can't be built"
        raise WeightsError(f"{words}: {error}") from None
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{run_dir}/best.ckpt doesn't fit {name}: {reason}") from None
    network = network.to(memory_format=torch.channels_last)
    network.run_dir, network.predict = run_dir, partial(predict, network)
    network.result = RunResult.load(run_dir) if (run_dir / "result.json").exists() else None
    network.model_name, network.class_names, network.image_size = name, class_names, size
    network.preprocessing = _preprocessing(content)
    backbone = find_backbone(name)
    network.mean = tuple(content.get("mean", backbone.mean))
    network.std = tuple(content.get("std", backbone.std))
    best: nn.Module = network.eval()
    return best


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
    content = {"model": DEFAULT_MODEL, **read_checkpoint(path)}
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
