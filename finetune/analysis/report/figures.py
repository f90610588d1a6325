"""The figures of the comparison and of the winner, as data for plotly.js."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.analysis.by_strategy import StrategySummary, by_group
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.report.traces import (
    GREY,
    PLAIN_MARGIN,
    Figure,
    Trace,
    axis,
    bars,
    colour_of,
    figure,
    log_axis,
    mark_of,
    scatter,
    text,
)
from finetune.analysis.statistics import Difference
from finetune.runs.predictions import class_accuracies

_MAX_LEGEND = 7
"""The most groups in a legend; the page's first figure has the colours too."""
_MAX_CURVES = 5
"""Seeds of a group whose learning curves are drawn."""
_PANEL_NAME = {
    **{"xref": "paper", "xanchor": "left", "yref": "paper", "yanchor": "bottom"},
    "showarrow": False,
}


def difference_intervals(differences: Sequence[Difference], long_names: bool = False) -> Figure:
    """Each pair's difference in percentage points, with its interval."""
    minus = " −<br>" if long_names else " − "
    pairs = {f"{text(d.first)}{minus}{text(d.second)}": d for d in reversed(differences)}
    traces = []
    for name, colour in (("significant", "#35ad86"), ("not significant", GREY)):
        shown = {k: d for k, d in pairs.items() if d.significant == (name == "significant")}
        above = [100 * (d.high - d.estimate) for d in shown.values()]
        below = [100 * (d.estimate - d.low) for d in shown.values()]
        ends = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        trace = scatter(
            "markers",
            name,
            [100 * d.estimate for d in shown.values()],
            list(shown),
            hover="%{y}: %{x:.1f} points",
            marker={"color": colour, "size": 10},
            error_x=ends | {"color": colour, "thickness": 2, "width": 5},
        )
        traces += [trace] if shown else []
    return figure(
        traces,
        130 + (46 if long_names else 34) * len(pairs),
        xaxis=axis("percentage points", zeroline=True, zerolinewidth=2),
        yaxis={"categoryorder": "array", "categoryarray": list(pairs)},
        showlegend=True,
    )


def train_seconds(run: RunRecord, pictures_per_epoch: int) -> float:
    """The training time of a run; of a pruned one that of its epochs."""
    if run.result is not None:
        return run.result.train_seconds
    return sum(pictures_per_epoch / row["images_per_second"] for row in run.rows)


def accuracy_against_time(
    finished: Sequence[RunRecord], pruned: Sequence[RunRecord] = ()
) -> Figure:
    """Accuracy and training time of each run, and the frontier of the most accurate ones.

    Pruned runs have open symbols.
    """
    result = finished[0].finished_result
    pictures = result.num_train + result.num_val
    times = {run: train_seconds(run, pictures) for run in (*finished, *pruned)}
    unit, divisor = ("seconds", 1) if max(times.values()) < 180 else ("minutes", 60)
    times = {run: seconds / divisor for run, seconds in times.items()}
    best: list[tuple[float, float]] = []
    for time, accuracy in sorted((times[run], run.accuracy) for run in finished):
        if not best or accuracy > best[-1][1]:
            best.append((time, accuracy))
    frontier = scatter(
        "lines",
        "frontier",
        [time for time, _ in best],
        [100 * accuracy for _, accuracy in best],
        line={"shape": "hv", "color": GREY, "width": 1.5, "dash": "dot"},
    )
    points = []
    explained: set[str] = set()
    every = [*by_group(finished).items(), *by_group(pruned).items()]
    for group, runs in every:
        colour, symbol = colour_of(group), mark_of(group).symbol
        symbol += "-open" * (runs[0].result is None)
        points.append(
            scatter(
                "markers",
                group.label,
                [round(times[run], 4) for run in runs],
                [100 * run.accuracy for run in runs],
                hover=f"%{{text}}<br>%{{y:.1f}} % in %{{x:.2f}} {unit}",
                text=[text(run.name) + ", pruned" * (run.result is None) for run in runs],
                marker={"color": colour, "symbol": symbol, "size": 9, "opacity": 0.75},
                legendgroup=group.label,
                showlegend=group.label not in explained,
            )
        )
        explained.add(group.label)
    return figure(
        [frontier, *points],
        400,
        xaxis=log_axis(f"training time, {unit}", min(times.values()), max(times.values())),
        yaxis=axis("validation accuracy, %"),
        showlegend=len(explained) <= _MAX_LEGEND,
    )


def learning_curves(summaries: Sequence[StrategySummary]) -> Figure:
    """Accuracy by epoch of each group's chosen runs, with a diamond at each unfreezing.

    Each network has a panel of its own.
    """
    ordered = sorted(summaries, key=lambda summary: summary.group.model_number)
    models = list(dict.fromkeys(summary.group.model for summary in ordered))
    traces, diamonds = [], []
    explained: set[str] = set()
    for summary in ordered:
        place = {"yaxis": _axis_name("y", models.index(summary.group.model))}
        for i, run in enumerate(summary.chosen[:_MAX_CURVES]):
            is_new = i == 0 and summary.group.label not in explained
            traces += [one | place for one in _curves(run, is_first=i == 0, showlegend=is_new)]
            diamonds += [_diamonds(run) | place] if unfreezings(run) else []
        explained.add(summary.group.label)
    num_epochs = max((len(summary.best.rows) for summary in summaries), default=0)
    layout = _panels(models, num_epochs) | {"showlegend": len(explained) <= _MAX_LEGEND}
    return figure(traces + diamonds, 160 + 260 * len(models), **layout)


def _axis_name(begin: str, number: int) -> str:
    """plotly's name of an axis, such as y, y2 and y3."""
    return begin + (str(number + 1) if number else "")


def _panels(models: Sequence[str], num_epochs: int) -> dict[str, Any]:
    """The axes of one panel per network, one below the other, and the networks' names."""
    last, slot = len(models) - 1, 1 / len(models)
    height = 0.85 * slot if last else slot  # the rest is for the name
    layout: dict[str, Any] = {"annotations": []}
    for i, model in enumerate(models):
        bottom = (last - i) * slot
        linked = {"matches": "y"} if i else {}
        place = {"domain": [bottom, bottom + height], **linked}
        layout[_axis_name("yaxis", i)] = axis("accuracy, %", **place)
        name = {"text": f"<b>{text(model)}</b>", "x": 0, "y": bottom + height}
        layout["annotations"].append({**name, **_PANEL_NAME})
    anchor = _axis_name("y", last)
    layout["xaxis"] = axis("epoch", dtick=1 if num_epochs <= 20 else None, anchor=anchor)
    return layout


def _curve(run: RunRecord, mode: str, name: str, metric: str, hover: str, **options: Any) -> Trace:
    """A metric by epoch, in percent."""
    values = run.metric(metric)
    return scatter(
        mode,
        name,
        list(values),
        [100 * value for value in values.values()],
        hover=f"{text(run.name)}, seed {run.config.get('seed')}<br>{hover}",
        **{"legendgroup": run.group.label, "showlegend": False} | options,
    )


def _curves(run: RunRecord, is_first: bool, showlegend: bool) -> list[Trace]:
    colour = colour_of(run.group)
    validation = _curve(
        run,
        "lines+markers",
        run.group.label,
        "val_acc",
        "%{y:.1f} % validation, epoch %{x}",
        showlegend=showlegend,
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
            "color": colour_of(run.group),
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
