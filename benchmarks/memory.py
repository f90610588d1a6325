"""What a call takes of memory: the most anonymous bytes of a process of its own.

Turns a call into a number. The page cache, through which stores are read, is apart: the system
takes it back whenever somebody needs it.

    >>> peak_bytes(sorted, [2, 1])  # doctest: +SKIP
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LOOK_SECONDS = 0.05


def peak_bytes(call: Callable[..., Any], *arguments: Any) -> int:
    """Carry out a call in a child, and look often at what it and its own children hold."""
    process = multiprocessing.get_context("spawn").Process(target=call, args=arguments)
    process.start()
    assert process.pid is not None
    peak = 0
    while process.is_alive():
        peak = max(peak, _anonymous_bytes(process.pid))
        process.join(LOOK_SECONDS)
    if process.exitcode:
        raise RuntimeError(f"the measured call ended with {process.exitcode}")
    return peak


def _anonymous_bytes(pid: int) -> int:
    """Of a process and all below it. Linux alone tells."""
    place = Path("/proc", str(pid))
    with suppress(OSError):  # it has ended meanwhile
        found = re.search(r"RssAnon:\s+(\d+) kB", (place / "status").read_text())
        children = " ".join(p.read_text() for p in place.glob("task/*/children")).split()
        own = 1024 * int(found[1]) if found else 0
        return own + sum(_anonymous_bytes(int(child)) for child in children)
    return 0
