"""A run's predictions as W&B's charts and tables: confusion, accuracy per class, mistakes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.data.formats import shown
from finetune.runs.predictions import (
    MAX_MATRIX_CLASSES,
    MAX_PAIRS,
    Array,
    class_accuracies,
    confident_mistakes,
    confusion_counts,
    most_confused_pairs,
)
from finetune.system.text import one_line

NUM_MISTAKES = 50


def result_tables(
    logits: Array, labels: Array, paths: Array, names: Sequence[str], log: Callable[[str], None]
) -> dict[str, Any]:
    """What `run.log` gets of the best epoch, by key. A class without pictures has no accuracy."""
    import wandb

    counts = confusion_counts(labels, logits.argmax(axis=1), len(names))
    # W&B's client keeps 200,000 rows of a table in its artifact: enough for all classes.
    per_class = zip(names, class_accuracies(counts), counts.sum(axis=1).tolist(), strict=True)
    mistakes = [
        [_picture(str(paths[i])), one_line(paths[i]), names[labels[i]], names[guess], share]
        for i, guess, share in confident_mistakes(logits, labels, NUM_MISTAKES)
    ]
    return {
        **_confusion(counts, logits, labels, names, log),
        "per_class_accuracy": wandb.Table(
            columns=["class", "accuracy", "pictures"], data=[list(row) for row in per_class]
        ),
        "confident_mistakes": wandb.Table(
            columns=["picture", "path", "truth", "predicted", "probability"], data=mistakes
        ),
    }


def _confusion(
    counts: Array,
    logits: Array,
    labels: Array,
    names: Sequence[str],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """The confusion matrix as a chart, or the most confused pairs of more classes than it draws."""
    import wandb

    if len(names) <= MAX_MATRIX_CLASSES:
        chart = wandb.plot.confusion_matrix(
            y_true=labels.tolist(), preds=logits.argmax(axis=1).tolist(), class_names=list(names)
        )
        return {"confusion_matrix": chart}
    pairs = most_confused_pairs(counts)
    rows = [[names[label], names[guess], count] for label, guess, count in pairs[:MAX_PAIRS]]
    log(
        f"W&B: no confusion matrix of {len(names)} classes (at most {MAX_MATRIX_CLASSES}); "
        f"the table most_confused_pairs has the {len(rows)} most frequent of {len(pairs)} pairs"
    )
    table = wandb.Table(columns=["label", "prediction", "count"], data=rows)
    return {"most_confused_pairs": table}


def _picture(path: str) -> Any:
    """A picture for W&B; a copy if its file name has characters that W&B can't store."""
    import wandb

    if path.isprintable():
        return wandb.Image(path)
    return wandb.Image(shown(Path(path)))
