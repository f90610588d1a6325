"""The figures of the comparison and of the winner, as data for plotly.js.

The page adds the colours of its light or dark theme.
"""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.analysis.by_strategy import StrategySummary, by_strategy
from finetune.analysis.comparison import Comparison
from finetune.analysis.read_runs import RunRecord
from finetune.config.strategies import STRATEGIES

Figure = dict[str, Any]
Trace = dict[str, Any]

_PALETTE = ("#4393e6", "#e58637", "#35ad86", "#c26ccc", "#b59b2e", "#e0606b", "#7f8c9b")
_SIGNIFICANT, _GREY = "#35ad86", "#94a0b0"
PLAIN_MARGIN = {"l": 56, "r": 8, "t": 12, "b": 48}
"""The margin of a figure without a legend."""
_MAX_CURVES = 5
"""Seeds of a strategy whose learning curves are drawn."""


def colour_of(strategy: str) -> str:
    names = list(STRATEGIES)
    index = names.index(strategy) if strategy in names else len(names)
    return _PALETTE[index % len(_PALETTE)]


def text(value: object) -> str:
    """A label that plotly shows literally: it would interpret some tags and `%{}`."""
    return html.escape(str(value), quote=False).replace("%{", "%&#123;")


def figure(data: list[Trace], height: int, **layout: Any) -> Figure:
    return {"data": data, "layout": {"height": height, **layout}}


def axis(title: str, **options: Any) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 10}, "zeroline": False, **options}


