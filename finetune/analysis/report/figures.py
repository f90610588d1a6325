"""The report's figures, as the plain data that plotly.js draws.

Turns outcomes and a comparison into traces and layouts without colours of the page: the page
gives those, so that light and dark share one figure. Knows nothing about HTML.

    >>> learning_curves(comparison)["layout"]["height"]  # doctest: +SKIP
"""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.analysis.comparison import Comparison
from finetune.analysis.read_runs import RunRecord
from finetune.config.strategies import STRATEGIES, plan

Figure = dict[str, Any]

_PALETTE = ("#4393e6", "#e58637", "#35ad86", "#c26ccc", "#b59b2e", "#e0606b", "#7f8c9b")
PLAIN_MARGIN = {"l": 56, "r": 8, "t": 12, "b": 48}
"""Around a figure without a legend."""
_MAX_CURVES = 5
"""Seeds of a strategy whose learning curves are drawn."""


def colour_of(strategy: str) -> str:
    names = list(STRATEGIES)
    place = names.index(strategy) if strategy in names else len(names)
    return _PALETTE[place % len(_PALETTE)]


def text(value: object) -> str:
    """For plotly's labels, which read some tags and fill in %{}: shown as it stands."""
    return html.escape(str(value), quote=False).replace("%{", "%&#123;")


def figure(data: list[dict[str, Any]], height: int, **layout: Any) -> Figure:
    return {"data": data, "layout": {"height": height, **layout}}


def axis(title: str, **options: Any) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 10}, "zeroline": False, **options}


