"""State dicts and checkpoints: reading without executing their content, and atomic writing."""

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torchvision.models import get_model_weights

from finetune.config import timm_backbones
from finetune.config.backbones import find_backbone
from finetune.system.errors import WeightsError
from finetune.system.files import write_atomically

FORMAT_VERSION = 2
"""In every checkpoint as `format_version`. Version 1, which 0.1.0 wrote, has no such entry."""

State = dict[str, Tensor]


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and bytes, to tell weights apart; not cryptographic."""
    hashed = xxhash.xxh3_128()
    for key in sorted(state):
        tensor = state[key].detach().cpu()
        hashed.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # In channels_last order, the layout of `build`'s convolutions: no copy is needed.
        tensor = (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).contiguous()
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def read_source(weights: str, model: str) -> dict[str, Any]:
    """A network's ImageNet weights, or the content of a file. Raises `WeightsError`."""
    if weights != "imagenet":
        return read_file(Path(weights))
    advice = f"pass --weights a state dict of {model}; --strategy scratch needs none"
    if timm_backbones.is_timm(model):
        try:
            return dict(timm_backbones.create(model, pretrained=True).state_dict())
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            words = f"weights: timm can't provide those of {model} ({reason})"
            raise WeightsError(f"{words}; {advice}") from None
    backbone = find_backbone(model)
    if backbone.weights_file is None:
        raise WeightsError(f"weights: no ImageNet weights of {model} are known; {advice}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / backbone.weights_file
    if path.exists():
        return read_file(path)
    imagenet: Any = get_model_weights(backbone.function)["IMAGENET1K_V1"]
    try:
        return dict(imagenet.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"weights: ImageNet's are not at {path}, and can't be downloaded from {imagenet.url} "
            f"({error}). Put that file there, or {advice}"
        ) from None


def read_file(path: Path) -> dict[str, Any]:
    """What is in a .pth, a .ckpt, a .safetensors or a run directory. Raises `WeightsError`."""
    path = path / "best.ckpt" if path.is_dir() else path
    if not path.exists():
        raise WeightsError(
            f"weights: {path} does not exist; pass imagenet, a state-dict file or a run directory"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
    except ImportError:
        raise WeightsError(f"weights: {path} needs safetensors: pip install safetensors") from None
    except Exception as error:
        raise WeightsError(f"weights: {path} can't be read: {error}") from None
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a file written by torch.save.

    The archive's CRCs are checked first, because torch.load doesn't. Raises `WeightsError`, also
    for files that would execute code.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise WeightsError(
                        f"{path} is a TorchScript archive, which holds code. If you trust it, save "
                        "its state dict instead: "
                        f"torch.save(torch.jit.load({str(path)!r}).state_dict(), NEW)"
                    )
                if any(member.compress_type for member in archive.infolist()):
                    raise WeightsError(f"{path} is compressed, which torch's files never are")
                if damaged := archive.testzip():
                    raise WeightsError(f"{path} is damaged (in {damaged})")
        elif path.read_bytes()[:2] != b"\x80\x02":  # torch's format before 1.6 is a bare pickle
            raise WeightsError(f"{path} is damaged or not a checkpoint")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{path} can't be loaded as weights: {_reason(error, path)}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


_REFUSALS = {
    r"GLOBAL (\S+)": (
        "it holds a pickled model or another object ({found}), which would execute code when "
        "loaded. If you trust it, save its state dict instead: "
        "torch.save(torch.load({file!r}, weights_only=False).state_dict(), NEW), or the entry with "
        "the state dict if it holds a dict"
    ),
    r"WeightsUnpickler error: (.+)": "{found}",
    r"(.+)": "{found}",
}
"""What torch.load says, and what we say: its own messages advise to execute the file."""


def _reason(error: Exception, path: Path) -> str:
    for pattern, words in _REFUSALS.items():
        if match := re.search(pattern, str(error)):
            return words.format(found=match[1], file=str(path))
    return type(error).__name__


def write_checkpoint(content: Mapping[str, Any], path: Path) -> None:
    """torch.save, but atomic. Raises `OSError` with the path in it."""
    buffer = io.BytesIO()  # torch.save would hide the error of a full disk in its own
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue(), sync=False)
