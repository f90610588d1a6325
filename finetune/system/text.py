"""Names and messages as a terminal shows them."""

import difflib
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


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


def num(things: Sequence[object] | int, what: str, plural: str = "") -> str:
    """`1 picture`, `2 pictures`."""
    count = things if isinstance(things, int) else len(things)
    return f"{count} {what if count == 1 else plural or f'{what}s'}"


def command_line(*words: object) -> str:
    """A command to copy into a shell, `python WORDS...`; paths below here are relative."""
    return shlex.join(["python", *(str(_shortened(word)) for word in words)])


def this_command() -> str:
    """The command line of this process, `python -m finetune ...`."""
    return command_line("-m", "finetune", *sys.argv[1:])


def _shortened(word: object) -> object:
    if isinstance(word, Path) and word.is_relative_to(Path.cwd()):
        return word.relative_to(Path.cwd())
    return word


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
