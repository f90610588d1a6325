"""State dicts and checkpoints: read without running what is in them, written whole or not at all.

Turns files into tensors by name, and those into a fingerprint. Knows nothing about networks.

    >>> state = read_state(Path("resnet18.pth"))  # doctest: +SKIP
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torchvision.models import ResNet18_Weights

from finetune.system.errors import WeightsError

State = dict[str, Tensor]


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and bytes: it tells weights apart, and isn't for enemies."""
    found = xxhash.xxh3_128()
    for key in sorted(state):
        tensor = state[key].detach().cpu()
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # In the order in which `build` lays convolutions out, so that they needn't be copied.
        tensor = (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).contiguous()
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_source(weights: str) -> State:
    """The state dict that `imagenet`, a file or a run directory stands for.

    ImageNet's are torchvision's, fetched and hash-checked by it. Raises `WeightsError`.
    """
    return _imagenet() if weights == "imagenet" else read_state(Path(weights))


def _imagenet() -> State:
    weights = ResNet18_Weights.IMAGENET1K_V1
    place = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(weights.url)
    if place.exists():
        return read_state(place)
    try:
        state: State = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"weights: ImageNet's are not at {place}, and can't be fetched from {weights.url} "
            f"({error}). Put that file there, or pass --weights a ResNet18 state dict; "
            "--strategy scratch needs none"
        ) from None
    return state


def read_state(path: Path) -> State:
    """A state dict from a .pth, a .safetensors or a run directory. Never runs what it loads.

    Raises `WeightsError`.
    """
    if path.is_dir():
        path = path / "best.ckpt"
    if not path.exists():
        raise WeightsError(
            f"weights: {path} does not exist; pass imagenet, a state-dict file or a run directory"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: State = load_file(path)
            return loaded
    except ImportError:
        raise WeightsError(f"weights: {path} needs safetensors: pip install safetensors") from None
    except Exception as error:
        raise WeightsError(f"weights: {path} can't be read: {error}") from None
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(
            f"weights: {path} is no state dict (found: {', '.join(map(str, list(state)[:4]))})"
        )
    return state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What torch.save wrote, its archive's CRCs checked first: torch itself takes flipped bytes.

    Raises `WeightsError`; files that would execute something are refused.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type for member in archive.infolist()):
                    raise WeightsError(f"{path} is compressed, which torch's files never are")
                if damaged := archive.testzip():
                    raise WeightsError(f"{path} is damaged (in {damaged})")
        elif path.read_bytes()[:2] != b"\x80\x02":  # torch's format before 1.6 is a bare pickle
            raise WeightsError(f"{path} is damaged or no checkpoint")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(f"{path} can't be loaded as weights: {reason}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def write_checkpoint(content: Mapping[str, Any], path: Path) -> None:
    """torch.save beside the target, then a rename: a whole file or none.

    Raises `OSError` with the path in it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A file of ours is closed at once: torch's own keeps its place on a full disk for long.
        with beside.open("wb") as file:
            torch.save(content, file)
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises its own while it handles a full disk
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        beside.unlink(missing_ok=True)
