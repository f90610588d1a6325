"""The report's figures, as the plain data that plotly.js draws.

Turns outcomes and a comparison into traces and layouts without colours of the page: the page
gives those, so that light and dark share one figure. Knows nothing about HTML.

    >>> learning_curves(comparison)["layout"]["height"]  # doctest: +SKIP
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.compare import Comparison, percent
from finetune.outcomes import Outcome
from finetune.strategies import STRATEGIES, plan

Figure = dict[str, Any]

_PALETTE = ("#4393e6", "#e58637", "#35ad86", "#c26ccc", "#b59b2e", "#e0606b", "#7f8c9b")
PARAMETERS = ("learning_rate", "batch_size", "data_aug")
_MAX_CURVES = 5
"""Seeds of a strategy whose learning curves are drawn."""


def colour_of(strategy: str) -> str:
    names = list(STRATEGIES)
    place = names.index(strategy) if strategy in names else len(names)
    return _PALETTE[place % len(_PALETTE)]


def text(value: object) -> str:
    """For plotly's labels, which read some tags and fill in %{}: shown as it stands."""
    return html.escape(str(value), quote=False).replace("%{", "%&#123;")


def _figure(data: list[dict[str, Any]], height: int, **layout: Any) -> Figure:
    return {"data": data, "layout": {"height": height, **layout}}


def _axis(title: str, **options: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **options}


def intervals(comparison: Comparison) -> Figure:
    """Each pair's difference in points, with its interval."""
    pairs = list(reversed(comparison.differences))
    traces = []
    for told, name, colour in ((True, "told from luck", "#35ad86"), (False, "may be luck", "#94a0b0")):  # noqa: E501  # fmt: skip
        shown = [one for one in pairs if one.told_from_luck == told]
        if not shown:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "marker": {"color": colour, "size": 10},
                "x": [100 * one.estimate for one in shown],
                "y": [text(f"{one.first} − {one.second}") for one in shown],
                "error_x": {
                    "type": "data",
                    "array": [100 * (one.high - one.estimate) for one in shown],
                    "color": colour,
                    "thickness": 2,
                    "width": 5,
                },
                "hovertemplate": "%{y}: %{x:.1f} points<extra></extra>",
            }
        )
    order = [text(f"{one.first} − {one.second}") for one in pairs]
    return _figure(
        traces,
        130 + 34 * len(pairs),
        xaxis=_axis("difference in points of accuracy", zeroline=True, zerolinewidth=2),
        yaxis={"categoryorder": "array", "categoryarray": order},
        showlegend=True,
    )


def frontier(finished: Sequence[Outcome]) -> Figure:
    """Accuracy against training time, and the runs that nothing quicker beats."""
    traces = []
    for strategy, runs in _by_strategy(finished).items():
        results = [one.result for one in runs if one.result]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": text(strategy),
                "marker": {"color": colour_of(strategy), "size": 9, "opacity": 0.75},
                "x": [round(one.train_seconds / 60, 4) for one in results],
                "y": [100 * one.best_val_acc for one in results],
                "text": [text(one.name) for one in runs],
                "hovertemplate": "%{text}<br>%{y:.1f} % in %{x:.2f} min<extra></extra>",
            }
        )
    best: list[tuple[float, float]] = []
    for seconds, accuracy in sorted(
        (one.result.train_seconds, one.result.best_val_acc) for one in finished if one.result
    ):
        if not best or accuracy > best[-1][1]:
            best.append((seconds, accuracy))
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "frontier",
        "line": {"shape": "hv", "color": "#94a0b0", "width": 1.5, "dash": "dot"},
        "x": [seconds / 60 for seconds, _ in best],
        "y": [100 * accuracy for _, accuracy in best],
        "hoverinfo": "skip",
    }
    return _figure(
        [line, *traces],
        400,
        xaxis=_axis("training time, minutes"),
        yaxis=_axis("validation accuracy, %"),
    )


