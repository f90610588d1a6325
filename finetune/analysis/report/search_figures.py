"""The figures of the search: which values were tried, and which accuracies they reached."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune.analysis.by_strategy import by_group, by_setting, mean_accuracy, value_of
from finetune.analysis.conclusion import percent
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.report.traces import (
    PLAIN_MARGIN,
    Figure,
    axis,
    bars,
    colour_of,
    figure,
    log_axis,
    mark_of,
    scatter,
    text,
)
from finetune.config.field_tables import in_order, shown, title
from finetune.runs.settings import Group

_MAX_LEVELS = 8
"""The most values of a numeric field that are drawn at equal distances, not to scale."""
_NONE_HEIGHT = -0.07
"""Of runs whose strategy ignores the field."""
_TICK = {"bgcolor": "card", "borderpad": 1, "showarrow": False, "xanchor": "left", "xshift": 5}


def _is_continuous(name: str, values: Sequence[Any], finished: Sequence[RunRecord]) -> bool:
    """Whether a field has too many numbers for equal distances, or was drawn from a range: then
    hardly two settings have the same value."""
    if any(isinstance(value, str | bool) for value in values):
        return False
    settings = by_setting(run for run in finished if run.result is not None).values()
    used = [value_of(repeats[0], name) for repeats in settings]
    is_drawn = len(values) > 3 and len(used) < 1.5 * len({*used})
    return len(values) > _MAX_LEVELS or is_drawn


@dataclass(frozen=True)
class _Axis:
    """A vertical axis of the parallel coordinates, from 0 at the bottom to 1."""

    title: str
    height: Callable[[RunRecord], float]
    ticks: Sequence[tuple[float, str]]
    spread: float = 0.0
    """How far lines through the same value may be moved apart."""


def _field_axis(name: str, values: Sequence[Any], finished: Sequence[RunRecord]) -> _Axis:
    if is_continuous := _is_continuous(name, values, finished):
        scale, ticks = _scale(float(values[0]), float(values[-1]))
    else:
        top = max(len(values) - 1, 1)
        heights = {v: i / top if len(values) > 1 else 0.5 for i, v in enumerate(values)}
        scale, ticks = heights.__getitem__, [(h, shown(name, v)) for v, h in heights.items()]
    if any(value_of(run, name) is None for run in finished):
        ticks.insert(0, (_NONE_HEIGHT, "–"))

    def height(run: RunRecord) -> float:
        value = value_of(run, name)
        return _NONE_HEIGHT if value is None else scale(value)

    return _Axis(title(name), height, ticks, spread=0 if is_continuous else 0.05)


def _scale(low: float, high: float) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """The height of each number, and the ticks; logarithmic over a large range."""
    shares = (0, 0.25, 0.5, 0.75, 1)
    if low > 0 and high / low > 20:
        span = np.log(high / low)
        ticks = [(share, f"{low * np.exp(share * span):.2g}") for share in shares]
        return lambda value: float(np.log(value / low) / span), ticks
    span = (high - low) or 1
    return lambda value: (value - low) / span, [(s, f"{low + s * span:.3g}") for s in shares]


def _accuracy_axis(finished: Sequence[RunRecord]) -> _Axis:
    accuracies = [run.accuracy for run in finished]
    low, span = min(accuracies), max(accuracies) - min(accuracies)
    ticks = [(share, percent(low + share * span)) for share in ((0, 0.5, 1) if span else (0,))]
    return _Axis("accuracy", lambda run: (run.accuracy - low) / (span or 1), ticks)


def _axes(finished: Sequence[RunRecord], varied: Mapping[str, Sequence[Any]]) -> list[_Axis]:
    strategies = in_order("strategy", {run.strategy for run in finished})
    fields = {name: values for name, values in varied.items() if name == "model"}
    fields |= {"strategy": strategies} if len(strategies) > 1 else {}
    fields |= varied
    axes = [_field_axis(name, values, finished) for name, values in fields.items()]
    return [*axes, _accuracy_axis(finished)]


def parallel_coordinates(
    finished: Sequence[RunRecord],
    varied: Mapping[str, Sequence[Any]],
    pruned: Sequence[RunRecord] = (),
) -> Figure:
    """One line per run over its network and strategy, every varied field, and its accuracy.

    The lines of pruned runs are dotted.

    The lines are SVG: plotly's own parallel coordinates need WebGL, which not every browser has.
    """
    axes = _axes([*finished, *pruned], varied)
    rng = np.random.default_rng(0)
    traces = []
    explained: set[str] = set()
    for group, runs in [*by_group(finished).items(), *by_group(pruned).items()]:
        label = group.label
        ys: list[float | None] = []
        for run in runs:
            offset = rng.uniform(-1, 1)  # so that runs of one setting don't hide each other
            ys += [*(round(a.height(run) + a.spread * offset, 4) for a in axes), None]
        dash = "dot" if runs[0].result is None else "solid"
        line = {"color": colour_of(group), "width": 1.3, "dash": dash}
        opacity = 0.7 if len(finished) <= 200 else 0.3
        xs = [*range(len(axes)), None] * len(runs)
        shared = {"legendgroup": label, "showlegend": label not in explained}
        traces.append(scatter("lines", label, xs, ys, line=line, opacity=opacity, **shared))
        explained.add(label)
    return figure(
        traces,
        400,
        xaxis={
            "tickvals": list(range(len(axes))),
            "ticktext": [a.title.replace(" ", "<br>") for a in axes],
            "range": [-0.25, len(axes) - 0.7],
            "zeroline": False,
            "fixedrange": True,
        },
        yaxis={"visible": False, "range": [-0.12, 1.1], "fixedrange": True},
        showlegend=len({run.group.strategy for run in finished}) > 1,
        annotations=[
            {"x": x, "y": y, "text": f"<b>{text(label)}</b>", "font": {"size": 11}, **_TICK}
            for x, a in enumerate(axes)
            for y, label in a.ticks
        ],
    )


def marginal_means(finished: Sequence[RunRecord], name: str, values: Sequence[Any]) -> Figure:
    """Mean accuracy at each value of a field, one line per group; of networks, one per strategy.

    The mean is over settings: one that was repeated with more seeds has no more weight.
    """
    continuous = _is_continuous(name, values, finished)
    traces = []
    lines: dict[Group, list[RunRecord]] = defaultdict(list)
    for group, runs in by_group(finished).items():
        line = replace(group, setting="", setting_number=0)
        lines[replace(line, model="", model_number=0) if name == "model" else line] += runs
    for group, runs in lines.items():
        settings: dict[Any, list[Sequence[RunRecord]]] = defaultdict(list)
        for repeats in by_setting(runs).values():
            settings[value_of(repeats[0], name)].append(repeats)
        found = [value for value in values if value in settings]
        trace = scatter(
            "markers" if continuous else "lines+markers",
            str(group),
            [float(value) if continuous else shown(name, value) for value in found],
            [100 * float(np.mean([*map(mean_accuracy, settings[v])])) for v in found],
            hover="%{x}: %{y:.1f} %, mean of %{text}",
            text=[f"{len(settings[value])} settings" for value in found],
            line={"color": colour_of(group), "width": 2, "dash": mark_of(group).dash},
            marker={"size": 8, "symbol": mark_of(group).symbol},
        )
        traces += [trace] if found else []
    height = 270
    if continuous:
        xaxis = log_axis(title(name), values[0], values[-1])
    else:
        names = [shown(name, value) for value in values]
        if sum(map(len, names)) > 40:  # they are upright on a narrow screen
            height += 6 * max(map(len, names))
        order = {"categoryorder": "array", "categoryarray": names}
        xaxis = axis(title(name), type="category", **order)
    means = axis("mean accuracy, %")
    return figure(traces, height, xaxis=xaxis, yaxis=means, showlegend=False, margin=PLAIN_MARGIN)


def importance_bars(importances: Mapping[str, float]) -> Figure:
    """The share of each field in the variation of the accuracy."""
    names = list(importances)[::-1]
    shares = [importances[name] for name in names]
    trace = bars(shares, [*map(title, names)], "%{y}: %{x:.0%}")
    return figure(
        [trace],
        80 + 30 * len(names),
        xaxis=axis("importance", tickformat=".0%", range=[0, 1.01]),
        margin=PLAIN_MARGIN,
    )
