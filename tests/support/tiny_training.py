"""A stand-in for training in a sweep's fork server: real processes that do little, and may die.

What a run leaves is there as usual. One in ten dies, in one of several ways, at one of several
moments, after a line in CRASHES.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.runs.run_dir import RunDir, read_metrics
from tests.support import synthetic

CRASHES = "crashes.txt"


def run(config: Any, run_dir: RunDir, on_epoch: Any) -> None:
    rng = random.Random(f"{run_dir.path.name} {len(crashes_of(run_dir.path))}")
    moment = rng.choice(["first", "claimed", "epoch", "ended"]) if rng.random() < 0.1 else None
    how = rng.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, None])

    def perhaps_die(now: str) -> None:
        if now != moment:
            return
        with (run_dir.path.parent / CRASHES).open("a") as file:
            file.write(f"{run_dir.path.name}\n")
        if how is None:
            os._exit(3)
        signal.signal(how, signal.SIG_DFL) if how != signal.SIGKILL else None
        os.kill(os.getpid(), how)

    perhaps_die("first")
    run_dir.claim(config)
    perhaps_die("claimed")
    shutil.rmtree(run_dir.path / "made", ignore_errors=True)
    place = synthetic.write_run(
        run_dir.path, "made", num_val=20, seed=config.seed, epochs=2, best_epoch=1
    )
    for row in read_metrics(place / "metrics.csv"):
        on_epoch(row)
        perhaps_die("epoch")
    for path in sorted(place.iterdir(), key=lambda path: path.name == "result.json"):
        path.replace(run_dir.path / path.name)
    place.rmdir()
    perhaps_die("ended")
    run_dir.release()


def crashes_of(run_dir: Path) -> list[str]:
    ledger = run_dir.parent / CRASHES
    names = ledger.read_text().splitlines() if ledger.exists() else []
    return [name for name in names if name == run_dir.name]


def stand_in() -> None:
    """Take the place of what a worker would import."""
    torch, train = ModuleType("torch"), ModuleType("finetune.training.train")
    torch.get_num_threads = lambda: 1  # type: ignore[attr-defined]
    torch.set_num_threads = lambda count: None  # type: ignore[attr-defined]
    train.run = run  # type: ignore[attr-defined]
    sys.modules |= {"torch": torch, "finetune.training.train": train}
