"""A run's outcome and its directory on disk.

Turns a finished run into one `RunResult`, and a directory into the files that a run leaves there.
Knows nothing about torch: checkpoints are paths here.

    >>> RunResult.load(Path("runs/k3x9q2ab")).best_val_acc  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from finetune.config.strategies import PARTS
from finetune.system.errors import RunDirError

METRICS = (
    "epoch",
    "train_loss",
    "train_acc",
    "val_loss",
    "val_acc",
    "best_val_acc",
    "trainable_parameters",
    "images_per_second",
    *(f"lr/{part}" for part in PARTS),
)
"""The keys that W&B, metrics.csv and the report have once an epoch."""

Array = Any
"""NumPy's; this room imports it where predictions are read."""

Row = dict[str, float]
"""One epoch's metrics."""


class RunResult(BaseModel):
    """What a run that ended well is remembered by. Accuracies are fractions."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    run_id: str
    strategy: str
    seed: int
    best_val_acc: float
    best_val_loss: float
    best_epoch: int
    last_val_acc: float
    epochs_run: int
    stopped_early: bool
    num_threads: int
    train_seconds: float
    cache_seconds: float
    images_per_second: float
    trainable_parameters: int
    class_names: list[str]
    num_train: int
    num_val: int
    unreadable: list[str]
    dataset_fingerprint: str
    split_fingerprint: str
    weights_fingerprint: str | None
    versions: dict[str, str]
    git_commit: str | None
    prefix_timings: dict[str, float]
    """Milliseconds a picture, by boundary: the frozen layers recomputed, and read."""
    config: dict[str, Any]

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """The result of a run directory. Raises `RunDirError`."""
        try:
            return cls.model_validate(json.loads((run_dir / "result.json").read_bytes()))
        except FileNotFoundError:
            raise RunDirError(f"{run_dir} has no result.json: {_unfinished(run_dir)}") from None
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (OSError, ValueError, RecursionError) as error:
            reason = str(error)
        raise RunDirError(f"{run_dir}/result.json can't be read: {reason}")

    def to_json(self) -> bytes:
        return json_bytes(self.model_dump(mode="json"))


def best_epoch(rows: Sequence[Row]) -> int:
    """The first epoch with the highest validation accuracy."""
    return max(range(len(rows)), key=lambda epoch: rows[epoch]["val_acc"])


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """What no encoding has, such as a name of odd bytes, stands there as JSON's own escape."""
    return json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace")


def read_failure(path: Path) -> Mapping[str, Any] | None:
    """A failure.json, or None where there is none that can be read."""
    try:
        failure = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return failure if isinstance(failure, dict) else None


def _unfinished(run_dir: Path) -> str:
    if not (run_dir / "config.yaml").exists():
        return "it is no run directory"
    if failure := read_failure(run_dir / "failure.json"):
        return f"the run {failure.get('state')}: {failure.get('reason')}"
    return f"the run has not ended; go on with it by --resume {run_dir}"
