"""`freeze` on photographs from empty caches, beside the plain Lightning pipeline.

Both train the head for the same epochs on all of train/, with the same rate and batches, and
measure val/ after each epoch. The accuracy is the last epoch's, which nothing chose.

    python -m benchmarks.photographs_plain --data_dir data/mine --weights FILE
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import plain
from finetune.system.files import write_atomically
from finetune.training.train import train_and_finetune

RESULTS = Path(__file__).parent / "results" / "photographs_plain.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning_rate", type=float, default=0.003)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = vars(parser.parse_args())
    os.environ.setdefault("WANDB_MODE", "disabled")
    out = given.pop("out")
    found = {name: str(v) if name == "weights" else v for name, v in given.items()}
    found |= {"data_dir": given["data_dir"].name, "weights": given["weights"].name}
    found |= {"load_before": os.getloadavg()[0]}
    found |= {"ours": ours(**given)}
    found |= {"plain": theirs(**given), "load_after": os.getloadavg()[0]}
    found["ratio"] = found["plain"]["seconds"] / found["ours"]["seconds"]
    found["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(found, indent=1).encode())
    print(json.dumps(found, indent=1))


def ours(**fields: Any) -> dict[str, float]:
    """Seconds and the last epoch's accuracy of this project, with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"out": Path(folder) / "runs", "cache_dir": Path(folder) / "cache"}
        started = time.perf_counter()
        model: Any = train_and_finetune(
            strategy="freeze", val_fraction=0, patience=0, **places, **fields
        )
        seconds = time.perf_counter() - started
    result = model.result
    return {
        "seconds": seconds,
        "cache_seconds": result.cache_seconds,
        "train_seconds": result.train_seconds,
        "accuracy": result.last_val_acc,
    }


def theirs(**fields: Any) -> dict[str, float]:
    """The same of the plain pipeline."""
    run = plain.train("resnet18", strategy="freeze", **fields)
    return {"seconds": run.seconds, "accuracy": run.val_accuracies[-1]}


if __name__ == "__main__":
    main()
