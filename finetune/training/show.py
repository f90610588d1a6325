"""Training pictures as the network sees them: `python -m finetune show [--FIELD VALUE ...]`.

Legend: B batch, C channels, H height, W width.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from finetune.config.fields import RunConfig
from finetune.data.seeding import step_generator
from finetune.features.loader import EpochLoader
from finetune.features.split_inputs import network_input
from finetune.runs.resolve import resolve, with_file
from finetune.system.errors import ConfigError, FinetuneError
from finetune.system.progress import bar
from finetune.system.shutdown import stoppable
from finetune.training.module import Mix
from finetune.training.train import log

_LABEL_PIXELS, _GAP_PIXELS = 14, 6


class Shown(NamedTuple):
    """A picture as the network sees it, and its label."""

    picture: np.ndarray[Any, np.dtype[np.uint8]]
    """(H, W, 3)."""
    label: str


def show(fields: Mapping[str, Any], file: Path = Path("show.png"), num_pictures: int = 32) -> int:
    """Write a grid of the first training pictures of a run with these fields; the exit code.

    Raises `FinetuneError`.
    """
    given = with_file(fields)
    if "resume" in given:
        raise ConfigError("resume: show takes fields; pass --config RUN_DIR/config.yaml instead")
    with stoppable():
        config = RunConfig.from_fields(given)
        shown, line = training_pictures(config, num_pictures)
    try:
        grid(shown).save(file)
    except (OSError, ValueError) as error:
        raise FinetuneError(f"file: {file} can't be written: {error}") from None
    print(f"{line}\n{file}: the first {len(shown)} training pictures of epoch 0, augmented")
    return 0


def training_pictures(config: RunConfig, num_pictures: int) -> tuple[list[Shown], str]:
    """The first pictures of epoch 0 in the order of training, and a line on the batches' values.

    Their normalisation is undone, so that values beyond black and white are cut off.
    """
    config, splits, cache = resolve(config, log, bar)
    for note in splits.notes:
        log(note)
    loader = EpochLoader(config, splits, cache, log)
    backbone, names = config.backbone, splits.class_names
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    shown: list[Shown] = []
    seen: list[Tensor] = []
    for step, batch in enumerate(loader.train_epoch(0)):
        changed = batch.augmentation
        pixels = batch.inputs if changed is None else changed.apply(batch.inputs)
        x_BCHW = network_input(pixels, batch.flips, backbone)
        labels = [names[i] for i in batch.labels]
        if config.mixup:
            rng = step_generator(config.seed, 0, step)
            mix = Mix.drawn(rng, config.mixup, len(labels))
            x_BCHW, labels = mix.of(x_BCHW), _mixed_labels(labels, mix)
        seen.append(x_BCHW)
        rgb_BHWC = ((x_BCHW * std + mean) * 255).round().clamp(0, 255).permute(0, 2, 3, 1)
        pictures = rgb_BHWC.to(torch.uint8).numpy()
        shown += [Shown(*pair) for pair in zip(pictures, labels, strict=True)]
        if len(shown) >= num_pictures:
            break
    values = torch.cat(seen)
    shape = " x ".join(map(str, seen[0].shape))
    return shown[:num_pictures], (
        f"{config.name}: batches of {shape}, values {values.min():.2f} to {values.max():.2f}, mean "
        f"{values.mean():.2f}, standard deviation {values.std():.2f}"
    )


def _mixed_labels(labels: Sequence[str], mix: Mix) -> list[str]:
    partners = [labels[i] for i in mix.order]
    return [f"{mix.share:.0%} {a}, {b}" for a, b in zip(labels, partners, strict=True)]


def grid(shown: Sequence[Shown]) -> Image.Image:
    """The pictures in rows, each with its label above it."""
    size = len(shown[0].picture)
    num_columns = min(len(shown), max(1, math.ceil(math.sqrt(1.6 * len(shown)))))
    width, height = size + _GAP_PIXELS, size + _LABEL_PIXELS + _GAP_PIXELS
    num_rows = math.ceil(len(shown) / num_columns)
    made = Image.new("RGB", (num_columns * width + _GAP_PIXELS, num_rows * height), "white")
    draw = ImageDraw.Draw(made)
    for i, (picture, label) in enumerate(shown):
        left, top = _GAP_PIXELS + i % num_columns * width, i // num_columns * height
        draw.text((left, top + 1), _fitting(label, size), fill="black")
        made.paste(Image.fromarray(picture), (left, top + _LABEL_PIXELS))
    return made


def _fitting(label: str, pixels: int) -> str:
    """The beginning of a label that fits; Pillow's own font has few characters beyond Latin-1."""
    plain = label.encode("latin-1", "replace").decode("latin-1")
    return plain[: max(4, pixels // 6)]
