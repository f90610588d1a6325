"""Names and messages as a terminal shows them."""

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean ...?` for a misspelt name, or nothing if no choice is similar."""
    near = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def listed(names: Sequence[str], at_most: int = 12) -> str:
    """`a, b and c`, or `a, b and 7 more`."""
    shown = list(names[:at_most])
    if len(names) > at_most:
        shown.append(f"{len(names) - at_most} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def one_line(name: object) -> str:
    """A name from outside on one line: line breaks, control characters and undecodable bytes are
    escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def message(error: BaseException) -> str:
    """An error's message with its own line breaks; other unprintable characters are escaped."""
    return "\n".join(map(one_line, str(error).split("\n")))


def brief(value: object) -> str:
    """A value from outside as a message shows it."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."