def learning_curves(comparison: Comparison) -> Figure:
    """Accuracy by epoch of each strategy's chosen runs, with the moments of unfreezing."""
    traces = []
    for standing in comparison.standings:
        colour = colour_of(standing.strategy)
        for i, run in enumerate(standing.chosen[:_MAX_CURVES]):
            shared = {"legendgroup": standing.strategy, "type": "scatter"}
            epochs = [row["epoch"] for row in run.rows]
            starts = _unfreezings(run)
            label = f"{text(run.name)}, seed {run.config.get('seed')}"
            traces.append(
                {
                    **shared,
                    "mode": "lines+markers",
                    "name": text(standing.strategy),
                    "showlegend": i == 0,
                    "line": {"color": colour, "width": 2.5 if i == 0 else 1.2},
                    "opacity": 1 if i == 0 else 0.6,
                    "marker": {
                        "size": [11 if e in starts else 4 for e in epochs],
                        "symbol": ["diamond" if e in starts else "circle" for e in epochs],
                    },
                    "x": epochs,
                    "y": [100 * row["val_acc"] for row in run.rows],
                    "text": [
                        f"<br>{' and '.join(starts[e])} starts to train" if e in starts else ""
                        for e in epochs
                    ],
                    "hovertemplate": f"{label}<br>%{{y:.1f}} % validation, epoch %{{x}}%{{text}}"
                    "<extra></extra>",
                }
            )
            if i == 0:
                traces.append(
                    {
                        **shared,
                        "mode": "lines",
                        "name": "training",
                        "showlegend": False,
                        "line": {"color": colour, "width": 1.2, "dash": "dot"},
                        "x": epochs,
                        "y": [100 * row["train_acc"] for row in run.rows],
                        "hovertemplate": f"{label}<br>%{{y:.1f}} % training<extra></extra>",
                    }
                )
    return _figure(
        traces,
        420,
        xaxis=_axis("epoch", dtick=1 if _most_epochs(comparison) <= 20 else None),
        yaxis=_axis("accuracy, %"),
        annotations=_unfreezing_notes(comparison),
    )


def _most_epochs(comparison: Comparison) -> int:
    return max((len(one.best.rows) for one in comparison.standings), default=0)


def _unfreezings(run: Outcome) -> dict[float, list[str]]:
    """Epochs after the first at which parts start to train, as far as the run got."""
    config = run.config
    starts = plan(
        run.strategy,
        config.get("unfreeze_from"),
        config.get("unfreeze_every"),
        config.get("lr_decay"),
    ).start_epochs
    found: dict[float, list[str]] = defaultdict(list)
    for part, epoch in starts.items():
        if 0 < epoch < len(run.rows):
            found[epoch].append(part)
    return found


def _unfreezing_notes(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "x": epoch,
            "y": 100 * standing.chosen[0].rows[int(epoch)]["val_acc"],
            "text": ", ".join(parts),
            "showarrow": True,
            "arrowhead": 0,
            "arrowcolor": colour_of(standing.strategy),
            "ax": 0,
            "ay": 30,
            "font": {"size": 11, "color": colour_of(standing.strategy)},
        }
        for standing in comparison.standings
        for epoch, parts in _unfreezings(standing.chosen[0]).items()
    ]


def varying(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    """The searched parameters with more than one value, and their values in order."""
    found = {}
    for name in PARAMETERS:
        values = {one.config.get(name) for one in outcomes} - {None}
        if len(values) > 1:
            found[name] = sorted(values, key=lambda v: (isinstance(v, str), v))
    return found


def _level(name: str, value: Any) -> str:
    words = {"y": "flip", "n": "none", "strong": "strong"} if name == "data_aug" else {}
    return words.get(value, f"{value:g}" if isinstance(value, int | float) else str(value))


_TITLES = {
    "strategy": "strategy",
    "learning_rate": "learning rate",
    "batch_size": "batch size",
    "data_aug": "augmentation",
}


def parallel_coordinates(finished: Sequence[Outcome]) -> Figure:
    """A line a run over strategy, learning rate, batch size, augmentation and accuracy.

    Lines of plain SVG: plotly's own kind needs WebGL, which not every browser gives a page.
    """
    strategies = [name for name in STRATEGIES if any(one.strategy == name for one in finished)]
    levels: dict[str, list[Any]] = {"strategy": strategies}
    for name in PARAMETERS:
        levels[name] = varying(finished).get(name) or sorted(
            {one.config.get(name) for one in finished}, key=str
        )
    accuracies = [one.result.best_val_acc for one in finished if one.result]
    low, high = min(accuracies), max(accuracies)
    wobble = np.random.default_rng(0)
    traces = []
    for strategy, runs in _by_strategy(finished).items():
        xs: list[float | None] = []
        ys: list[float | None] = []
        for run in runs:
            assert run.result is not None
            apart = 0.05 * wobble.uniform(-1, 1)  # so that runs of one setting can be told apart
            for place, (name, values) in enumerate(levels.items()):
                value = run.strategy if name == "strategy" else run.config.get(name)
                xs.append(place)
                ys.append(round(_height(values.index(value), len(values)) + apart, 4))
            xs += [len(levels), None]
            ys += [round((run.result.best_val_acc - low) / ((high - low) or 1), 4), None]
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
        _tick(place, _height(i, len(values)), _level(name, value))
        for place, (name, values) in enumerate(levels.items())
        for i, value in enumerate(values)
    ]
    notes += [
        _tick(len(levels), share, percent(low + share * (high - low))) for share in (0, 0.5, 1)
    ]
    return _figure(
        traces,
        400,
        xaxis={
            "tickvals": list(range(len(levels) + 1)),
            "ticktext": [*(_TITLES[name] for name in levels), "accuracy"],
            "range": [-0.25, len(levels) + 0.25],
            "fixedrange": True,
        },
        yaxis={"visible": False, "range": [-0.1, 1.1], "fixedrange": True},
        annotations=notes,
    )


