"""Classes and probabilities of pictures, by a run's best model.

Pictures are decoded, normalised and batched as in the run's validation. Neither Lightning nor wandb
is imported, which keeps the start-up time short.

    python -m finetune predict runs/k3x9q2ab picture.jpg folder/
"""

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from finetune.config.backbones import find_backbone
from finetune.config.fields import RunConfig
from finetune.data.batches import batch_bounds
from finetune.data.decode import Preprocessing, decode
from finetune.data.layout import by_suffix, is_picture
from finetune.model.chain import Chain
from finetune.model.network import load_best, normalise
from finetune.runs.predictions import softmax
from finetune.runs.run_dir import RunDir
from finetune.system.devices import num_cores
from finetune.system.errors import DataError
from finetune.system.files import walk
from finetune.system.progress import StartProgress, bar, no_progress
from finetune.system.text import one_line

Logits = np.ndarray[Any, np.dtype[np.float32]]

_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Predictor:
    """A run's best model, and the device, precision and batch size to use it with."""

    model: nn.Module
    """From `load_best`."""
    class_names: list[str]
    preprocessing: Preprocessing
    config: RunConfig | None
    device: torch.device
    autocast_dtype: torch.dtype | None

    @property
    def batch_size(self) -> int:
        default: int = RunConfig.model_fields["batch_size"].default
        return (self.config and self.config.batch_size) or default

    @torch.inference_mode()
    def logits(self, images_BHWC: Tensor) -> Logits:
        """The logits of uint8 pictures, (B, K)."""
        model: Any = self.model
        x = normalise(images_BHWC.to(self.device), None, model.mean, model.std)
        if self.autocast_dtype is None:
            logits_BK = model(x)
        else:  # in parts, as in training
            with torch.autocast(self.device.type, self.autocast_dtype):
                logits_BK = self._chain.logits(x, self._chain.parts[0])
        logits: Logits = logits_BK.cpu().numpy()
        return logits

    @cached_property
    def _chain(self) -> Chain:
        model: Any = self.model
        return Chain(model, find_backbone(model.model_name))


def load_predictor(run_dir: Path) -> Predictor:
    """A run's best model on its device type if available, else on the CPU.

    Raises `WeightsError` and `RunDirError`.
    """
    model: Any = load_best(run_dir)
    run = RunDir(run_dir)
    config = run.read_config() if run.config_path.exists() else None
    device = torch.accelerator.current_accelerator(check_available=True)
    if config is None or device is None or device.type != config.accelerator:
        device = torch.device("cpu")
    dtype = _DTYPES.get(config.precision) if config and device.type == config.accelerator else None
    return Predictor(
        model.to(device), model.class_names, model.preprocessing, config, device, dtype
    )


def predict_logits(
    predictor: Predictor, paths: Sequence[Path], progress: StartProgress = no_progress
) -> list[Logits | DataError]:
    """For each picture its logits, (K,), or the reason why it can't be read.

    Batches have the size of the run's: the last bit of a logit may depend on it. Each core computes
    batches of its own.
    """
    done = progress("predicting", len(paths))

    def predict_batch(bounds: tuple[int, int]) -> list[Logits | DataError]:
        decoded: list[Tensor | DataError] = []
        for path in paths[slice(*bounds)]:
            try:
                decoded.append(decode(path, predictor.preprocessing).image)
            except DataError as error:
                decoded.append(error)
            done()
        images = [image for image in decoded if isinstance(image, Tensor)]
        rows = iter(predictor.logits(torch.stack(images)) if images else ())
        return [next(rows) if isinstance(image, Tensor) else image for image in decoded]

    bounds = batch_bounds(len(paths), predictor.batch_size)
    # On a GPU one thread computes while another decodes; more would only need its memory.
    num_threads = num_cores() if predictor.device.type == "cpu" else 2
    with ThreadPoolExecutor(num_threads, "predict", torch.set_num_threads, (1,)) as pool:
        return [outcome for batch in pool.map(predict_batch, bounds) for outcome in batch]


class FoundImages(NamedTuple):
    """The pictures of a path that was given to `predict`."""

    images: list[tuple[Path, DataError | None]]
    """Each path, with the reason if it can't be predicted."""
    left_out: list[str]
    """Other files of a folder."""


def find_images(given: Path) -> FoundImages:
    """A file as it is; a folder as its pictures, ordered by class as in validation.

    A folder without pictures, or that can't be read, comes with the reason.
    """
    if not given.is_dir():
        return FoundImages([(given, None)], [])
    errors: list[OSError] = []
    folders = walk(given, errors.append, follow_links=True)
    files = [place / name for place, _, names in folders for name in names]
    pictures = list(filter(is_picture, files))
    left_out = sorted(map(str, set(files) - set(pictures)))
    names = [path.relative_to(given) for path in pictures]
    names.sort(key=lambda name: (name.parts[0], name.as_posix()))
    reasons = [(e.filename, DataError(f"{e.filename} can't be read: {e.strerror}")) for e in errors]
    if not names and not reasons:
        found = f" (found: {by_suffix(left_out)})" if left_out else ""
        reasons = [(given, DataError(f"{given} holds no pictures{found}"))]
    failed: list[tuple[Path, DataError | None]] = [(Path(p), error) for p, error in reasons]
    return FoundImages([(given / name, None) for name in names] + failed, left_out)


def predict(run_dir: Path, given: Sequence[Path], top: int = 3, as_json: bool = False) -> int:
    """Print the `top` classes of each picture; 1 if one of them can't be predicted, else 0."""
    predictor = load_predictor(run_dir)
    found: list[tuple[Path, DataError | None]] = []
    for path in given:
        images, left_out = find_images(path)
        found += images
        if left_out:
            print(f"left out in {one_line(path)}: {by_suffix(left_out)}", file=sys.stderr)
    paths = [path for path, error in found if error is None]
    progress = bar if sys.stderr.isatty() and not as_json else no_progress
    logits = iter(predict_logits(predictor, paths, progress))
    names = predictor.class_names
    answers = [_answer(path, error or next(logits), names, top) for path, error in found]
    bad = [answer for answer in answers if "error" in answer]
    if as_json:
        print(json.dumps(answers, ensure_ascii=False, indent=2))
    else:
        _print_table([answer for answer in answers if "error" not in answer])
    for answer in bad:
        print(f"error: {one_line(answer['error'])}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} of {len(answers)} could not be predicted", file=sys.stderr)
    return 1 if bad else 0


def _answer(
    path: Path, outcome: Logits | DataError, class_names: Sequence[str], top: int
) -> dict[str, Any]:
    if isinstance(outcome, DataError):
        return {"path": str(path), "class": None, "probability": None, "error": str(outcome)}
    probabilities = softmax(outcome)
    best = np.argsort(-outcome, kind="stable")[:top]  # of equal logits the first, as argmax does
    ranked = [{"class": class_names[i], "probability": float(probabilities[i])} for i in best]
    return {"path": str(path), **ranked[0], "top": ranked}


def _print_table(answers: Sequence[dict[str, Any]]) -> None:
    path_width = max((len(one_line(a["path"])) for a in answers), default=0)
    names = [one_line(entry["class"]) for a in answers for entry in a["top"]]
    class_width = max(map(len, names), default=0)
    for a in answers:
        ranked = "   ".join(
            f"{one_line(entry['class']):{class_width}} {entry['probability']:7.2%}"
            for entry in a["top"]
        )
        print(f"{one_line(a['path']):{path_width}}  {ranked}")