def log_axis(title: str, low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis for values over a large range, else a linear one."""
    if not 0 < 20 * low < high:
        return axis(title)
    return axis(title, type="log", tickformat="~g", dtick=1 if high > 300 * low else "D2")


def scatter(mode: str, name: str, x: Sequence[Any], y: Sequence[Any], **options: Any) -> Trace:
    """Markers, lines or both; the text of `hover` is shown under the pointer."""
    hover = options.pop("hover", None)
    shown = {"hovertemplate": f"{hover}<extra></extra>"} if hover else {"hoverinfo": "skip"}
    return {"type": "scatter", "mode": mode, "name": text(name), "x": x, "y": y, **shown, **options}


def bars(x: Sequence[float], y: Sequence[str], hover: str, **options: Any) -> Trace:
    """Horizontal bars."""
    shown = {"hovertemplate": f"{hover}<extra></extra>", "marker": {"color": _PALETTE[0]}}
    return {"type": "bar", "orientation": "h", "x": x, "y": y, **shown, **options}


def difference_intervals(comparison: Comparison) -> Figure:
    """Each pair's difference in percentage points, with its interval."""
    pairs = list(reversed(comparison.differences))
    traces = []
    for significant, colour in ((True, _SIGNIFICANT), (False, _GREY)):
        shown = [pair for pair in pairs if pair.significant == significant]
        trace = scatter(
            "markers",
            "significant" if significant else "not significant",
            [100 * pair.estimate for pair in shown],
            [text(f"{pair.first} − {pair.second}") for pair in shown],
            hover="%{y}: %{x:.1f} points",
            marker={"color": colour, "size": 10},
            error_x={
                "type": "data",
                "array": [100 * (pair.high - pair.estimate) for pair in shown],
                "color": colour,
                "thickness": 2,
                "width": 5,
            },
        )
        traces += [trace] if shown else []
    order = [text(f"{pair.first} − {pair.second}") for pair in pairs]
    return figure(
        traces,
        130 + 34 * len(pairs),
        xaxis=axis("percentage points", zeroline=True, zerolinewidth=2),
        yaxis={"categoryorder": "array", "categoryarray": order},
        showlegend=True,
    )


def accuracy_against_time(finished: Sequence[RunRecord]) -> Figure:
    """Accuracy and training time of each run, and the frontier of the most accurate ones."""
    minutes = {id(run): run.finished_result.train_seconds / 60 for run in finished}
    traces = [
        scatter(
            "markers",
            strategy,
            [round(minutes[id(run)], 4) for run in runs],
            [100 * run.accuracy for run in runs],
            hover="%{text}<br>%{y:.1f} % in %{x:.2f} min",
            text=[text(run.name) for run in runs],
            marker={"color": colour_of(strategy), "size": 9, "opacity": 0.75},
        )
        for strategy, runs in by_strategy(finished).items()
    ]
    best: list[tuple[float, float]] = []
    for time, accuracy in sorted((minutes[id(run)], run.accuracy) for run in finished):
        if not best or accuracy > best[-1][1]:
            best.append((time, accuracy))
    line = scatter(
        "lines",
        "frontier",
        [time for time, _ in best],
        [100 * accuracy for _, accuracy in best],
        line={"shape": "hv", "color": _GREY, "width": 1.5, "dash": "dot"},
    )
    return figure(
        [line, *traces],
        400,
        xaxis=log_axis("training time, minutes", min(minutes.values()), max(minutes.values())),
        yaxis=axis("validation accuracy, %"),
    )


def learning_curves(comparison: Comparison) -> Figure:
    """Accuracy by epoch of each strategy's chosen runs, with a diamond at each unfreezing."""
    runs = [(s, run) for s in comparison.summaries for run in s.chosen[:_MAX_CURVES]]
    diamonds = [_diamonds(summary, run) for summary, run in runs if unfreezings(run)]
    num_epochs = max((len(summary.best.rows) for summary in comparison.summaries), default=0)
    return figure(
        [trace for summary, run in runs for trace in _curves(summary, run)] + diamonds,
        420,
        xaxis=axis("epoch", dtick=1 if num_epochs <= 20 else None),
        yaxis=axis("accuracy, %"),
    )


def _curves(summary: StrategySummary, run: RunRecord) -> list[Trace]:
    is_first = run is summary.chosen[0]
    colour = colour_of(summary.strategy)
    validation = scatter(
        "lines+markers",
        summary.strategy,
        *_epochs_and_percentages(run, "val_acc"),
        hover=f"{_label(run)}<br>%{{y:.1f}} % validation, epoch %{{x}}",
        legendgroup=summary.strategy,
        showlegend=is_first,
        line={"color": colour, "width": 2.5 if is_first else 1.2},
        opacity=1 if is_first else 0.6,
        marker={"size": 4},
    )
    training = scatter(
        "lines",
        "training",
        *_epochs_and_percentages(run, "train_acc"),
        hover=f"{_label(run)}<br>%{{y:.1f}} % training",
        legendgroup=summary.strategy,
        showlegend=False,
        line={"color": colour, "width": 1.2, "dash": "dot"},
    )
    return [validation, training] if is_first else [validation]


def _diamonds(summary: StrategySummary, run: RunRecord) -> Trace:
    starts = unfreezings(run)
    accuracies = dict(zip(*_epochs_and_percentages(run, "val_acc"), strict=True))
    return scatter(
        "markers",
        "unfreezing",
        list(starts),
        [accuracies.get(epoch) for epoch in starts],
        hover=f"{_label(run)}<br>%{{text}} starts to train in epoch %{{x}}",
        text=[" and ".join(parts) for parts in starts.values()],
        legendgroup=summary.strategy,
        showlegend=False,
        marker={
            "symbol": "diamond",
            "size": 11,
            "color": colour_of(summary.strategy),
            "line": {"width": 1, "color": "#ffffff"},
        },
    )


def _label(run: RunRecord) -> str:
    return f"{text(run.name)}, seed {run.config.get('seed')}"


def _epochs_and_percentages(run: RunRecord, metric: str) -> tuple[list[float], list[float]]:
    """The epochs that have the metric, and its values in percent."""
    rows = [row for row in run.rows if not np.isnan(row.get(metric, np.nan))]
    return [row["epoch"] for row in rows], [100 * row[metric] for row in rows]


def unfreezings(run: RunRecord) -> dict[int, list[str]]:
    """The parts that start to train after the first epoch, by epoch, as far as the run got."""
    found: dict[int, list[str]] = defaultdict(list)
    for part, epoch in run.start_epochs.items():
        if 0 < epoch < len(run.rows):
            found[epoch].append(part)
    return dict(sorted(found.items()))


def confusion(counts: np.ndarray[Any, Any], class_names: Sequence[str]) -> Figure:
    """Rows are true classes, columns predictions; the colour is the share of the row."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = _class_labels(class_names)
    heat = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": shares.round(4).tolist(),
        "text": counts.tolist(),
        "texttemplate": "%{text}" if len(names) <= 20 else "",
        "colorscale": [[0, "rgba(67,147,230,0.06)"], [1, "rgba(67,147,230,0.95)"]],
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "%{y} predicted as %{x}: %{text}<extra></extra>",
    }
    return figure(
        [heat],
        min(190 + 30 * len(names), 760),
        xaxis=axis("predicted", tickangle=-45, type="category", showgrid=False),
        yaxis=axis("true", autorange="reversed", type="category", showgrid=False),
        margin=PLAIN_MARGIN,
    )


def accuracy_per_class(counts: np.ndarray[Any, Any], class_names: Sequence[str]) -> Figure:
    """The accuracy on each class's pictures, the lowest at the bottom."""
    totals = counts.sum(axis=1)
    shares = np.diag(counts) / np.maximum(totals, 1)
    order = np.argsort(shares, kind="stable")
    names = _class_labels(class_names)
    trace = bars(
        [100 * float(shares[i]) for i in order],
        [names[i] for i in order],
        "%{y}: %{x:.1f} %",
        text=[f"{100 * shares[i]:.0f} % of {totals[i]}" for i in order],
        textposition="auto",
        marker={"color": "rgba(67,147,230,0.75)"},
    )
    return figure(
        [trace],
        min(130 + 30 * len(shares), 900),
        xaxis=axis("accuracy, %", range=[0, 100]),
        yaxis={"type": "category"},
        margin=PLAIN_MARGIN,
    )


def _class_labels(names: Sequence[str]) -> list[str]:
    """Long names are shortened in the middle, and numbered if they would then be equal."""
    short = [name if len(name) <= 28 else f"{name[:14]}…{name[-13:]}" for name in names]
    repeated = {name for name, count in Counter(short).items() if count > 1}
    return [text(f"{i} {name}" if name in repeated else name) for i, name in enumerate(short)]
