"""The page's look at the winner: confusion, classes, and its most confident mistakes.

Turns the winner's predictions and pictures into a section with the pictures in it. Knows nothing
about the other runs.

    >>> winner_section(comparison, drawn)  # doctest: +SKIP
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from finetune.analysis.comparison import Comparison, percent
from finetune.analysis.report import figures
from finetune.analysis.report.markup import Cell, Drawn, esc, number, table
from finetune.data.layout import PICTURE_FORMATS
from finetune.runs.predictions import confident_mistakes
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir
from finetune.system.errors import RunDirError

NUM_MISTAKES = 12
_THUMBNAIL_PIXELS = 160


def winner_section(comparison: Comparison, drawn: Drawn) -> str:
    """The section, or nothing where the winner left no predictions."""
    winner = comparison.winner
    if winner is None or winner.result is None or winner.correct is None:
        return ""
    result = winner.result
    logits, labels, paths = RunDir(winner.run_dir).read_predictions()
    names = result.class_names
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (labels, logits.argmax(axis=1)), 1)
    parts = [
        f"<h2>The winner: {esc(winner.name)}</h2>",
        f'<p class="soft">Run <code>{esc(winner.run_dir)}</code>, its best epoch '
        f"({result.best_epoch}), over its {len(labels)} validation pictures: "
        f"{_settings(result)}.</p>",
        _tests(winner.run_dir),
        '<div class="columns"><div><h3>Confusion</h3>',
        drawn.place("confusion", figures.confusion(counts, names)),
        "</div><div><h3>Accuracy of each class</h3>",
        drawn.place("classes", figures.per_class(counts, names)),
        "</div></div>",
        _mistakes(logits, labels, paths, names),
    ]
    return f"<section>{''.join(parts)}</section>"


def _settings(result: RunResult) -> str:
    kept = ("strategy", "learning_rate", "batch_size", "data_aug", "epochs", "unfreeze_from", "lr_decay", "lr_schedule", "weight_decay", "label_smoothing", "image_size", "seed")  # noqa: E501  # fmt: skip
    values = {name: result.config.get(name) for name in kept}
    shown = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if v]
    return esc(", ".join(shown))


def _tests(run_dir: Path) -> str:
    """What `evaluate` recorded in the run directory, if anything."""
    try:
        records = RunDir(run_dir).read_evaluations()
    except RunDirError as error:
        return f'<div class="note warn"><p>{esc(error)}</p></div>'
    rows: list[list[str | Cell]] = [
        [
            esc(one["folder"]),
            number(one["accuracy"], percent(one["accuracy"])),
            number(one["num_pictures"]),
            esc(one["recorded_at"]),
        ]
        for one in records
    ]
    if not rows:
        return ""
    return "<h3>Evaluated on</h3>" + table(("folder", "accuracy", "pictures", "recorded"), rows)


def _mistakes(
    logits: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    paths: np.ndarray[Any, Any],
    names: list[str],
) -> str:
    num_wrong = int((logits.argmax(axis=1) != labels).sum())
    if not num_wrong:
        return '<h3>Mistakes</h3><p class="soft">None.</p>'
    mistakes = confident_mistakes(logits, labels, NUM_MISTAKES)
    shown = "".join(
        f"<figure>{_thumbnail(Path(str(paths[i])))}<figcaption>{esc(names[labels[i]])}, taken "
        f"for <b>{esc(names[guess])}</b> at {probability:.0%}</figcaption></figure>"
        for i, guess, probability in mistakes
    )
    return (
        f'<h3>Most confident mistakes</h3><p class="soft">{len(mistakes)} of {num_wrong}.</p>'
        f'<div class="mistakes">{shown}</div>'
    )


def _thumbnail(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path, formats=PICTURE_FORMATS) as image:
            image.draft("RGB", (_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
            small = image.convert("RGB")
        enlarge = max(small.size) < _THUMBNAIL_PIXELS
        if enlarge:
            scale = _THUMBNAIL_PIXELS / max(small.size)
            size = (max(1, round(small.width * scale)), max(1, round(small.height * scale)))
            small = small.resize(size, Image.Resampling.NEAREST)
        small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82)
    except Exception:  # decoders raise whatever they like; the page goes on without
        return f'<div class="lost" title="{esc(path)}">not here</div>'
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{esc(path.name)}" title="{esc(path)}">'
