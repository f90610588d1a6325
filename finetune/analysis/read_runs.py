"""What came of each run in a folder, ended well or not.

Turns a folder of run directories into outcomes: a result or a failure, the epochs, and which
validation pictures were right. Knows nothing about what they mean together.

    >>> outcomes = read_runs(Path("runs"))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.analysis.statistics import Correct
from finetune.config.fields import RunConfig
from finetune.runs.result import Row, RunResult, read_failure
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.system.errors import FinetuneError, RunDirError
from finetune.system.files import walk


@dataclass(frozen=True)
class RunRecord:
    """One run directory's content, as far as it goes."""

    run_dir: Path
    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    state: str
    """`finished`, the failure's state, or `unfinished` where neither file is."""
    reason: str = ""
    result: RunResult | None = None
    correct: Correct | None = None
    labels: np.ndarray[Any, np.dtype[np.int64]] | None = None

    @property
    def run_id(self) -> str:
        return self.run_dir.name

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.run_id)

    @property
    def strategy(self) -> str:
        return str(self.config.get("strategy"))

    @property
    def diverged(self) -> bool:
        return self.state == "failed" and "diverged" in self.reason


def read_runs(runs_dir: Path) -> list[RunRecord]:
    """Every run directory in or below `runs_dir`, in the order of their paths.

    Raises `RunDirError` where there is none. A directory whose files can't be read is an outcome
    of the state `unreadable`.
    """
    if not runs_dir.is_dir():
        raise RunDirError(f"{runs_dir} does not exist; pass the folder that runs went into (--out)")
    outcomes = [_read(place) for place in _run_dirs(runs_dir)]
    if not outcomes:
        raise RunDirError(
            f"{runs_dir} holds no run directories (folders with a config.yaml, at any depth); "
            "pass the folder that runs went into (--out)"
        )
    return outcomes


def _run_dirs(folder: Path) -> Iterator[Path]:
    try:
        for place, folders, files in walk(folder):
            if "config.yaml" in files:
                folders.clear()
                yield place
    except OSError as error:
        raise RunDirError(f"{error.filename} can't be read: {error.strerror}") from None


def _read(place: Path) -> RunRecord:
    run_dir = RunDir(place)
    try:
        if run_dir.finished:
            return _finished(run_dir)
        config = run_dir.read_config().to_fields()
        rows = tuple(read_metrics(run_dir.metrics_path))
    except (FinetuneError, OSError) as error:
        return RunRecord(place, {}, (), "unreadable", str(error))
    failure = read_failure(run_dir.failure_path)
    if failure is None:
        reason = f"still running, or ended without a word; go on by --resume {place}"
        return RunRecord(place, config, rows, "unfinished", reason)
    return RunRecord(place, config, rows, str(failure.get("state")), str(failure.get("reason")))


def _finished(run_dir: RunDir) -> RunRecord:
    result = RunResult.load(run_dir.path)
    known = {k: v for k, v in result.config.items() if k in RunConfig.model_fields}
    RunConfig.from_fields(known)  # raises for values that no run can have had
    rows = tuple(read_metrics(run_dir.metrics_path))
    correct = labels = None
    if run_dir.predictions_path.exists():
        logits, labels, _ = run_dir.read_predictions()
        correct = logits.argmax(axis=1) == labels
    return RunRecord(
        run_dir.path,
        result.config,
        rows,
        "finished",
        result=result,
        correct=correct,
        labels=labels,
    )