def _height(index: int, count: int) -> float:
    return 0.5 if count == 1 else index / (count - 1)


def _tick(x: float, y: float, label: str) -> dict[str, Any]:
    return {
        "x": x,
        "y": y,
        "text": f"<b>{text(label)}</b>",
        "showarrow": False,
        "xanchor": "left",
        "xshift": 5,
        "font": {"size": 11},
    }


def marginal_means(finished: Sequence[Outcome], name: str, values: Sequence[Any]) -> Figure:
    """Mean accuracy at each value of one parameter, a line a strategy."""
    traces = []
    for strategy, runs in _by_strategy(finished).items():
        groups: dict[Any, list[float]] = defaultdict(list)
        for one in runs:
            assert one.result is not None
            groups[one.config.get(name)].append(100 * one.result.best_val_acc)
        shown = [value for value in values if value in groups]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": text(strategy),
                "line": {"color": colour_of(strategy), "width": 2},
                "marker": {"size": 8},
                "x": [_level(name, value) for value in shown],
                "y": [float(np.mean(groups[value])) for value in shown],
                "text": [f"{len(groups[value])} runs" for value in shown],
                "hovertemplate": "%{x}: %{y:.1f} %, mean of %{text}<extra></extra>",
            }
        )
    if len(values) > 12:  # a continuous search: no two runs share a value
        for trace in traces:
            trace["mode"] = "markers"
    numeric = len(values) > 12 and not isinstance(values[0], str)
    axis = {"type": "log" if name == "learning_rate" else "linear"} if numeric else {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": [_level(name, value) for value in values],
    }  # fmt: skip
    return _figure(
        traces,
        300,
        xaxis=_axis(_TITLES[name], **axis),
        yaxis=_axis("mean accuracy, %"),
        showlegend=False,
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
    return _figure(
        [bars], 110 + 30 * len(names), xaxis=_axis("importance", tickformat=".0%", range=[0, 1])
    )


def confusion(counts: np.ndarray[Any, Any], class_names: Sequence[str]) -> Figure:
    """Rows are truths, columns predictions; the colour is the share of the row."""
    names = [_short(name) for name in class_names]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
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
        "hovertemplate": "%{y} taken for %{x}: %{text}<extra></extra>",
    }
    return _figure(
        [heat],
        min(190 + 30 * len(names), 760),
        xaxis=_axis("predicted", tickangle=-45, type="category"),
        yaxis=_axis("true", autorange="reversed", type="category"),
        margin={"l": 56, "r": 8, "t": 12, "b": 48},
    )


def per_class(counts: np.ndarray[Any, Any], class_names: Sequence[str]) -> Figure:
    """Each class's accuracy on its own pictures, the lowest at the bottom."""
    totals = counts.sum(axis=1)
    shares = np.diag(counts) / np.maximum(totals, 1)
    order = np.argsort(shares, kind="stable")
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [100 * float(shares[i]) for i in order],
        "y": [_short(class_names[i]) for i in order],
        "text": [f"{100 * shares[i]:.0f} % of {totals[i]}" for i in order],
        "textposition": "auto",
        "marker": {"color": "rgba(67,147,230,0.75)"},
        "hovertemplate": "%{y}: %{x:.1f} %<extra></extra>",
    }
    return _figure(
        [bars],
        min(130 + 30 * len(shares), 900),
        xaxis=_axis("accuracy, %", range=[0, 100]),
        yaxis={"type": "category"},
        margin={"l": 56, "r": 8, "t": 12, "b": 48},
    )


def _short(name: str) -> str:
    return text(name if len(name) <= 28 else f"{name[:27]}…")


def _by_strategy(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {name: [] for name in STRATEGIES}
    for one in outcomes:
        groups.setdefault(one.strategy, []).append(one)
    return {name: runs for name, runs in groups.items() if runs}
