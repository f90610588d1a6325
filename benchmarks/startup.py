"""From process start to the first training step: seconds, beside importing the libraries alone.

python -m benchmarks.startup
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from finetune.datasets.digits import write_digits
from finetune.model.network import build

IMPORTS = "import torch, torchvision, pytorch_lightning, wandb"

FIRST_STEP = """
import os, sys
import agent, finetune.module
def first_step(*given):
    os._exit(0)
finetune.module.FineTuning.training_step = first_step
agent.main()
"""


def seconds(code: str, *flags: str, mode: str = "disabled") -> float:
    """Wall time of a process that runs this code."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code, *flags],
        check=True,
        env=os.environ | {"WANDB_MODE": mode},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_digits(place / "digits", range(5, 10), 4, 3)
        torch.save(build(5, 0).state_dict(), place / "weights.pth")
        flags = [
            *(f"--data_dir={place / 'digits'}", f"--weights={place / 'weights.pth'}"),
            *(f"--out={place / 'runs'}", f"--cache_dir={place / 'cache'}"),
            *("--val_fraction=0", "--image_size=64"),
        ]
        rows = {
            "imports": lambda: seconds(IMPORTS),
            "first step, W&B disabled": lambda: seconds(FIRST_STEP, *flags),
            "first step, W&B offline": lambda: seconds(FIRST_STEP, *flags, mode="offline"),
        }
        found: dict[str, list[float]] = {what: [] for what in rows}
        for _ in range(times):
            for what, measured in rows.items():
                found[what].append(measured())
    for what, values in found.items():
        print(f"{what:28} {median(values):6.2f} s  ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
