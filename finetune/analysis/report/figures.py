"""The figures of the comparison and of the winner, as data for plotly.js.

The page adds the colours of its light or dark theme.
"""

import html
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.analysis.by_strategy import StrategySummary, by_strategy
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.statistics import Difference
from finetune.config.strategies import STRATEGIES
from finetune.runs.predictions import class_accuracies

Figure = dict[str, Any]
Trace = dict[str, Any]

_PALETTE = ("#4393e6", "#e58637", "#35ad86", "#c26ccc", "#b59b2e", "#e0606b", "#7f8c9b")
_GREY = "#94a0b0"
PLAIN_MARGIN = {"l": 56, "r": 8, "t": 12, "b": 48}
"""The margin of a figure without a legend."""
_MAX_CURVES = 5
"""Seeds of a strategy whose learning curves are drawn."""


def colour_of(strategy: str) -> str:
    index = [*STRATEGIES, strategy].index(strategy)
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


def bars(x: Sequence[float | None], y: Sequence[str], hover: str, **options: Any) -> Trace:
    """Horizontal bars."""
    shown = {"hovertemplate": f"{hover}<extra></extra>", "marker": {"color": _PALETTE[0]}}
    return {"type": "bar", "orientation": "h", "x": x, "y": y, **shown, **options}


def difference_intervals(differences: Sequence[Difference]) -> Figure:
    """Each pair's difference in percentage points, with its interval."""
    pairs = {text(f"{d.first} − {d.second}"): d for d in reversed(differences)}
    traces = []
    for name, colour in (("significant", "#35ad86"), ("not significant", _GREY)):
        shown = {k: d for k, d in pairs.items() if d.significant == (name == "significant")}
        lengths = [100 * (d.high - d.estimate) for d in shown.values()]
        trace = scatter(
            "markers",
            name,
            [100 * d.estimate for d in shown.values()],
            list(shown),
            hover="%{y}: %{x:.1f} points",
            marker={"color": colour, "size": 10},
            error_x={"type": "data", "array": lengths, "color": colour, "thickness": 2, "width": 5},
        )
        traces += [trace] if shown else []
    return figure(
        traces,
        130 + 34 * len(pairs),
        xaxis=axis("percentage points", zeroline=True, zerolinewidth=2),
        yaxis={"categoryorder": "array", "categoryarray": list(pairs)},
        showlegend=True,
    )


def accuracy_against_time(finished: Sequence[RunRecord]) -> Figure:
    """Accuracy and training time of each run, and the frontier of the most accurate ones."""
    minutes = {run: run.finished_result.train_seconds / 60 for run in finished}
    best: list[tuple[float, float]] = []
    for time, accuracy in sorted((minutes[run], run.accuracy) for run in finished):
        if not best or accuracy > best[-1][1]:
            best.append((time, accuracy))
    frontier = scatter(
        "lines",
        "frontier",
        [time for time, _ in best],
        [100 * accuracy for _, accuracy in best],
        line={"shape": "hv", "color": _GREY, "width": 1.5, "dash": "dot"},
    )
    points = [
        scatter(
            "markers",
            strategy,
            [round(minutes[run], 4) for run in runs],
            [100 * run.accuracy for run in runs],
            hover="%{text}<br>%{y:.1f} % in %{x:.2f} min",
            text=[text(run.name) for run in runs],
            marker={"color": colour_of(strategy), "size": 9, "opacity": 0.75},
        )
        for strategy, runs in by_strategy(finished).items()
    ]
    return figure(
        [frontier, *points],
        400,
        xaxis=log_axis("training time, minutes", min(minutes.values()), max(minutes.values())),
        yaxis=axis("validation accuracy, %"),
    )


def learning_curves(summaries: Sequence[StrategySummary]) -> Figure:
    """Accuracy by epoch of each strategy's chosen runs, with a diamond at each unfreezing."""
    traces, diamonds = [], []
    for summary in summaries:
        for i, run in enumerate(summary.chosen[:_MAX_CURVES]):
            traces += _curves(run, is_first=i == 0)
            diamonds += [_diamonds(run)] if unfreezings(run) else []
    num_epochs = max((len(summary.best.rows) for summary in summaries), default=0)
    return figure(
        traces + diamonds,
        420,
        xaxis=axis("epoch", dtick=1 if num_epochs <= 20 else None),
        yaxis=axis("accuracy, %"),
    )


def _curve(run: RunRecord, mode: str, name: str, metric: str, hover: str, **options: Any) -> Trace:
    """A metric by epoch, in percent."""
    values = run.metric(metric)
    return scatter(
        mode,
        name,
        list(values),
        [100 * value for value in values.values()],
        hover=f"{text(run.name)}, seed {run.config.get('seed')}<br>{hover}",
        **{"legendgroup": run.strategy, "showlegend": False} | options,
    )


def _curves(run: RunRecord, is_first: bool) -> list[Trace]:
    colour = colour_of(run.strategy)
    validation = _curve(
        run,
        "lines+markers",
        run.strategy,
        "val_acc",
        "%{y:.1f} % validation, epoch %{x}",
        showlegend=is_first,
        line={"color": colour, "width": 2.5 if is_first else 1.2},
        opacity=1 if is_first else 0.6,
        marker={"size": 4},
    )
    line = {"color": colour, "width": 1.2, "dash": "dot"}
    hover = "%{y:.1f} % training"
    training = _curve(run, "lines", "training", "train_acc", hover, line=line)
    return [validation, training] if is_first else [validation]


def _diamonds(run: RunRecord) -> Trace:
    starts, accuracies = unfreezings(run), run.metric("val_acc")
    hover = "%{text} starts to train in epoch %{x}"
    return _curve(run, "markers", "unfreezing", "val_acc", hover) | {
        "x": list(starts),
        "y": [100 * accuracies[epoch] if epoch in accuracies else None for epoch in starts],
        "text": [" and ".join(parts) for parts in starts.values()],
        "marker": {
            "symbol": "diamond",
            "size": 11,
            "color": colour_of(run.strategy),
            "line": {"width": 1, "color": "#ffffff"},
        },
    }


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
    """The accuracy on each class's pictures, the lowest at the bottom.

    Below it are the classes without pictures, which have no bar.
    """
    totals, labels = counts.sum(axis=1), _class_labels(class_names)
    percents = [None if one is None else 100 * one for one in class_accuracies(counts)]
    order = sorted(range(len(labels)), key=lambda i: -1 if (p := percents[i]) is None else p)
    names = [labels[i] if totals[i] else f"{labels[i]} (no pictures)" for i in order]
    trace = bars(
        [percents[i] for i in order],
        names,
        "%{y}: %{x:.1f} %",
        text=["" if (p := percents[i]) is None else f"{p:.0f} % of {totals[i]}" for i in order],
        textposition="auto",
        marker={"color": "rgba(67,147,230,0.75)"},
    )
    return figure(
        [trace],
        min(130 + 30 * len(labels), 900),
        xaxis=axis("accuracy, %", range=[0, 100]),
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": names},
        margin=PLAIN_MARGIN,
    )


def _class_labels(names: Sequence[str]) -> list[str]:
    """Long names are shortened in the middle, and numbered if they would then be equal."""
    short = [name if len(name) <= 28 else f"{name[:14]}…{name[-13:]}" for name in names]
    repeated = {name for name, count in Counter(short).items() if count > 1}
    return [text(f"{i} {name}" if name in repeated else name) for i, name in enumerate(short)]
