"""The figure of all groups' accuracies, with which the page begins."""

import numpy as np

from finetune.analysis.comparison import Comparison
from finetune.analysis.intervals import accuracy_interval
from finetune.analysis.report.traces import (
    PLAIN_MARGIN,
    Figure,
    axis,
    colour_of,
    figure,
    mark_of,
    scatter,
    text,
)

_BELOW = 0.3
"""How far the runs' dots are below the mean."""


def group_accuracies(comparison: Comparison) -> Figure:
    """Each group's accuracy with its interval, and a dot for each run; the best at the top."""
    traces, ordered = [], [*reversed(comparison.summaries)]
    for row, summary in enumerate(ordered):
        colour, compared = colour_of(summary.group), {*comparison.compared}
        runs = summary.chosen
        if not comparison.about_strategies:
            runs = tuple(run for run in summary.runs if run in compared)
        low, high = accuracy_interval(np.stack([run.correct for run in summary.chosen]))
        mean = 100 * summary.accuracy
        ends = {"symmetric": False, "array": [100 * high - mean], "arrayminus": [mean - 100 * low]}
        hover = f"%{{x:.1f}} % ({100 * low:.1f} to {100 * high:.1f})"
        large = {"color": colour, "size": 13, "symbol": mark_of(summary.group).symbol}
        bar = {"type": "data", **ends, "color": colour, "thickness": 2, "width": 6}
        traces += [
            scatter("markers", "", [mean], [row], hover=hover, marker=large, error_x=bar),
            scatter(
                "markers",
                "",
                [100 * run.accuracy for run in runs],
                [row - _BELOW] * len(runs),
                hover="%{text}: %{x:.1f} %",
                text=[f"{text(run.name)}, seed {run.config.get('seed')}" for run in runs],
                marker={"color": colour, "size": 7, "opacity": 0.6},
            ),
        ]
    names = [text(str(summary.group)) for summary in ordered]
    return figure(
        traces,
        90 + 38 * len(names),
        xaxis=axis("validation accuracy, %"),
        yaxis={
            "tickvals": [*range(len(names))],
            "ticktext": names,
            "zeroline": False,
            "range": [-0.7, len(names) - 0.5],
        },
        showlegend=False,
        margin=PLAIN_MARGIN,
    )
