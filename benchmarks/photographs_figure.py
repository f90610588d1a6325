"""The figure of `python -m benchmarks.photographs`."""
from pathlib import Path
from typing import Any


def write_figure(cells: list[Any], path: Path) -> None:
    raise NotImplementedError
