"""Twelve checks of this project on the GPU of this machine, in about ten minutes.

Prints PASS, FAIL or SKIP as each check ends, and writes all results as JSON. Nothing is downloaded.

    python -m benchmarks.gpu_check --out DIR [--only 3 7] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_processes, gpu_training
from benchmarks.gpu_training import Failed, Setup, Skipped

CHECKS: dict[int, Callable[[Setup], Any]] = {
    1: gpu_processes.card_and_fork,
    3: gpu_training.normalise_and_flip,
    2: gpu_training.optimizer_under_overflow,
    7: gpu_training.no_synchronisation,
    5: gpu_training.equal_to_cpu,
    9: gpu_processes.out_of_memory,
    11: gpu_processes.predict_again,
    6: gpu_processes.stop_and_resume,
    10: gpu_training.constant_memory,
    4: gpu_training.strategies_and_caches,
    8: gpu_processes.sweep_with_a_killed_child,
    12: gpu_processes.speed,
}
"""By number, in the order in which they are made: the long ones last."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where gpu_check.json is written")
    parser.add_argument("--only", type=int, nargs="+", choices=sorted(CHECKS), help="these checks")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    os.environ["WANDB_MODE"] = "disabled"
    given.out.mkdir(parents=True, exist_ok=True)
    packages = {name: version(name) for name in ("torch", "torchvision", "pytorch-lightning")}
    report: dict[str, Any] = {"packages": packages, "checks": {}}
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(Path(folder), given.device)
        for number, check in CHECKS.items():
            if given.only is None or number in given.only:
                report["checks"][number] = carry_out(number, check, setup)
                content = json.dumps(report, indent=2, default=str)
                (given.out / "gpu_check.json").write_text(content)
    outcomes = [check["outcome"] for check in report["checks"].values()]
    counts = {outcome: outcomes.count(outcome) for outcome in ("PASS", "FAIL", "SKIP")}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["FAIL"] else 0


def carry_out(number: int, check: Callable[[Setup], Any], setup: Setup) -> dict[str, Any]:
    """The outcome of a check, which is printed; whatever a check raises is a FAIL of it alone."""
    started, found = time.perf_counter(), None
    what = f"{number:2} {check.__name__.replace('_', ' ')}"
    try:
        found = check(setup)
        outcome, words = "PASS", str(found)
    except Skipped as reason:
        outcome, words = "SKIP", str(reason)
    except Failed as error:
        outcome, words = "FAIL", str(error)
    except Exception as error:
        traceback.print_exc()
        outcome, words = "FAIL", f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - started
    print(f"{outcome} {what} ({seconds:.1f} s): {words}", flush=True)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return {"name": check.__name__, "outcome": outcome, "seconds": seconds, "found": found or words}


if __name__ == "__main__":
    sys.exit(main())
