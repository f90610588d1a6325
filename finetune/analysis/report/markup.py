"""Parts of the page: sections, notes, sortable tables, and the figures with their places."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.analysis.report.figures import Figure, colour_of


def esc(value: object) -> str:
    return html.escape(str(value))


def section(title: str, about: str, *content: str) -> str:
    paragraph = f'<p class="soft">{esc(about)}</p>' if about else ""
    return f"<section><h2>{esc(title)}</h2>{paragraph}{''.join(content)}</section>"


def warning(text: object) -> str:
    return f'<div class="note warn"><p>{esc(text)}</p></div>'


def strategy_label(strategy: str) -> str:
    colour = colour_of(strategy)
    return f'<span class="swatch" style="background:{colour}"></span>{esc(strategy)}'


def code(text: object) -> str:
    return f"<code>{esc(text)}</code>"


def plain(value: object) -> str:
    return esc(f"{value:g}" if isinstance(value, int | float) else value)


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, and how it gets a cell from a row."""

    head: str
    value: Callable[[Any], Any]
    """The value of a row, by which the table is sorted; None leaves the cell empty."""
    shown: Callable[[Any], str] = plain
    """The HTML of a value."""
    always: bool = False
    """Show the column even if all its values are the same."""

    def html(self, row: Any) -> str:
        value = self.value(row)
        return "–" if value is None else self.shown(value)


def table(columns: Sequence[Column], rows: Sequence[Any], tall: bool = False) -> str:
    """A sortable table."""
    numeric = [
        any(isinstance(column.value(row), int | float) for row in rows) for column in columns
    ]
    css = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(
        f'<th{c} scope="col"><button>{esc(column.head)}</button></th>'
        for column, c in zip(columns, css, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(map(_cell, columns, css, [row] * len(css)))}</tr>" for row in rows
    )
    return (
        f'<div class="scroll{" tall" * tall}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(column: Column, css: str, row: Any) -> str:
    value = "" if (found := column.value(row)) is None else found
    data = f' data-value="{esc(value)}"' if css else ""
    return f"<td{css}{data}>{column.html(row)}</td>"


def split_constant_columns(
    columns: Sequence[Column], rows: Sequence[Any]
) -> tuple[str, list[Column]]:
    """The columns that are the same in all rows as a sentence, and the other columns."""
    values = {column.head: {column.html(row) for row in rows} for column in columns}
    kept = [column for column in columns if column.always or len(values[column.head]) > 1]
    constant = {c.head: min(values[c.head]) for c in columns if c not in kept}
    words = [f"{head} {html.unescape(cell)}" for head, cell in constant.items() if cell != "–"]
    return (f"The same for all: {', '.join(words)}." if words else ""), kept


@dataclass
class PageFigures:
    """The figures of a page by the ids of their places."""

    figures: dict[str, Figure] = field(default_factory=dict)

    def add(self, name: str, figure: Figure, wide: bool = False) -> str:
        """The HTML of a figure's place; on a phone a wide one scrolls."""
        self.figures[name] = figure
        height = figure["layout"]["height"]
        place = f'<div id="{name}" class="figure{" wide" * wide}" style="height:{height}px"></div>'
        return f'<div class="scroll">{place}</div>'
