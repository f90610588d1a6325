"""Seconds of single commands: start-up, `predict`, `report` of 1,000 runs, `check`."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.pipelines import Bench
from tests.support.synthetic import write_run

NUM_RUNS, NUM_CHECKED, NUM_PREDICTED = 1000, 2000, 200

FIRST_STEP = """
import os
import agent, finetune.training.module
def first_step(*given):
    os._exit(0)
finetune.training.module.FineTuning.training_step = first_step
agent.main()
"""


def commands(folder: Path, num_repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of each command: the median, the least and the most of several calls."""
    bench = Bench(folder, 64)
    data_dir = bench.pictures(160, 40, (128, 96))
    pictures = sorted(str(path) for path in data_dir.rglob("*.jpg"))[:NUM_PREDICTED]
    result = bench.ours("freeze", data_dir, 1)
    predict = ["-m", "finetune", "predict", str(folder / "runs" / result.run_id)]
    first_step = [
        *("-c", FIRST_STEP, f"--data_dir={data_dir}", f"--weights={bench.weights}"),
        *(f"--out={folder / 'started'}", f"--cache_dir={folder / 'cache'}"),
        *("--val_fraction=0", "--image_size=64"),
    ]
    _write_runs(folder / "many")
    checked = bench.pictures(NUM_CHECKED * 4 // 5, NUM_CHECKED // 5, (128, 96))
    calls: dict[str, Callable[[], float]] = {
        "agent.py --help": lambda: seconds("agent.py", "--help"),
        "config error": lambda: seconds("agent.py", "--epochs=0", exit_code=2),
        "import torch, torchvision": lambda: seconds("-c", "import torch, torchvision"),
        "import these, Lightning, wandb": lambda: seconds(
            "-c", "import torch, torchvision, pytorch_lightning, wandb"
        ),
        "first training step": lambda: seconds(*first_step),
        "first training step, W&B offline": lambda: seconds(*first_step, mode="offline"),
        "predict 1 picture": lambda: seconds(*predict, pictures[0]),
        f"predict {len(pictures)} pictures": lambda: seconds(*predict, *pictures),
        f"report of {NUM_RUNS} runs": lambda: seconds(
            "-m", "finetune", "report", str(folder / "many")
        ),
        f"check of {NUM_CHECKED} pictures": lambda: seconds(
            "-m", "finetune", "check", f"--data_dir={checked}"
        ),
    }
    taken: dict[str, list[float]] = {what: [] for what in calls}
    for _ in range(num_repeats):
        for what, call in calls.items():
            taken[what].append(call())
    figures: dict[str, dict[str, Any]] = {
        what: {"seconds": median(times), "min": min(times), "max": max(times)}
        for what, times in taken.items()
    }
    for what, found in figures.items():
        if "pictures" in what:
            num_pictures = int(what.split()[-2])
            found["pictures_per_second"] = num_pictures / found["seconds"]
        if "report" in what:
            found["page_mb"] = (folder / "many" / "report.html").stat().st_size / 1e6
    return figures


def seconds(*arguments: str, mode: str = "disabled", exit_code: int = 0) -> float:
    """Wall time of a Python process with these arguments."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"WANDB_MODE": mode},
        capture_output=True,
        text=True,
        check=False,
    )
    taken = time.perf_counter() - started
    if done.returncode != exit_code:
        raise RuntimeError(f"{arguments} ended with {done.returncode}: {done.stderr[-2000:]}")
    return taken


def _write_runs(runs_dir: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        for i in range(NUM_RUNS):
            write_run(
                runs_dir,
                f"run{i:04}",
                0.6 + 0.0002 * i,
                strategy=("freeze", "partial", "gradual", "scratch")[i % 4],
                learning_rate=0.001 * (1 + i % 17),
                num_val=2000,
            )


def commands_table(figures: dict[str, dict[str, Any]]) -> Table:
    """One row per command."""
    table = Table(box=None, pad_edge=False)
    for head in ("command", "seconds", "min to max", "pictures/s", "page MB"):
        table.add_column(head, justify="left" if head == "command" else "right")
    for what, found in figures.items():
        rate, size = found.get("pictures_per_second"), found.get("page_mb")
        table.add_row(
            what,
            f"{found['seconds']:.2f}",
            f"{found['min']:.2f} to {found['max']:.2f}",
            "" if rate is None else f"{rate:.0f}",
            "" if size is None else f"{size:.1f}",
        )
    return table
