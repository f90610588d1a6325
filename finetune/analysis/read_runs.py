"""Reads the runs in a folder, finished or not."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from finetune.analysis.statistics import Correct
from finetune.config.fields import RunConfig
from finetune.runs.predictions import confusion_counts, macro_f1
from finetune.runs.result import RATE, Row, RunResult, read_failure
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.runs.settings import UNGROUPED, Group, groups_of, setting_of
from finetune.sweep.worker import OUTPUT_NAME
from finetune.system.errors import FinetuneError, RunDirError
from finetune.system.files import walk
from finetune.system.text import num


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The content of a run directory, as far as it exists."""

    run_dir: Path
    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    state: str
    """`finished`, the failure's state, `unfinished` if there is neither, or `unreadable`."""
    reason: str = ""
    result: RunResult | None = None
    start_epochs: Mapping[str, int] = field(default_factory=dict)
    """The epoch at which each part started to train."""
    labels: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.empty(0, int))
    """The classes of the validation pictures; empty without predictions.npz, and for a run that
    neither finished nor was pruned."""
    correct: Correct = field(default_factory=lambda: np.empty(0, bool))
    """Whether each validation picture was classified correctly at the best epoch."""
    group: Group = UNGROUPED
    """That of the run among those that were read with it."""

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
    def parts(self) -> tuple[str, ...]:
        """The parts of the network, from input to output; nothing before the first epoch's end."""
        rates = [name for row in self.rows[:1] for name in row if name.startswith(RATE)]
        return tuple(name.removeprefix(RATE) for name in rates)

    @property
    def diverged(self) -> bool:
        return self.state == "failed" and "diverged" in self.reason

    @property
    def finished_result(self) -> RunResult:
        assert self.result is not None
        return self.result

    @property
    def accuracy(self) -> float:
        """The best validation accuracy, also of a run that did not finish."""
        if self.result is None:
            return max(self.metric("val_acc").values(), default=float("nan"))
        return self.result.best_val_acc

    @property
    def macro_f1(self) -> float:
        """That of the best epoch; nan if an older version trained it and left no predictions."""
        found = self.finished_result.best_val_macro_f1
        return float("nan") if found is None else found

    @cached_property
    def setting(self) -> str:
        """A key that finished runs share if they differ only in seed, name and machine."""
        return setting_of(self.config, self.finished_result.weights_fingerprint)

    def metric(self, name: str) -> dict[float, float]:
        """The recorded values of a metric by epoch."""
        return {row["epoch"]: row[name] for row in self.rows if not np.isnan(row[name])}


def read_runs(runs_dir: Path) -> list[RunRecord]:
    """Every run in or below `runs_dir`, in the order of their paths.

    A run whose files can't be read has the state `unreadable`. Raises `RunDirError` if there are
    no runs.
    """
    if not runs_dir.is_dir():
        raise RunDirError(f"{runs_dir} does not exist; pass the folder of the runs (--out)")
    runs, without_config = [], []
    try:
        for folder, subfolders, files in walk(runs_dir):
            if "config.yaml" in files:
                subfolders.clear()
                runs.append(_read(RunDir(folder)))
            elif OUTPUT_NAME in files:
                without_config.append(folder / OUTPUT_NAME)
    except OSError as error:
        raise RunDirError(f"{error.filename} can't be read: {error.strerror}") from None
    if not runs and without_config:
        failed = num(without_config, "trial")
        raise RunDirError(
            f"{runs_dir} has no runs to report on: {failed} failed before the first epoch; the "
            f"reason is in {min(without_config)}"
        )
    if not runs:
        raise RunDirError(
            f"{runs_dir} holds no run directories (folders with a config.yaml, at any depth); "
            "pass the folder of the runs (--out)"
        )
    readable = [run for run in runs if run.config]
    groups = dict(zip(readable, groups_of([run.config for run in readable]), strict=True))
    return [replace(run, group=groups.get(run, run.group)) for run in runs]


def _read(run_dir: RunDir) -> RunRecord:
    path = run_dir.path
    try:
        if run_dir.finished:
            return _read_finished(run_dir)
        config = run_dir.read_config().to_fields()
        rows = tuple(read_metrics(run_dir.metrics_path))
    except (FinetuneError, OSError) as error:
        return RunRecord(path, {}, (), "unreadable", str(error))
    failure = read_failure(run_dir.failure_path) or {
        "state": "unfinished",
        "reason": f"still running, or killed; continue it with --resume {path}",
    }
    run = RunRecord(path, config, rows, str(failure["state"]), str(failure["reason"]))
    return replace(run, **_predictions(run_dir)) if run.state == "pruned" else run


def _predictions(run_dir: RunDir) -> dict[str, Any]:
    """The labels of a pruned run, and what it got right; nothing if that can't be read."""
    try:
        logits, labels, _ = run_dir.read_predictions()
    except (FinetuneError, OSError):
        return {}
    return {"labels": labels, "correct": logits.argmax(axis=1) == labels}


def _read_finished(run_dir: RunDir) -> RunRecord:
    result = RunResult.load(run_dir.path)
    known = {k: v for k, v in result.config.items() if k in RunConfig.model_fields}
    if "model" in known:  # it may be registered elsewhere only
        known = {k: v for k, v in known.items() if k not in ("model", "unfreeze_from")}
    config = RunConfig.from_fields(known)  # raises for values that are not allowed
    predictions: dict[str, Any] = {}
    if run_dir.predictions_path.exists():
        logits, labels, _ = run_dir.read_predictions()
        guesses = logits.argmax(axis=1)
        predictions = {"labels": labels, "correct": guesses == labels}
        if result.best_val_macro_f1 is None and len(labels):  # an older version trained it
            counts = confusion_counts(labels, guesses, logits.shape[1])
            result = result.model_copy(update={"best_val_macro_f1": macro_f1(counts)})
    return RunRecord(
        run_dir.path,
        config.to_fields() | result.config,
        tuple(read_metrics(run_dir.metrics_path)),
        "finished",
        result=result,
        # version 0.1.0 didn't record them
        start_epochs=result.start_epochs or config.plan.start_epochs,
        **predictions,
    )
