"""A run's winner, for use elsewhere.

Turns a run directory into one file that holds the network, its preprocessing and its class names,
and checks that the file answers as the model does. Knows nothing about training.

    python -m finetune export runs/k3x9q2ab --format onnx
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import ResNet

from finetune.model.network import MEAN, STD, forward, load_best, normalise, read_checkpoint_of
from finetune.model.weights import read_checkpoint, write_checkpoint
from finetune.system.errors import MissingPackage, RunDirError, WeightsError
from finetune.system.files import remove_left_behind

TOLERANCE = 1e-4
"""The most that a logit of the exported model may differ."""


def export(run_dir: Path, format_name: str, out: Path | None = None) -> int:
    """Write RUN_DIR/model.onnx or model.pth, or `out`, and check its answers.

    Raises `WeightsError` when the file doesn't answer as the model, and then leaves none.
    """
    write, suffix = FORMATS[format_name]
    path = out or run_dir / f"model{suffix}"
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    model = load_best(run_dir).cpu()
    about = _about(run_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_behind(path)
        difference = _difference(model, about["image_size"], write(model, about, aside))
        if not difference <= TOLERANCE:
            raise WeightsError(
                f"{path}: its logits would differ from the model's by {difference:g}, more than "
                f"{TOLERANCE:g}"
            )
        aside.replace(path)
    except OSError as error:
        raise RunDirError(f"{path} can't be written: {error.strerror or error}") from None
    finally:
        aside.unlink(missing_ok=True)
    print(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB; its logits are the model's "
        f"(at most {difference:.1g} apart)"
    )
    print(f"in: {about['input']}\nout: {about['output']}")
    return 0


def _about(run_dir: Path) -> dict[str, Any]:
    """What a user of the file needs besides the network."""
    content = read_checkpoint_of(run_dir)
    size = content["image_size"]
    return {
        "class_names": content["class_names"],
        "image_size": size,
        "mean": list(MEAN),
        "std": list(STD),
        "preprocessing": f"RGB picture, resized to {size}x{size} without keeping its aspect, "
        "bilinear with antialiasing; divided by 255; mean subtracted; divided by std",
        "run": run_dir.absolute().name,
    }


Answer = Callable[[Tensor], np.ndarray[Any, Any]]
"""What a written file makes of uint8 pictures, (B, H, W, 3): logits, (B, K)."""


def _difference(model: ResNet, size: int, answer: Answer) -> float:
    """The largest difference of a logit over random pictures, in a batch and alone."""
    pictures = torch.randint(
        0, 256, (3, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    apart = [0.0]
    for batch in (pictures, pictures[:1]):
        with torch.inference_mode():
            expected = forward(model, normalise(batch, None), "stem", None).numpy()
        apart.append(float(np.abs(answer(batch) - expected).max()))
    return max(apart)


def _write_state_dict(model: ResNet, about: dict[str, Any], path: Path) -> Answer:
    about["input"] = about["preprocessing"]
    about["output"] = f"logits of {', '.join(about['class_names'])}"
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    write_checkpoint(about | {"state_dict": state}, path)
    again = _rebuilt(read_checkpoint(path))

    def answer(images_BHWC: Tensor) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            found: np.ndarray[Any, Any] = again(normalise(images_BHWC, None)).numpy()
        return found

    return answer


def _rebuilt(content: dict[str, Any]) -> ResNet:
    """torchvision's own ResNet18 with an exported state dict, in eval mode."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=len(content["class_names"]))
    model.load_state_dict(content["state_dict"])
    return model.eval()


class _FromPixels(nn.Module):
    """The network behind its normalisation: uint8 pictures in."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: ResNet) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.permute(0, 3, 1, 2).float().div(255).sub(self.mean).div(self.std)
        logits: Tensor = self.model(x)
        return logits


def _write_onnx(model: ResNet, about: dict[str, Any], path: Path) -> Answer:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise MissingPackage(
            "onnx onnxscript onnxruntime", "export", f"export to ONNX ({error.name} is missing)"
        ) from None
    size = about["image_size"]
    about["input"] = (
        f"pictures: uint8, (batch, {size}, {size}, 3), RGB, resized without keeping the aspect, "
        "bilinear with antialiasing; normalising is part of the network"
    )
    about["output"] = f"logits: float32, (batch, {len(about['class_names'])}), one a class name"
    program = _traced(_FromPixels(model.to(memory_format=torch.contiguous_format)).eval(), size)
    described = program.model_proto
    for key, value in about.items():
        text = value if isinstance(value, str) else json.dumps(value)
        described.metadata_props.add(key=key, value=text)
    onnx.save(described, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def answer(images_BHWC: Tensor) -> np.ndarray[Any, Any]:
        (logits,) = session.run(["logits"], {"pictures": images_BHWC.numpy()})
        found: np.ndarray[Any, Any] = logits
        return found

    return answer


def _traced(network: nn.Module, size: int) -> Any:
    """torch's ONNX program for a batch of any size; its chatter is kept from the terminal."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            network,
            (torch.zeros(2, size, size, 3, dtype=torch.uint8),),
            dynamo=True,
            input_names=["pictures"],
            output_names=["logits"],
            dynamic_shapes={"pictures": {0: batch}},
            verbose=False,
        )


FORMATS: dict[str, tuple[Callable[[ResNet, dict[str, Any], Path], Answer], str]] = {
    "onnx": (_write_onnx, ".onnx"),
    "state_dict": (_write_state_dict, ".pth"),
}
