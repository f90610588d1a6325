"""The tables of `python -m benchmarks.photographs`, as Markdown for README.md and NOTES.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.photographs_cell import APPROACHES, unpacked
from finetune.analysis.statistics import Correct, Difference, group_differences

Cell = Mapping[str, Any]

REFERENCES = ("probe", "freeze")
"""The strategies that train the head alone, with which the others are compared."""


def correct(record: Mapping[str, Any]) -> Correct:
    """Which test pictures each seed's model classifies correctly, (R, N)."""
    return np.stack([unpacked(row, record["num_test"]) for row in record["test_correct"]])


def differences(cell: Cell) -> dict[tuple[str, str], Difference]:
    """Of every pair of strategies on the test pictures, corrected for the number of pairs."""
    names = [name for name in reversed(APPROACHES) if name in cell["strategies"]]
    pairs = group_differences({name: correct(cell["strategies"][name]) for name in names})
    return {(pair.first, pair.second): pair for pair in pairs}


def by_size(cells: Iterable[Cell], data: str, model: str) -> str:
    """Test accuracies: a row for each strategy, a column for each size."""
    found = {c["size"]: c["strategies"] for c in cells if (c["data"], c["model"]) == (data, model)}
    names = [name for name in APPROACHES if any(name in records for records in found.values())]
    rows = [["strategy", *(f"{size} a class" if size != "all" else size for size in found)]]
    for name in names:
        records = [strategies.get(name) for strategies in found.values()]
        rows.append([f"`{name}`", *(_accuracy(r, "test") if r else "-" for r in records)])
    return _markdown(rows)


def details(cell: Cell) -> str:
    """A row for each strategy: what was chosen, its accuracies, its differences and seconds."""
    versus = [name for name in REFERENCES if name in cell["strategies"]]
    rows = [
        ["strategy", "rates", "best", "validation", "test", "macro F1"]
        + [f"points from {name}" for name in versus]
        + ["search + confirm, s", "one run, s"]
    ]
    pairs = differences(cell)
    for name in (name for name in APPROACHES if name in cell["strategies"]):
        record = cell["strategies"][name]
        seconds = record["seconds"]
        rates = [f"{rate:g}" for rate, _ in record["learning_rates"]]
        best = "-" if record["learning_rate"] is None else f"{record['learning_rate']:g}"
        rows.append(
            [
                f"`{name}`",
                f"{rates[0]} to {rates[-1]}" if rates else "-",
                best + " (at the end)" * record["at_the_edge"],
                _accuracy(record, "val"),
                _accuracy(record, "test"),
                f"{record['test_macro_f1']:.3f}",
                *(_points(pairs.get((name, other))) for other in versus),
                f"{seconds['search'] + seconds['confirm']:.0f}" + "+" * record["resumed"],
                f"{record['seconds_per_run']:.1f}",
            ]
        )
    return _markdown(rows)


def _accuracy(record: Mapping[str, Any], of: str) -> str:
    low, high = record[f"{of}_interval"]
    return f"{record[f'{of}_accuracy']:.3f} ({low:.3f} to {high:.3f})"


def _points(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    points = [100 * value for value in (difference.estimate, difference.low, difference.high)]
    star = "*" if difference.significant else ""
    return f"{points[0]:+.1f}{star} ({points[1]:+.1f} to {points[2]:+.1f})"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])
