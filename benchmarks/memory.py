"""Peak memory of a call, measured in a process of its own.

Counts anonymous memory only. The page cache, through which stores are read, is left out: the system
reclaims it when memory is needed.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05


def peak_bytes(call: Callable[..., Any], *arguments: Any) -> int:
    """Run a call in a child process and return the most memory that it and its children had."""
    process = multiprocessing.get_context("spawn").Process(target=call, args=arguments)
    process.start()
    assert process.pid is not None
    peak = 0
    while process.is_alive():
        peak = max(peak, _anonymous_bytes(process.pid))
        process.join(POLL_SECONDS)
    if process.exitcode:
        raise RuntimeError(f"the measured call ended with exit code {process.exitcode}")
    return peak


def _anonymous_bytes(pid: int) -> int:
    """Of a process and all its descendants. Linux only."""
    path = Path("/proc", str(pid))
    with suppress(OSError):  # it has ended meanwhile
        found = re.search(r"RssAnon:\s+(\d+) kB", (path / "status").read_text())
        children = " ".join(p.read_text() for p in path.glob("task/*/children")).split()
        own = 1024 * int(found[1]) if found else 0
        return own + sum(_anonymous_bytes(int(child)) for child in children)
    return 0
