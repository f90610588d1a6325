"""A run's best model as a file for other programs: ONNX, or a state dict.

python -m finetune export runs/k3x9q2ab --format onnx
"""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.decode import Preprocessing
from finetune.model.network import load_best, normalise, uninitialised
from finetune.model.weights import read_checkpoint, write_checkpoint
from finetune.system.errors import ConfigError, MissingPackage, RunDirError, WeightsError
from finetune.system.files import remove_leftovers

TOLERANCE = 1e-4
"""The largest allowed difference of a logit, as a share of the largest logit if that is above 1."""

OLDEST_OPSET = 18
"""The oldest operator set that torch's exporter writes; onnxruntime 1.15 reads it."""

ExportedModel = Callable[[Tensor], Tensor]
"""The logits, (B, K), that a written file gives for uint8 pictures, (B, H, W, 3)."""


def export(
    run_dir: Path, format_name: str, out: Path | None = None, opset: int | None = None
) -> int:
    """Write RUN_DIR/model.onnx or model.pth, or `out`, and compare its logits with the model's.

    `opset`: ONNX's operator set (default: `OLDEST_OPSET`). Raises `WeightsError`, and leaves no
    file, if the logits differ by more than `TOLERANCE`.
    """
    write, suffix = FORMATS[format_name]
    if opset is not None:
        if format_name != "onnx":
            raise ConfigError(f"opset: got {opset} with --format {format_name}; only onnx has one")
        write = partial(write, opset=opset)
    path = out or run_dir / f"model{suffix}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    model: Any = load_best(run_dir)
    size = model.image_size
    about = {
        "class_names": model.class_names,
        "image_size": size,
        "model": model.model_name,
        "mean": list(model.mean),
        "std": list(model.std),
        "reading": _reading(model.preprocessing),
        "preprocessing": f"resized to {size}x{size} without keeping its aspect, bilinear with "
        "antialiasing; divided by 255; mean subtracted; divided by std",
        "run": run_dir.absolute().name,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        difference = _difference(model, size, write(model, about, temporary))
        if not difference <= TOLERANCE:
            words = f"its logits would differ from the model's by {difference:g}"
            raise WeightsError(f"{path}: {words}, more than {TOLERANCE:g}")
        temporary.replace(path)
    except OSError as error:
        raise RunDirError(f"{path} can't be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    num_bytes = path.stat().st_size
    print(f"{path}: {num_bytes / 1e6:.1f} MB; its logits equal the model's within {difference:.1g}")
    print(f"input: {about['input']}\noutput: {about['output']}")
    return 0


def _reading(preprocessing: Preprocessing) -> str:
    """How a file becomes the RGB picture that is resized, in words."""
    words = f"RGB, upright by EXIF's orientation, transparent pixels on {preprocessing.background}"
    if bounds := preprocessing.pixel_range:
        words += f"; in pictures of more than 8 bits {bounds[0]:g}..{bounds[1]:g} becomes 0..255"
    return words


@torch.inference_mode()
def _difference(model: Any, image_size: int, exported: ExportedModel) -> float:
    """The largest difference of a logit over random pictures, as a batch and as one picture.

    Logits above 1 count as a share of the largest, because their rounding grows with them.
    """
    shape, generator = (3, image_size, image_size, 3), torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    differences = []
    for batch in (pictures, pictures[:1]):
        logits = model(normalise(batch, None, model.mean, model.std))
        largest = logits.abs().max().clamp(min=1.0)
        differences.append((exported(batch) - logits).abs().max() / largest)
    return torch.stack(differences).max().item()


def _write_state_dict(model: Any, about: dict[str, Any], path: Path) -> ExportedModel:
    about["input"] = f"picture: {about['reading']}; {about['preprocessing']}"
    about["output"] = f"logits of {', '.join(about['class_names'])}"
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    write_checkpoint(about | {"state_dict": state}, path)
    rebuilt = uninitialised(model.model_name, len(about["class_names"]), about["image_size"])
    rebuilt.load_state_dict(read_checkpoint(path)["state_dict"], assign=True)
    rebuilt = rebuilt.eval()
    return lambda images_BHWC: rebuilt(normalise(images_BHWC, None, model.mean, model.std))


class _FromPixels(nn.Module):
    """The network with its normalisation: uint8 pictures are its input."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Any:
        values = (self.model.mean, self.model.std)
        mean, std = (torch.tensor(channels).view(3, 1, 1) for channels in values)
        return self.model(pictures.permute(0, 3, 1, 2).float().div(255).sub(mean).div(std))


def _write_onnx(
    model: Any, about: dict[str, Any], path: Path, opset: int = OLDEST_OPSET
) -> ExportedModel:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        purpose = f"export to ONNX ({error.name} is missing)"
        raise MissingPackage("onnx onnxscript onnxruntime", "export", purpose) from None
    size = about["image_size"]
    about["input"] = (
        f"pictures: uint8, (batch, {size}, {size}, 3), {about['reading']}; resized without keeping "
        "the aspect, bilinear with antialiasing; normalising is part of the network"
    )
    about["output"] = f"logits: float32, (batch, {len(about['class_names'])}), one per class name"
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise ConfigError(f"opset: got {opset}; must be {OLDEST_OPSET} to {newest}")
    program = _onnx_program(model, size, opset)
    if (written := program.opset_import[0].version) != opset:
        raise ConfigError(f"opset: got {opset}, but torch's exporter wrote {written}; pass that")
    # The exporter names a newer format of files than the operators need; old runtimes refuse it.
    program.ir_version = onnx.helper.find_min_ir_version_for(program.opset_import)
    for key, value in about.items():
        text = value if isinstance(value, str) else json.dumps(value)
        program.metadata_props.add(key=key, value=text)
    onnx.save(program, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"pictures": images.numpy()})[0])


def _onnx_program(model: Any, size: int, opset: int) -> Any:
    """The model in ONNX for batches of any size; the exporter's own output is suppressed."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            _FromPixels(model.to(memory_format=torch.contiguous_format)).eval(),
            (torch.zeros(2, size, size, 3, dtype=torch.uint8),),
            dynamo=True,
            opset_version=opset,
            input_names=["pictures"],
            output_names=["logits"],
            dynamic_shapes={"pictures": {0: torch.export.Dim("batch", min=1, max=4096)}},
            verbose=False,
        )
    return program.model_proto


FORMATS: dict[str, tuple[Callable[..., ExportedModel], str]] = {
    "onnx": (_write_onnx, ".onnx"),
    "state_dict": (_write_state_dict, ".pth"),
}
