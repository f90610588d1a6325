"""Traces, axes, colours and symbols of plotly.js; the figures are made of them.

The page adds the colours of its light or dark theme.
"""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

from finetune.config.strategies import STRATEGIES
from finetune.runs.settings import Group

Figure = dict[str, Any]
Trace = dict[str, Any]

PALETTE = ("#4393e6", "#e58637", "#35ad86", "#c26ccc", "#b59b2e", "#e0606b", "#7f8c9b")
GREY = "#94a0b0"
PLAIN_MARGIN = {"l": 56, "r": 8, "t": 12, "b": 48}
"""The margin of a figure without a legend."""


class Mark(NamedTuple):
    """How a network is drawn: plotly's symbol and dash, and the symbol as a character."""

    symbol: str
    dash: str
    character: str


# not plotly's diamonds and dots, which mark unfreezings and training accuracies
_MARKS = (
    Mark("circle", "solid", "●"),
    Mark("square", "dash", "■"),
    Mark("triangle-up", "dashdot", "▲"),
    Mark("cross", "longdash", "✚"),
    Mark("star", "longdashdot", "★"),
    Mark("triangle-down", "8px 2px 2px 2px 2px 2px", "▼"),
    Mark("x", "2px 6px", "✖"),
)


def mark_of(group: Group) -> Mark:
    return _MARKS[group.model_number % len(_MARKS)]


def colour_of(group: Group) -> str:
    """That of its strategy, or of its setting where settings are compared."""
    known = [*STRATEGIES, group.strategy].index(group.strategy)
    return PALETTE[(group.setting_number if group.setting else known) % len(PALETTE)]


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
    shown = {"hovertemplate": f"{hover}<extra></extra>", "marker": {"color": PALETTE[0]}}
    return {"type": "bar", "orientation": "h", "x": x, "y": y, **shown, **options}