def log_axis(title: str, low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis where values span much, with numbers written out; else a plain one."""
    if not 0 < 20 * low < high:
        return axis(title)
    return axis(title, type="log", tickformat="~g", dtick=1 if high > 300 * low else "D2")


def intervals(comparison: Comparison) -> Figure:
    """Each pair's difference in points, with its interval."""
    pairs = list(reversed(comparison.differences))
    traces = []
    for told, name, colour in ((True, "told from luck", "#35ad86"), (False, "may be luck", "#94a0b0")):  # noqa: E501  # fmt: skip
        shown = [one for one in pairs if one.significant == told]
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
    return figure(
        traces,
        130 + 34 * len(pairs),
        xaxis=axis("points of accuracy", zeroline=True, zerolinewidth=2),
        yaxis={"categoryorder": "array", "categoryarray": order},
        showlegend=True,
    )


def frontier(finished: Sequence[RunRecord]) -> Figure:
    """Accuracy against training time, and the runs that nothing quicker beats."""
    traces = []
    for strategy, runs in by_strategy(finished).items():
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
    minutes = [one.result.train_seconds / 60 for one in finished if one.result]
    return figure(
        [line, *traces],
        400,
        xaxis=log_axis("training time, minutes", min(minutes), max(minutes)),
        yaxis=axis("validation accuracy, %"),
    )


def learning_curves(comparison: Comparison) -> Figure:
    """Accuracy by epoch of each strategy's chosen runs, with the moments of unfreezing."""
    traces = []
    for standing in comparison.standings:
        colour = colour_of(standing.strategy)
        for i, run in enumerate(standing.chosen[:_MAX_CURVES]):
            shared = {"legendgroup": standing.strategy, "type": "scatter"}
            epochs = [row["epoch"] for row in run.rows]
            label = f"{text(run.name)}, seed {run.config.get('seed')}"
            traces.append(
                {
                    **shared,
                    "mode": "lines+markers",
                    "name": text(standing.strategy),
                    "showlegend": i == 0,
                    "line": {"color": colour, "width": 2.5 if i == 0 else 1.2},
                    "opacity": 1 if i == 0 else 0.6,
                    "marker": {"size": 4},
                    "x": epochs,
                    "y": [100 * row["val_acc"] for row in run.rows],
                    "hovertemplate": f"{label}<br>%{{y:.1f}} % validation, epoch %{{x}}"
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
    return figure(
        traces + _moments(comparison),  # which no line should hide
        420,
        xaxis=axis("epoch", dtick=1 if _most_epochs(comparison) <= 20 else None),
        yaxis=axis("accuracy, %"),
    )


def _most_epochs(comparison: Comparison) -> int:
    return max((len(one.best.rows) for one in comparison.standings), default=0)


def unfreezings(run: RunRecord) -> dict[int, list[str]]:
    """Epochs after the first at which parts start to train, as far as the run got."""
    config = run.config
    starts = plan(
        run.strategy,
        config.get("unfreeze_from"),
        config.get("unfreeze_every"),
        config.get("lr_decay"),
    ).start_epochs
    found: dict[int, list[str]] = defaultdict(list)
    for part, epoch in starts.items():
        if 0 < epoch < len(run.rows):
            found[epoch].append(part)
    return dict(sorted(found.items()))


def _moments(comparison: Comparison) -> list[dict[str, Any]]:
    """A diamond wherever more of the network starts to train."""
    traces = []
    for standing in comparison.standings:
        for run in standing.chosen[:_MAX_CURVES]:
            if starts := unfreezings(run):
                label = f"{text(run.name)}, seed {run.config.get('seed')}"
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "markers",
                        "legendgroup": standing.strategy,
                        "showlegend": False,
                        "marker": {
                            "symbol": "diamond",
                            "size": 11,
                            "color": colour_of(standing.strategy),
                            "line": {"width": 1, "color": "#ffffff"},
                        },
                        "x": list(starts),
                        "y": [100 * run.rows[epoch]["val_acc"] for epoch in starts],
                        "text": [" and ".join(parts) for parts in starts.values()],
                        "hovertemplate": f"{label}<br>%{{text}} starts to train in epoch %{{x}}"
                        "<extra></extra>",
                    }
                )
    return traces


def confusion(counts: np.ndarray[Any, Any], class_names: Sequence[str]) -> Figure:
    """Rows are truths, columns predictions; the colour is the share of the row."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = _labels(class_names)
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
    return figure(
        [heat],
        min(190 + 30 * len(names), 760),
        xaxis=axis("predicted", tickangle=-45, type="category", showgrid=False),
        yaxis=axis("true", autorange="reversed", type="category", showgrid=False),
        margin=PLAIN_MARGIN,
    )


def per_class(counts: np.ndarray[Any, Any], class_names: Sequence[str]) -> Figure:
    """Each class's accuracy on its own pictures, the lowest at the bottom."""
    totals = counts.sum(axis=1)
    shares = np.diag(counts) / np.maximum(totals, 1)
    order = np.argsort(shares, kind="stable")
    names = _labels(class_names)
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [100 * float(shares[i]) for i in order],
        "y": [names[i] for i in order],
        "text": [f"{100 * shares[i]:.0f} % of {totals[i]}" for i in order],
        "textposition": "auto",
        "marker": {"color": "rgba(67,147,230,0.75)"},
        "hovertemplate": "%{y}: %{x:.1f} %<extra></extra>",
    }
    return figure(
        [bars],
        min(130 + 30 * len(shares), 900),
        xaxis=axis("accuracy, %", range=[0, 100]),
        yaxis={"type": "category"},
        margin=PLAIN_MARGIN,
    )


def _labels(names: Sequence[str]) -> list[str]:
    """Long names cut in their middle; numbered where they would then be the same."""
    cut = [name if len(name) <= 28 else f"{name[:14]}…{name[-13:]}" for name in names]
    twice = {name for name, count in Counter(cut).items() if count > 1}
    return [text(f"{i} {name}" if name in twice else name) for i, name in enumerate(cut)]


def by_strategy(outcomes: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    groups: dict[str, list[RunRecord]] = {name: [] for name in STRATEGIES}
    for one in outcomes:
        groups.setdefault(one.strategy, []).append(one)
    return {name: runs for name, runs in groups.items() if runs}
