"""The figures of the search: which settings were tried, and what each value came to.

Turns outcomes into figures as `finetune.analysis.report.figures` does. Knows nothing about HTML.

    >>> parallel_coordinates(finished)["layout"]["height"]  # doctest: +SKIP
    400
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from finetune.analysis.by_strategy import accuracy_of, by_setting, mean_accuracy
from finetune.analysis.comparison import percent
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.report.figures import (
    PLAIN_MARGIN,
    Figure,
    axis,
    by_strategy,
    colour_of,
    figure,
    log_axis,
    text,
)

PARAMETERS = ("learning_rate", "batch_size", "data_aug")
_AUGMENTATIONS = {"n": "none", "y": "flip", "strong": "strong"}
_MOST_LEVELS = 8
"""Values of a parameter that are set apart evenly; more numbers stand where they are on a scale."""


def varying(outcomes: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The searched parameters with more than one value, and their values in order."""
    found = {}
    for name in PARAMETERS:
        values = {one.config.get(name) for one in outcomes} - {None}
        if len(values) > 1:
            found[name] = sorted(values, key=_rank)
    return found


def _rank(value: Any) -> tuple[bool, Any]:
    if value in _AUGMENTATIONS:
        return True, str(list(_AUGMENTATIONS).index(value))
    return isinstance(value, str), value


def _level(name: str, value: Any) -> str:
    words = _AUGMENTATIONS if name == "data_aug" else {}
    return words.get(value, f"{value:g}" if isinstance(value, int | float) else str(value))


def _is_continuous(values: Sequence[Any]) -> bool:
    return len(values) > _MOST_LEVELS and not any(isinstance(value, str) for value in values)


Ticks = list[tuple[float, str]]


def _scale(name: str, values: Sequence[Any]) -> tuple[Callable[[Any], float], Ticks]:
    """Where each value stands between 0 and 1, and what is written there."""
    if not _is_continuous(values):
        heights = {
            v: 0.5 if len(values) == 1 else i / (len(values) - 1) for i, v in enumerate(values)
        }
        return heights.__getitem__, [(y, _level(name, v)) for v, y in heights.items()]
    low, high = float(values[0]), float(values[-1])
    if low > 0 and high / low > 20:
        span = np.log(high / low)
        ticks = [(share, f"{low * np.exp(share * span):.2g}") for share in (0, 0.25, 0.5, 0.75, 1)]
        return lambda value: float(np.log(value / low) / span), ticks
    ticks = [(share, f"{low + share * (high - low):.3g}") for share in (0, 0.25, 0.5, 0.75, 1)]
    return lambda value: (value - low) / (high - low), ticks


_TITLES = {
    "strategy": "strategy",
    "learning_rate": "learning rate",
    "batch_size": "batch size",
    "data_aug": "augmentation",
}


def parallel_coordinates(finished: Sequence[RunRecord]) -> Figure:
    """A line a run over strategy, learning rate, batch size, augmentation and accuracy.

    Lines of plain SVG: plotly's own kind needs WebGL, which not every browser gives a page.
    """
    tried: dict[str, list[Any]] = {"strategy": list(by_strategy(finished))}
    for name in PARAMETERS:
        tried[name] = sorted({one.config.get(name) for one in finished}, key=_rank)
    scales = {name: _scale(name, values) for name, values in tried.items()}
    accuracies = [accuracy_of(one) for one in finished]
    low, high = min(accuracies), max(accuracies)
    wobble = np.random.default_rng(0)
    traces = []
    for strategy, runs in by_strategy(finished).items():
        xs: list[float | None] = []
        ys: list[float | None] = []
        for run in runs:
            apart = 0.05 * wobble.uniform(-1, 1)  # so that runs of one setting can be told apart
            for place, (name, (height, _)) in enumerate(scales.items()):
                value = run.strategy if name == "strategy" else run.config.get(name)
                xs.append(place)
                ys.append(round(height(value) + apart * (not _is_continuous(tried[name])), 4))
            xs += [len(scales), None]
            ys += [round((accuracy_of(run) - low) / ((high - low) or 1), 4), None]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": text(strategy),
                "line": {"color": colour_of(strategy), "width": 1.3},
                "opacity": 0.7 if len(finished) <= 200 else 0.3,
                "x": xs,
                "y": ys,
                "hoverinfo": "skip",
            }
        )
    notes = [
        _tick(place, height, label)
        for place, (_, ticks) in enumerate(scales.values())
        for height, label in ticks
    ]
    notes += [
        _tick(len(scales), share, percent(low + share * (high - low)))
        for share in ((0, 0.5, 1) if high > low else (0,))
    ]
    return figure(
        traces,
        400,
        xaxis={
            "tickvals": list(range(len(scales) + 1)),
            "ticktext": [*(_TITLES[name] for name in scales), "accuracy"],
            "range": [-0.25, len(scales) + 0.3],
            "zeroline": False,
            "fixedrange": True,
        },
        yaxis={"visible": False, "range": [-0.1, 1.1], "fixedrange": True},
        annotations=notes,
    )


def _tick(x: float, y: float, label: str) -> dict[str, Any]:
    return {
        "x": x,
        "y": y,
        "text": f"<b>{text(label)}</b>",
        "bgcolor": "card",
        "borderpad": 1,
        "showarrow": False,
        "xanchor": "left",
        "xshift": 5,
        "font": {"size": 11},
    }


def marginal_means(finished: Sequence[RunRecord], name: str, values: Sequence[Any]) -> Figure:
    """Mean accuracy at each value of one parameter, a line a strategy.

    The mean is over settings: one that was repeated with more seeds weighs no more.
    """
    traces: list[dict[str, Any]] = []
    for strategy, runs in by_strategy(finished).items():
        groups: dict[Any, list[Sequence[RunRecord]]] = defaultdict(list)
        for seeds in by_setting(runs):
            groups[seeds[0].config.get(name)].append(seeds)
        shown = [value for value in values if value in groups]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": text(strategy),
                "line": {"color": colour_of(strategy), "width": 2},
                "marker": {"size": 8},
                "x": [_level(name, value) for value in shown],
                "y": [100 * float(np.mean([*map(mean_accuracy, groups[v])])) for v in shown],
                "text": [f"{len(groups[value])} settings" for value in shown],
                "hovertemplate": "%{x}: %{y:.1f} %, mean of %{text}<extra></extra>",
            }
        )
    if _is_continuous(values):  # no two runs share a value
        for trace in traces:
            trace["mode"], trace["x"] = "markers", [float(value) for value in trace["x"]]
        xaxis = log_axis(_TITLES[name], values[0], values[-1])
    else:
        names = [_level(name, value) for value in values]
        order = {"categoryorder": "array", "categoryarray": names}
        xaxis = axis(_TITLES[name], type="category", **order)
    return figure(
        traces,
        270,
        xaxis=xaxis,
        yaxis=axis("mean accuracy, %"),
        showlegend=False,
        margin=PLAIN_MARGIN,
    )


def importances(shares: Mapping[str, float]) -> Figure:
    """How much of the accuracy's variation each parameter explains."""
    names = list(shares)[::-1]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [shares[name] for name in names],
        "y": [_TITLES.get(name, name) for name in names],
        "marker": {"color": "#4393e6"},
        "hovertemplate": "%{y}: %{x:.0%}<extra></extra>",
    }
    return figure(
        [bars],
        80 + 30 * len(names),
        xaxis=axis("importance", tickformat=".0%", range=[0, 1.01]),
        margin=PLAIN_MARGIN,
    )
