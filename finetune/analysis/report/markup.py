"""The page's building stones: escaped text, sections, sortable tables, places of figures.

Turns values into HTML. Knows nothing about runs.

    >>> number(0.5, "50 %")
    Cell(shown='50 %', value=0.5)
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from finetune.analysis.report.figures import Figure, colour_of


def esc(value: object) -> str:
    return html.escape(str(value))


def section(title: str, about: str, *content: str) -> str:
    told = f'<p class="soft">{esc(about)}</p>' if about else ""
    return f"<section><h2>{esc(title)}</h2>{told}{''.join(content)}</section>"


def dot(strategy: str) -> str:
    return f'<span class="dot" style="background:{colour_of(strategy)}"></span>{esc(strategy)}'


@dataclass(frozen=True)
class Cell:
    """A table's cell: what is shown, and what it is sorted by."""

    shown: str
    value: float | str | None = None


def number(value: float | None, shown: str | None = None) -> Cell:
    return Cell("–" if value is None else shown or f"{value:g}", "" if value is None else value)


def table(heads: Sequence[str], rows: Iterable[Sequence[str | Cell]], tall: bool = False) -> str:
    """A sortable table; cells of text are HTML already. Columns of `Cell`s are numbers."""
    body = list(rows)
    numeric = [bool(body) and isinstance(body[0][i], Cell) for i in range(len(heads))]
    css = ["number" if is_number else "" for is_number in numeric]
    head = "".join(
        f'<th class="{c}" scope="col"><button>{esc(name)}</button></th>'
        for name, c in zip(heads, css, strict=True)
    )
    lines = [f"<tr>{''.join(map(_cell, row, css))}</tr>" for row in body]
    size = "scroll tall" if tall else "scroll"
    return (
        f'<div class="{size}"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}'
        "</tbody></table></div>"
    )


def _cell(cell: str | Cell, css: str) -> str:
    if isinstance(cell, str):
        return f'<td class="{css}">{cell}</td>'
    return f'<td class="{css}" data-value="{esc(cell.value)}">{cell.shown}</td>'


def split_constant_columns(
    heads: Sequence[str], rows: Sequence[Sequence[str | Cell]], always: Sequence[str]
) -> tuple[str, tuple[Sequence[str], Sequence[Sequence[str | Cell]]]]:
    """What is the same in all rows, in words, and the columns that are left."""
    values = {head: {_text(row[i]) for row in rows} for i, head in enumerate(heads)}
    shown = [i for i, head in enumerate(heads) if head in always or len(values[head]) > 1]
    alike = [f"{head} {min(values[head])}" for i, head in enumerate(heads) if i not in shown]
    alike = [words for words in alike if not words.endswith("–")]
    told = f"The same for all: {', '.join(alike)}." if alike else ""
    return told, ([heads[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _text(cell: str | Cell) -> str:
    return cell.shown if isinstance(cell, Cell) else cell


@dataclass
class Drawn:
    """The figures that a page holds, by the ids of their places."""

    figures: dict[str, Figure] = field(default_factory=dict)

    def place(self, name: str, figure: Figure, wide: bool = False) -> str:
        """The place of a figure in the page; a wide one scrolls on a phone."""
        self.figures[name] = figure
        height = figure["layout"]["height"]
        css = "figure wide" if wide else "figure"
        return f'<div class="scroll"><div id="{name}" class="{css}" style="height:{height}px"></div></div>'  # noqa: E501  # fmt: skip
