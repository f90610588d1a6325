"""Names and messages as a terminal may show them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean ...?` for a misspelt name, or nothing where no choice is near."""
    near = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def one_line(name: object) -> str:
    """A name from outside as a terminal may show it: line breaks, control characters and bytes
    that are no text stand there as escapes."""
    return "".join(c if c.isprintable() else _escaped(c) for c in str(name))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def message(error: BaseException) -> str:
    """What an error says, its own line breaks kept, as a terminal may show it."""
    return "\n".join(map(one_line, str(error).split("\n")))
