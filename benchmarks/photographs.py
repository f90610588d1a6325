"""Which way to fine-tune on photographs, by the number of training pictures of each class.

For each size, strategies are searched, confirmed with fresh seeds and tested once on val/, with
`finetune.sweep`, `confirm` and `evaluate`. Each strategy's record is added to the JSON file as soon
as it is known; what the file has is not computed again, and an interrupted call can be repeated.

    python -m benchmarks.photographs --data_dir data/mine --weights imagenet [--sizes 10 30 100 all]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.photographs_cell import APPROACHES, draw, measure
from benchmarks.photographs_figure import write_figure
from benchmarks.photographs_table import by_size, details
from finetune.system.files import write_atomically

RESULTS = Path(__file__).parent / "results" / "photographs.json"

Cell = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    if given.data_dir:
        os.environ.setdefault("WANDB_MODE", "disabled")
        for size in given.sizes:
            run_cell(given, size)
    cells = read_cells(given.out)
    for data, model in dict.fromkeys((cell["data"], cell["model"]) for cell in cells):
        print(f"\n{data}, {model}\n\n{by_size(cells, data, model)}")
    for cell in cells:
        print(f"\n{cell['data']}, {cell['model']}, {cell['size']} a class\n\n{details(cell)}")
    if given.figure:
        write_figure(cells, given.figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--data_dir", type=Path, help="has train/CLASS/* and val/CLASS/*; without "
                        "it the table of --out is printed")  # fmt: skip
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--sizes", nargs="+", default=["10", "30", "100", "all"])
    parser.add_argument("--strategies", nargs="+", default=[*APPROACHES], choices=APPROACHES)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/photographs"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, help="a .png, drawn by Chromium")
    return parser


def run_cell(given: argparse.Namespace, size: str) -> None:
    """Measure what the file lacks of this data set, network, size and these strategies."""
    data, count = given.data_dir.resolve().name, None if size == "all" else int(size)
    about = {"data": data, "model": given.model, "size": size, "image_size": given.image_size}
    folder = given.runs / "-".join(str(v).replace(":", "-") for v in about.values())
    data_dir, num_train = draw(given.data_dir, count, given.runs / f"data-{data}-{size}")
    fields = {
        "data_dir": data_dir,
        "weights": given.weights,
        "model": given.model,
        "image_size": given.image_size,
        "cache_dir": given.runs / "cache",
    }
    for name in given.strategies:
        if name in _cell(read_cells(given.out), about)["strategies"]:
            continue
        print(f"{data}, {given.model}, {size} a class: {name}", flush=True)
        load = os.getloadavg()[0]
        resumed = (folder / name).exists()
        record = measure(APPROACHES[name], num_train, fields, folder / name, given.workers)
        record |= {
            "workers": given.workers,
            "load_before": load,
            "load_after": os.getloadavg()[0],
            "resumed": resumed,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        cells = read_cells(given.out)  # another process may have added to it
        _cell(cells, about)["strategies"][name] = record
        write_cells(given.out, cells)


def read_cells(path: Path) -> list[Cell]:
    return json.loads(path.read_text()) if path.exists() else []


def write_cells(path: Path, cells: list[Cell]) -> None:
    cells.sort(key=lambda cell: (cell["data"], cell["model"], cell["size"].zfill(9)))  # all: last
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(cells, indent=1).encode())


def _cell(cells: list[Cell], about: Mapping[str, Any]) -> Cell:
    """The cell of this data set, network and size; added to the cells if it is new."""
    for cell in cells:
        if about.items() <= cell.items():
            return cell
    cells.append({**about, "strategies": {}})
    return cells[-1]


if __name__ == "__main__":
    main()
