"""The page's section on the best run: confusion, classes, and its most confident mistakes."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from finetune.analysis.conclusion import percent
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.report import figures
from finetune.analysis.report.markup import Column, code, esc, place, table, warning
from finetune.config.field_tables import fields_with_role, shown, title
from finetune.data import formats
from finetune.runs.predictions import (
    MAX_MATRIX_CLASSES,
    MAX_PAIRS,
    Array,
    class_accuracies,
    confident_mistakes,
    confusion_counts,
    mean_over_classes,
    most_confused_pairs,
)
from finetune.runs.run_dir import RunDir
from finetune.system.errors import RunDirError

NUM_MISTAKES = 12
_THUMBNAIL_PIXELS = 160


def winner_section(winner: RunRecord, varied: Sequence[str]) -> str:
    result = winner.finished_result
    logits, labels, paths = RunDir(winner.run_dir).read_predictions()
    num_classes = logits.shape[1]
    names = result.class_names
    if len(names) != num_classes:
        names = [str(i) for i in range(num_classes)]
    counts = confusion_counts(labels, logits.argmax(axis=1), num_classes)
    parts = [
        f"<h2>The winner: {esc(winner.name)}</h2>",
        f'<p class="soft">Run {code(winner.run_dir)} at its best epoch ({result.best_epoch}), on '
        f"its {len(labels)} validation pictures. {esc(_settings(winner, varied))}</p>",
        f"<details><summary>All its fields</summary><p>{esc(_settings(winner))}</p></details>",
        _evaluations(RunDir(winner.run_dir)),
        f'<div class="columns"><div>{_confusion(counts, names)}</div>',
        f"<div>{_accuracy_per_class(counts, names)}</div></div>",
        _mistakes(logits, labels, paths, names),
    ]
    return f"<section>{''.join(parts)}</section>"


def _settings(
    winner: RunRecord, names: Sequence[str] = (*fields_with_role("searched"), "seed")
) -> str:
    """The values of these fields as a sentence; nothing without any."""
    values = {name: winner.config.get(name) for name in names}
    said = [f"{title(k)} {shown(k, v)}" for k, v in values.items() if v is not None]
    return f"{', '.join(said)}." if said else ""


def _evaluations(run_dir: RunDir) -> str:
    try:
        records = run_dir.read_evaluations()
    except RunDirError as error:
        return warning(error)
    columns = [
        Column("folder", lambda record: record["folder"]),
        Column("accuracy", lambda record: record["accuracy"], percent),
        Column("macro F1", lambda record: record["macro_f1"], percent),
        Column("pictures", lambda record: record["num_pictures"]),
        Column("recorded", lambda record: record["recorded_at"]),
    ]
    return "<h3>Evaluations</h3>" + table(columns, records) if records else ""


def _confusion(counts: Array, names: Sequence[str]) -> str:
    if len(names) <= MAX_MATRIX_CLASSES:
        return "<h3>Confusion</h3>" + place("confusion", figures.confusion(counts, names))
    pairs = most_confused_pairs(counts)
    shown = pairs[:MAX_PAIRS]
    columns = [
        Column("label", lambda pair: names[pair[0]], esc),
        Column("prediction", lambda pair: names[pair[1]], esc),
        Column("count", lambda pair: pair[2]),
    ]
    about = f"The {len(shown)} most frequent of {len(pairs)} pairs of label and prediction."
    about += f" Up to {MAX_MATRIX_CLASSES} classes are shown as a matrix."
    head = f'<h3>Most confused classes</h3><p class="soft">{about}</p>'
    return head + table(columns, shown, tall=True)


def _accuracy_per_class(counts: Array, names: Sequence[str]) -> str:
    accuracies = class_accuracies(counts)
    mean, what = mean_over_classes(accuracies)
    head = "<h3>Accuracy per class</h3>"
    if mean is not None:
        head += f'<p class="soft">{percent(mean)}, {what}.</p>'
    if len(names) <= MAX_MATRIX_CLASSES:
        return head + place("classes", figures.accuracy_per_class(counts, names))
    rows = list(zip(names, accuracies, counts.sum(axis=1).tolist(), strict=True))
    rows.sort(key=lambda row: 2.0 if row[1] is None else row[1])
    columns = [
        Column("class", lambda row: row[0], esc),
        Column("accuracy", lambda row: row[1], percent),
        Column("pictures", lambda row: row[2]),
    ]
    return head + table(columns, rows, tall=True)


def _mistakes(logits: Array, labels: Array, paths: Array, names: Sequence[str]) -> str:
    mistakes = confident_mistakes(logits, labels, NUM_MISTAKES)
    if not mistakes:
        return '<h3>Mistakes</h3><p class="soft">None.</p>'
    num_wrong = int((logits.argmax(axis=1) != labels).sum())
    shown = "".join(
        f"<figure>{_thumbnail(Path(str(paths[i])))}<figcaption>{esc(names[labels[i]])}, "
        f"predicted as <b>{esc(names[guess])}</b> with {probability:.0%}</figcaption></figure>"
        for i, guess, probability in mistakes
    )
    return (
        f'<h3>Most confident mistakes</h3><p class="soft">{len(mistakes)} of {num_wrong}.</p>'
        f'<div class="mistakes">{shown}</div>'
    )


def _thumbnail(path: Path) -> str:
    from PIL import Image, ImageOps

    size = (_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS)
    try:
        small = formats.shown(path, _THUMBNAIL_PIXELS)
        if max(small.size) < _THUMBNAIL_PIXELS:
            small = ImageOps.contain(small, size, Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82)
    except Exception:  # decoders raise errors of any type
        return f'<div class="missing" title="{esc(path)}">not found</div>'
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{esc(path.name)}" title="{esc(path)}">'
