"""Classes and probabilities of pictures, by a loaded model.

    >>> load_best("runs/k3x9q2ab").predict("bee.jpg")  # doctest: +SKIP
    Prediction(bees 97.3 %)

Legend: B batch, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.data.decode import Preprocessing, decode, pixels_of
from finetune.model.network import normalise
from finetune.runs.predictions import softmax
from finetune.system.errors import DataError

Picture = str | Path | Image.Image | np.ndarray[Any, Any]
"""A file, Pillow's image, or an array, (H, W) or (H, W, 3 or 4), uint8."""

_BATCH_SIZE = 32


@dataclass(frozen=True, repr=False)
class Prediction:
    """What a model says of one picture."""

    class_name: str
    probability: float
    probabilities: dict[str, float]
    """Of every class, the most probable first."""

    def __repr__(self) -> str:
        return f"Prediction({self.class_name} {100 * self.probability:.1f} %)"


def predict(model: Any, pictures: Picture | Sequence[Picture]) -> Any:
    """The `Prediction` of a picture, or a list of them for a list of pictures.

    `model` is from `load_best`; a picture is decoded, resized and normalised as in its run. Raises
    `DataError` for one that can't be read.
    """
    if isinstance(pictures, list | tuple):
        found: list[Prediction] = []
        for start in range(0, len(pictures), _BATCH_SIZE):
            found += _predict_batch(model, pictures[start : start + _BATCH_SIZE])
        return found
    return _predict_batch(model, [pictures])[0]


@torch.inference_mode()
def _predict_batch(model: Any, pictures: Sequence[Any]) -> list[Prediction]:
    device = next(model.parameters()).device
    images_BHWC = torch.stack([_read(picture, model.preprocessing) for picture in pictures])
    logits_BK = model(normalise(images_BHWC.to(device), None, model.mean, model.std))
    names = model.class_names
    predictions = []
    for probabilities in softmax(logits_BK.float().cpu().numpy()):
        order = np.argsort(-probabilities, kind="stable")
        ranked = {names[i]: float(probabilities[i]) for i in order}
        best = names[order[0]]
        predictions.append(Prediction(best, ranked[best], ranked))
    return predictions


def _read(picture: Any, preprocessing: Preprocessing) -> Tensor:
    if isinstance(picture, str | Path):
        return decode(Path(picture), preprocessing).image
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise DataError(
                f"got an array of {picture.dtype}, {picture.shape}; a picture is uint8, (H, W) or "
                "(H, W, 3)"
            )
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        kind = type(picture).__name__
        raise DataError(f"got {kind}; pass a path, a Pillow image, an array or a list of them")
    return pixels_of(picture, preprocessing)
