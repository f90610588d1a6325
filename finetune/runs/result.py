"""How a run ended: its result, or its failure."""

import json
import signal
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from finetune.system.errors import FinetuneError, Pruned, RunDirError, Stopped
from finetune.system.shutdown import PREEMPTION_SIGNAL

FORMAT_VERSION = 2
"""Of result.json. Version 1, which 0.1.0 wrote, doesn't name its version."""

METRICS = (
    *("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_macro_f1"),
    *("best_val_acc", "trainable_parameters", "images_per_second"),
)
"""The keys that W&B, metrics.csv and the report have once per epoch, besides `lr/PART`. Rows of
older versions lack `val_macro_f1`."""

RATE = "lr/"
"""Begins the key of a part's learning rate."""

Row = dict[str, float]
"""One epoch's metrics."""

_UNREADABLE = (OSError, ValueError, TypeError, RecursionError)
"""What reading a JSON object raises."""


class RunResult(BaseModel):
    """The result of a finished run. Accuracies are fractions.

    Fields with a default may be missing in older files; unknown fields of newer ones are kept.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    format_version: int = FORMAT_VERSION
    run_id: str
    strategy: str
    seed: int
    best_val_acc: float
    best_val_loss: float
    best_val_macro_f1: float | None = None
    """Of the best epoch; None if an older version trained it."""
    best_epoch: int
    last_val_acc: float
    epochs_run: int
    stopped_early: bool = False
    num_threads: int = 0
    device: str = ""
    """The GPU's name, or the accelerator's."""
    train_seconds: float = 0.0
    cache_seconds: float = 0.0
    images_per_second: float = 0.0
    trainable_parameters: int = 0
    """The most at any epoch."""
    start_epochs: dict[str, int] = Field(default_factory=dict)
    """The epoch at which each part starts to train; nothing from version 1."""
    solved_head: dict[str, Any] | None = None
    """`penalty` and `scale` with which the head was solved (`finetune.training.solve_head`)."""
    class_names: list[str] = Field(default_factory=list)
    num_train: int = 0
    num_val: int = 0
    unreadable: list[str] = Field(default_factory=list)
    dataset_fingerprint: str = ""
    split_fingerprint: str = ""
    weights_fingerprint: str | None = None
    refit_of: str | None = None
    """The run of whose setting this is a refit; `best_val_acc` is then that of the setting."""
    versions: dict[str, str] = Field(default_factory=dict)
    git_commit: str | None = None
    prefix_timings: dict[str, float] = Field(default_factory=dict)
    """Milliseconds per picture to compute and to read the frozen layers' outputs, by boundary."""
    config: dict[str, Any]

    _run_dir: Path | None = PrivateAttr(None)

    def __repr__(self) -> str:
        best = f"best_val_acc={self.best_val_acc:.4f} in epoch {self.best_epoch}"
        return f"RunResult({self.run_id}: {self.strategy}, {best}, {self.run_dir})"

    def _repr_html_(self) -> str:
        from finetune.runs.notebook import result_html
        from finetune.runs.run_dir import read_metrics

        return result_html(self, read_metrics(self.run_dir / "metrics.csv"))

    @property
    def run_dir(self) -> Path:
        """The directory that it was read from, or else that the run was written to."""
        return self._run_dir or Path(self.config.get("out", "runs")) / self.run_id

    @property
    def history(self) -> Any:
        """The metrics by epoch: pandas' DataFrame, or without pandas a list of dicts."""
        from finetune.runs.run_dir import read_metrics

        rows = read_metrics(self.run_dir / "metrics.csv")
        try:
            pandas: Any = import_module("pandas")
        except ImportError:
            return rows
        counts = dict.fromkeys(("epoch", "trainable_parameters"), "Int64")
        return pandas.DataFrame(rows).astype(counts).set_index("epoch")

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """The result of a run directory. Raises `RunDirError`."""
        try:
            content = json.loads((run_dir / "result.json").read_bytes())
            result = cls.model_validate({"format_version": 1, "run_id": run_dir.name, **content})
            result._run_dir = run_dir
            return result
        except FileNotFoundError:
            raise RunDirError(f"{run_dir} has no result.json: {_unfinished(run_dir)}") from None
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except _UNREADABLE as error:
            reason = str(error)
        raise RunDirError(f"{run_dir}/result.json can't be read: {reason}")

    def to_json(self) -> bytes:
        return json_bytes(self.model_dump(mode="json"))


def best_epoch(rows: Sequence[Row]) -> int:
    """The epoch with the highest validation accuracy, among equals the least validation loss."""
    return max(range(len(rows)), key=lambda i: (*epoch_rank(rows[i]), -i))


def epoch_rank(row: Row) -> tuple[float, float]:
    """The better an epoch, the higher."""
    return row["val_acc"], -row["val_loss"]


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8; what has no encoding, such as a file name of arbitrary bytes, is escaped."""
    return json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Failure:
    """How a run that did not finish ended, for failure.json and W&B."""

    state: str
    """failed, stopped, pruned, or preempted: a scheduler takes the machine and requeues the run."""
    reason: str
    exit_code: int


def failure_of(error: BaseException) -> Failure:
    """The failure that an exception means for the run that it ended."""
    match error:
        case Stopped():
            state = "preempted" if error.signum == PREEMPTION_SIGNAL else "stopped"
            return Failure(state, str(error), 128 + error.signum)
        case KeyboardInterrupt():
            return Failure("stopped", "interrupted", 128 + signal.SIGINT)
        case Pruned():
            return Failure("pruned", str(error), 0)
        case FinetuneError():
            return Failure("failed", str(error), error.exit_code)
        case _:
            reason = "".join(traceback.format_exception_only(error)).strip()
            return Failure("failed", reason, FinetuneError.exit_code)


def read_failure(path: Path) -> Mapping[str, Any] | None:
    """The content of a failure.json; None if there is none or it can't be read."""
    defaults = {"state": "failed", "reason": "no reason recorded", "epoch": None}
    try:
        return {**defaults, **json.loads(path.read_bytes())}
    except _UNREADABLE:
        return None


def _unfinished(run_dir: Path) -> str:
    if not (run_dir / "config.yaml").exists():
        return "it is not a run directory"
    if failure := read_failure(run_dir / "failure.json"):
        return f"the run {failure['state']}: {failure['reason']}"
    return f"the run has not finished; continue it with --resume {run_dir}"
