"""Parts of the page: sections, notes, sortable tables, and places of figures."""

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.analysis.report.traces import GREY, Figure, colour_of, mark_of
from finetune.runs.settings import Group
from finetune.system.text import num


def esc(value: object) -> str:
    return html.escape(str(value))


def section(title: str, about: str, *content: str) -> str:
    paragraph = f'<p class="soft">{esc(about)}</p>' if about else ""
    return f"<section><h2>{esc(title)}</h2>{paragraph}{''.join(content)}</section>"


def warning(text: object) -> str:
    return f'<div class="note warn"><p>{esc(text)}</p></div>'


def marked(name: str, character: str = "●", colour: str = GREY) -> str:
    """A name with its symbol before it."""
    return f'<span><span class="mark" style="color:{colour}">{character}</span>{esc(name)}</span>'


def group_label(group: Group) -> str:
    """A group with its colour and symbol in the figures."""
    return marked(str(group), mark_of(group).character, colour_of(group))


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

    def cell(self, row: Any) -> str:
        value = self.value(row)
        return "–" if value is None else self.shown(value)


def table(
    columns: Sequence[Column],
    rows: Sequence[Any],
    tall: bool = False,
    note: Callable[[Any], str] = lambda row: "",
) -> str:
    """A sortable table; a row's note is a line of its own below it."""
    heads, cells = "", [""] * len(rows)
    for column in columns:
        values = [column.value(row) for row in rows]
        numeric = any(isinstance(value, int | float) for value in values)
        css = ' class="number"' if numeric else ""
        heads += f'<th{css} scope="col"><button>{esc(column.head)}</button></th>'
        for i, value in enumerate(values):
            data = f' data-value="{"" if value is None else esc(value)}"' if numeric else ""
            cells[i] += f"<td{css}{data}>{column.cell(rows[i])}</td>"
    body = ""
    for row, cell in zip(rows, cells, strict=True):
        text = note(row)
        line = f'<tr class="remark"><td colspan="{len(columns)}"><span>{esc(text)}</span></td></tr>'
        body += f"<tbody><tr>{cell}</tr>{line * bool(text)}</tbody>"
    return (
        f'<div class="scroll{" tall" * tall}" tabindex="0"><table><thead><tr>{heads}</tr></thead>'
        f"{body}</table></div>"
    )


def table_section(
    title: str,
    about: str,
    columns: Sequence[Column],
    rows: Sequence[Any],
    above: str = "",
    tall: bool = False,
    num_fixed: int | None = None,
    note: Callable[[Any], str] = lambda row: "",
    with_filter: bool = False,
    folded: bool = False,
) -> str:
    """A section with a table, or nothing without rows.

    Of the columns after the first `num_fixed`, those that are the same in all rows become a
    sentence. `with_filter` adds a field for words that the shown rows must have.
    """
    if not rows:
        return ""
    kept, constant = list(columns[:num_fixed]), []
    for column in columns[len(kept) :]:
        cells = {column.cell(row) for row in rows} - {"–"}
        if len(cells) > 1:
            kept.append(column)
        elif cells:
            constant.append(f"{column.head} {html.unescape(cells.pop())}")
    if constant:
        about += f"The same for all: {', '.join(constant)}."
    made = table(kept, rows, tall, note)
    if with_filter:
        above += '<input class="filter" type="search" placeholder="filter: words of a row">'
    if folded:
        made = f"<details><summary>{num(rows, 'row')}</summary>{made}</details>"
    return section(title, about, above, made)


def place(name: str, figure: Figure, wide: bool = False) -> str:
    """A figure's place, in which page.js draws it; on a phone a wide one scrolls."""
    data = html.escape(json.dumps(figure, separators=(",", ":")), quote=False).replace("'", "&#39;")
    height = figure["layout"]["height"]
    return (
        f'<div class="scroll"><div id="{name}" class="figure{" wide" * wide}" '
        f"style=\"height:{height}px\" data-figure='{data}'></div></div>"
    )
