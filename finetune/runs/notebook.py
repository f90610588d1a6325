"""A run's result as a notebook shows it: its numbers, and the curve of its accuracies."""

import html
from collections.abc import Sequence

from finetune.runs.result import Row, RunResult

_WIDTH, _HEIGHT = 320, 90
_CURVES = {"train_acc": "#94a0b0", "val_acc": "#4393e6"}


def result_html(result: RunResult, rows: Sequence[Row]) -> str:
    """A table of what the run reached, and an SVG of its accuracies by epoch."""
    f1 = result.best_val_macro_f1
    facts = {
        "strategy": result.strategy,
        "best val_acc": f"{result.best_val_acc:.4f}",
        "macro F1": "–" if f1 is None else f"{f1:.4f}",
        "best epoch": f"{result.best_epoch} of 0 to {result.epochs_run - 1}",
        "run directory": str(result.run_dir),
    }
    cells = "".join(
        f"<tr><th style='text-align:left'>{name}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table>{cells}</table>{_curves(rows)}"


def _curves(rows: Sequence[Row]) -> str:
    lines = [_line([row[name] for row in rows], colour) for name, colour in _CURVES.items()]
    legend = ", ".join(f"<span style='color:{c}'>{name}</span>" for name, c in _CURVES.items())
    return (
        f"<svg width='{_WIDTH}' height='{_HEIGHT}' style='border:1px solid #94a0b0'>"
        f"{''.join(lines)}</svg><div>{legend}, 0 to 1, by epoch</div>"
    )


def _line(values: Sequence[float], colour: str) -> str:
    step = _WIDTH / max(len(values) - 1, 1)
    points = " ".join(f"{i * step:.1f},{_HEIGHT * (1 - v):.1f}" for i, v in enumerate(values))
    return f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='2'/>"
