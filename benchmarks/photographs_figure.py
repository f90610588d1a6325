"""The figure of `python -m benchmarks.photographs`: test accuracy by the number of pictures."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks.photographs_cell import APPROACHES
from finetune.analysis.report.traces import PALETTE

WIDTH, HEIGHT = 460, 420
"""Of one panel, in pixels."""

Cell = Mapping[str, Any]


def write_figure(cells: Sequence[Cell], path: Path) -> None:
    """One panel for each data set and network; a screenshot of it, taken by Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        raise SystemExit("--figure needs Chromium (apt-get install chromium)")
    figure = drawn(cells)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        figure.write_html(page, include_plotlyjs=True, config={"staticPlot": True})
        size = f"{figure.layout.width + 16},{figure.layout.height + 16}"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=10000"]
        flags += [f"--screenshot={path.absolute()}", f"--window-size={size}"]
        subprocess.run([program, *flags, page.as_uri()], check=True, capture_output=True)


def drawn(cells: Sequence[Cell]) -> go.Figure:
    """Lines of mean test accuracies with their intervals, a little apart from each other."""
    panels = list(dict.fromkeys((cell["data"], cell["model"]) for cell in cells))
    titles = [f"{data}, {model.removeprefix('timm:')}" for data, model in panels]
    figure = make_subplots(1, len(panels), subplot_titles=titles, horizontal_spacing=0.08)
    sizes = sorted({cell["size"] for cell in cells}, key=lambda size: size.zfill(9))
    named: set[str] = set()
    for column, panel in enumerate(panels, 1):
        of_panel = {c["size"]: c["strategies"] for c in cells if (c["data"], c["model"]) == panel}
        for number, name in enumerate(APPROACHES):
            found = [(s, of_panel[s][name]) for s in sizes if name in of_panel.get(s, {})]
            if found:
                line = _line(name, number, found, sizes, show=name not in named)
                figure.add_trace(line, row=1, col=column)
                named.add(name)
    figure.update_xaxes(
        tickvals=[*range(len(sizes))], ticktext=sizes, range=[-0.4, len(sizes) - 0.6]
    )
    figure.update_xaxes(title="training pictures of each class")
    figure.update_yaxes(gridcolor="#e4e8ee", tickformat=".2f")
    figure.update_yaxes(title="test accuracy (95 % interval)", col=1)
    figure.update_layout(
        width=WIDTH * len(panels) + 110,
        height=HEIGHT,
        plot_bgcolor="white",
        font={"family": "sans-serif", "size": 13},
        margin={"l": 60, "r": 10, "t": 40, "b": 50},
    )
    return figure


def _line(
    name: str, number: int, found: Sequence[tuple[str, Any]], sizes: Sequence[str], show: bool
) -> go.Scatter:
    shift = 0.07 * (number - (len(APPROACHES) - 1) / 2)
    accuracies = [record["test_accuracy"] for _, record in found]
    intervals = [record["test_interval"] for _, record in found]
    return go.Scatter(
        x=[sizes.index(size) + shift for size, _ in found],
        y=accuracies,
        error_y={
            "type": "data",
            "array": [high - y for y, (_, high) in zip(accuracies, intervals, strict=True)],
            "arrayminus": [y - low for y, (low, _) in zip(accuracies, intervals, strict=True)],
            "thickness": 1.2,
            "width": 3,
        },
        mode="lines+markers",
        name=name,
        legendgroup=name,
        showlegend=show,
        line={"color": PALETTE[number % len(PALETTE)], "width": 2},
    )
