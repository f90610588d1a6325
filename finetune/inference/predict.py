"""The winner put to use: pictures -> classes and probabilities.

Turns a run directory and paths of pictures into predictions, read and computed as the run's own
validation was: same decoding, resizing, normalising and batches. Knows nothing about training;
neither Lightning nor wandb is imported, so that one picture is answered quickly.

    python -m finetune predict runs/k3x9q2ab picture.jpg folder/
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models import ResNet

from finetune.config.fields import RunConfig
from finetune.data.batches import batch_bounds
from finetune.data.decode import decode
from finetune.data.layout import IMAGE_SUFFIXES
from finetune.model.network import forward, load_best, normalise
from finetune.runs.predictions import softmax
from finetune.runs.run_dir import RunDir
from finetune.system.devices import num_cores
from finetune.system.errors import DataError
from finetune.system.progress import StartProgress, bar, no_progress
from finetune.system.text import one_line

Logits = np.ndarray[Any, np.dtype[np.float32]]

_DEVICES: dict[str, Callable[[], bool]] = {
    "cuda": torch.cuda.is_available,
    "mps": torch.backends.mps.is_available,
}
_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class BestModel:
    """A run's best model with what its use needs: where it computes, and how."""

    model: ResNet
    class_names: list[str]
    image_size: int
    batch_size: int
    device: torch.device
    precision: Callable[[], AbstractContextManager[Any]]

    @torch.inference_mode()
    def logits(self, images_BHWC: Tensor) -> Logits:
        """Of uint8 pictures, (B, K)."""
        x = normalise(images_BHWC.to(self.device), None)
        with self.precision():
            logits_BK = forward(self.model, x, "stem", None)
        logits: Logits = logits_BK.float().cpu().numpy()
        return logits


def open_best_model(run_dir: Path) -> BestModel:
    """The best epoch's model on the run's own kind of device where there is one, else on the CPU.

    Raises `WeightsError` and `RunDirError`.
    """
    model = load_best(run_dir)
    run = RunDir(run_dir)
    fields = run.read_config().to_fields() if run.config_path.exists() else {}
    kind = fields.get("accelerator")
    device = torch.device(kind if kind in _DEVICES and _DEVICES[kind]() else "cpu")
    dtype = _DTYPES.get(str(fields.get("precision")))
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    if device.type == kind and dtype is not None:
        precision = partial(torch.autocast, device.type, dtype)
    class_names: Any = model.class_names
    image_size: Any = model.image_size
    batch_size = int(fields.get("batch_size") or RunConfig.model_fields["batch_size"].default)
    return BestModel(model.to(device), class_names, image_size, batch_size, device, precision)


def predict_logits(
    winner: BestModel, paths: Sequence[Path], progress: StartProgress = no_progress
) -> list[Logits | DataError]:
    """For each picture its logits, (K,), or why there are none.

    Pictures share batches as they would in validation: a last bit of a logit may depend on them.
    Each core has batches of its own: threads that share one would wait for each other.
    """
    done = progress("predicting", len(paths))

    def predict_batch(bounds: tuple[int, int]) -> list[Logits | DataError]:
        decoded: list[Tensor | DataError] = []
        for path in paths[slice(*bounds)]:
            try:
                decoded.append(decode(path, winner.image_size))
            except DataError as error:
                decoded.append(error)
            done()
        images = [image for image in decoded if isinstance(image, Tensor)]
        rows = iter(winner.logits(torch.stack(images)) if images else ())
        return [next(rows) if isinstance(image, Tensor) else image for image in decoded]

    bounds = batch_bounds(len(paths), winner.batch_size)
    with ThreadPoolExecutor(num_cores(), "predict", torch.set_num_threads, (1,)) as pool:
        return [outcome for batch in pool.map(predict_batch, bounds) for outcome in batch]


@dataclass(frozen=True)
class BadFolder:
    """A folder that gives no pictures, and why."""

    path: Path
    error: DataError


def find_images(given: Sequence[Path]) -> list[Path | BadFolder]:
    """Each path as it stands, a folder as its pictures, class by class as validation orders them.

    What can't be decoded shows later; folders without pictures, or that can't be read, show here.
    """
    found: list[Path | BadFolder] = []
    for path in given:
        found += _below(path) if path.is_dir() else [path]
    return found


def _below(folder: Path) -> list[Path | BadFolder]:
    names: list[Path] = []
    bad: list[Path | BadFolder] = []

    def note(error: OSError) -> None:
        why = DataError(f"{error.filename} can't be read: {error.strerror}")
        bad.append(BadFolder(Path(error.filename), why))

    for place, dirs, files in os.walk(folder, onerror=note):
        dirs[:] = [d for d in dirs if not d.startswith(".")]
        names += [
            Path(place, name).relative_to(folder)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    names.sort(key=lambda name: (name.parts[0], name.as_posix()))
    if not names and not bad:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        bad.append(
            BadFolder(folder, DataError(f"{folder} holds no pictures (looked for {suffixes})"))
        )
    return [*(folder / name for name in names), *bad]


def predict(run_dir: Path, given: Sequence[Path], top: int = 3, as_json: bool = False) -> int:
    """Print the class and probability of each picture; 1 where one of them was bad, else 0."""
    winner = open_best_model(run_dir)
    found = find_images(given)
    pictures = [path for path in found if isinstance(path, Path)]
    shows_progress = sys.stderr.isatty() and not as_json
    logits = iter(predict_logits(winner, pictures, bar if shows_progress else no_progress))
    answers = [
        _answer(str(one), next(logits), winner.class_names, top)
        if isinstance(one, Path)
        else _answer(str(one.path), one.error, winner.class_names, top)
        for one in found
    ]
    if as_json:
        print(json.dumps(answers, ensure_ascii=False, indent=2))
    else:
        _print_table(answers)
    bad = [answer for answer in answers if "error" in answer]
    for answer in bad:
        print(f"error: {one_line(answer['error'])}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} of {len(answers)} could not be predicted", file=sys.stderr)
    return 1 if bad else 0


def _answer(
    path: str, outcome: Logits | DataError, class_names: Sequence[str], top: int
) -> dict[str, Any]:
    if isinstance(outcome, DataError):
        return {"path": path, "class": None, "probability": None, "error": str(outcome)}
    probabilities = softmax(outcome)
    # the first of equal logits, as argmax has it
    best = np.argsort(-outcome, kind="stable")[:top]
    ranked = [{"class": class_names[i], "probability": float(probabilities[i])} for i in best]
    return {"path": path, **ranked[0], "top": ranked}


def _print_table(answers: Sequence[dict[str, Any]]) -> None:
    shown = [
        (one_line(a["path"]), [(one_line(one["class"]), one["probability"]) for one in a["top"]])
        for a in answers
        if "error" not in a
    ]
    path_width = max((len(path) for path, _ in shown), default=0)
    class_width = max((len(name) for _, top in shown for name, _ in top), default=0)
    for path, top in shown:
        ranked = [f"{name:{class_width}} {probability:7.2%}" for name, probability in top]
        print(f"{path:{path_width}}  {'   '.join(ranked)}".rstrip())
