"""A run's directory: the files that a run leaves, written atomically and checked when read."""

import csv
import errno
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock, Timeout

from finetune.config.backbones import DEFAULT_MODEL, known_backbone
from finetune.config.fields import RunConfig
from finetune.config.given_values import read_mapping
from finetune.runs.predictions import Array, mean_over_classes
from finetune.runs.result import METRICS, RATE, Row, RunResult, json_bytes
from finetune.system.errors import ConfigError, RunDirError
from finetune.system.files import write_atomically

_EVALUATION: Mapping[str, Any] = {
    "pictures_fingerprint": "",
    "model_fingerprint": "",
    "accuracy_interval": [0.0, 1.0],
    "per_class": [],
    "class_names": [],
    "classes_without_pictures": [],
    "confusion": [],
    "most_confused_pairs": [],
    "unreadable": [],
    "recorded_at": "at an unknown time",
}
"""Defaults of what an evaluation may lack."""


class RunDir:
    """The directory of one run; only the process that has claimed it writes there."""

    def __init__(self, path: Path, wait_seconds: float = 0) -> None:
        """`wait_seconds`: how long `claim` waits for another process to release the directory."""
        self.path = path
        self.config_path = path / "config.yaml"
        self.metrics_path = path / "metrics.csv"
        self.best_path = path / "best.ckpt"
        self.last_path = path / "last.ckpt"
        self.predictions_path = path / "predictions.npz"
        self.result_path = path / "result.json"
        self.failure_path = path / "failure.json"
        self.evaluation_path = path / "evaluation.json"
        self._lock = FileLock(path / ".lock", timeout=wait_seconds)

    @property
    def finished(self) -> bool:
        return self.result_path.exists()

    def read_config(self, allow_unknown: bool = True) -> RunConfig:
        """The config that the run was started with. Raises `RunDirError`.

        Fields of a newer version are left out, or refused unless `allow_unknown`: a run that is
        resumed without them could change.
        """
        if not self.config_path.exists():
            raise RunDirError(f"{self.path} is not a run directory: it has no config.yaml")
        try:
            fields = read_mapping(self.config_path)
            # `name` is written last, and a newline after it.
            if "name" not in fields or not self.config_path.read_bytes().endswith(b"\n"):
                raise ConfigError("its end is missing")
            known = {k: v for k, v in fields.items() if k in RunConfig.model_fields}
            self._check_network(str(known.get("model", DEFAULT_MODEL)))
            config = RunConfig.from_fields(known)
        except ConfigError as error:
            raise RunDirError(f"{self.config_path} is damaged: {error}") from None
        unknown = ", ".join(sorted(fields.keys() - known.keys()))
        if unknown and not allow_unknown:
            raise RunDirError(
                f"{self.config_path} has fields that this version doesn't know: {unknown}; resume "
                "the run with the version that wrote it"
            )
        return config

    def _check_network(self, name: str) -> None:
        """Raises `RunDirError` for a network that is not known here, which is no damage."""
        try:
            known_backbone(name)
        except ConfigError as error:
            raise RunDirError(f"{self.config_path}: {error}") from None

    def claim(self, config: RunConfig) -> None:
        """Create or reopen the directory and lock it for this process until `release`.

        An unfinished run is continued; a finished one too if `config` has more epochs. With a
        last.ckpt nothing is changed before `resume`. Raises `RunDirError` if another process holds
        the directory, the run is finished, or the directory can't be written, and `OSError` if no
        file handles are left.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            if self.finished:
                self._check_more_epochs(config)
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink()
            if not self.last_path.exists():
                self.write_config(config)
        except Timeout:
            raise RunDirError(f"{self.path} is in use by another process") from None
        except (OSError, RunDirError) as error:
            self.release()
            if isinstance(error, RunDirError) or error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # without file handles, another --out would not help
            raise RunDirError(
                f"out: {self.path} can't be written: {error.strerror or error}; pass another --out"
            ) from None

    def resume(self, config: RunConfig) -> None:
        """Record the config of a resumed run, and make a finished one unfinished, for more epochs.

        Only once last.ckpt is found to fit `config`: a refused resume changes nothing.
        """
        if self.finished:
            epochs = _num_epochs(RunResult.load(self.path))
            self.result_path.replace(self.path / f"result.{epochs}-epochs.json")
        self.write_config(config)

    def _check_more_epochs(self, config: RunConfig) -> None:
        result, reason = RunResult.load(self.path), ""
        if not self.last_path.exists():
            reason = (
                "is finished; start a new run. More epochs would need its last.ckpt, which is kept "
                "only if a run is started with --keep_last"
            )
        elif config.num_epochs <= _num_epochs(result):
            reason = "is finished; resume it with a larger --epochs, or start a new run"
        elif result.stopped_early:
            reason = "stopped early by its patience; more epochs would not change that"
        if reason:
            raise RunDirError(f"{self.path} {reason}")

    def release(self) -> None:
        self._lock.release()

    def write_config(self, config: RunConfig) -> None:
        text = yaml.safe_dump(config.to_fields(), sort_keys=False, allow_unicode=True)
        write_atomically(self.config_path, text.encode())

    def write_metrics(self, rows: Iterable[Row]) -> None:
        text, rows = io.StringIO(newline=""), list(rows)
        names = dict.fromkeys([*METRICS, *(name for row in rows for name in row)])
        writer = csv.DictWriter(text, names, restval=math.nan)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.metrics_path, text.getvalue().encode())

    def write_result(self, result: RunResult) -> None:
        """Write the result, after everything else: its existence means that the run finished."""
        write_atomically(self.result_path, result.to_json())
        self.failure_path.unlink(missing_ok=True)

    def write_failure(self, state: str, reason: str, epoch: int | None) -> None:
        failure = {"state": state, "reason": reason, "epoch": epoch}
        write_atomically(self.failure_path, json.dumps(failure, indent=2).encode())

    def read_evaluations(self) -> list[dict[str, Any]]:
        """What `evaluate` has recorded, the oldest first, with defaults for what older versions
        didn't record. Raises `RunDirError`."""
        try:
            records = json.loads(self.evaluation_path.read_bytes())["evaluations"]
            for record in records:
                if missing := {"folder", "accuracy", "num_pictures"} - record.keys():
                    raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            return [{**_EVALUATION, "macro_f1": _macro_f1(record), **record} for record in records]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunDirError(
                f"{self.evaluation_path} can't be read: {error}; remove it to evaluate again"
            ) from None

    def write_evaluations(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Raises `RunDirError`."""
        try:
            write_atomically(self.evaluation_path, json_bytes({"evaluations": records}))
        except OSError as error:
            reason = error.strerror or error
            raise RunDirError(f"{self.evaluation_path} can't be written: {reason}") from None

    def write_predictions(self, logits: Array, labels: Array, paths: Sequence[Path]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, logits=logits, labels=labels, paths=np.array([*map(str, paths)]))
        write_atomically(self.predictions_path, buffer.getvalue())

    def move_predictions(self, paths: Sequence[Path]) -> None:
        """Write predictions.npz with the pictures' new paths, if they have moved."""
        logits, labels, recorded = self.read_predictions()
        if len(paths) == len(recorded) and [*map(str, paths)] != recorded.tolist():
            self.write_predictions(logits, labels, paths)

    def read_predictions(self) -> tuple[Array, Array, Array]:
        """The best epoch's logits, (N, K), labels and paths, (N,). Raises `RunDirError`."""
        try:
            # np.load itself would leave a damaged file open
            with self.predictions_path.open("rb") as file, np.load(file) as predictions:
                logits, labels, paths = (predictions[k] for k in ("logits", "labels", "paths"))
            if not (
                (logits.ndim, logits.dtype.kind, labels.dtype.kind) == (2, "f", "i")
                and labels.shape == paths.shape == logits.shape[:1]
                and np.isfinite(logits).all()
                and 0 <= labels.min(initial=0) <= labels.max(initial=0) < logits.shape[1]
            ):
                raise ValueError("its arrays don't match")
        except Exception as error:  # zipfile, zlib and NumPy raise errors of many types
            reason = str(error) or type(error).__name__
            raise RunDirError(f"{self.predictions_path} is damaged: {reason}") from None
        return logits, labels, paths


def _macro_f1(record: Mapping[str, Any]) -> float | None:
    """Of an evaluation that recorded only the F1 of each class, or not even that."""
    return mean_over_classes([figures.get("f1") for figures in record.get("per_class", [])])[0]


def _num_epochs(result: RunResult) -> int:
    """The `epochs` that a finished run had."""
    return int(result.config.get("epochs") or result.epochs_run)


def read_metrics(path: Path) -> list[Row]:
    """One row per epoch from a metrics.csv; no rows if there is no file. Raises `RunDirError`.

    Every row has the keys of `METRICS`, nan if the file doesn't have the column, and those of the
    parts' learning rates. Other columns are left out.
    """
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode("utf-8")
        head, *lines = csv.reader(io.StringIO(text, newline=""), strict=True) if text else ([],)
        if not text.endswith("\n") or any(len(line) != len(head) for line in lines):
            raise ValueError("a row is cut off")
        columns = [dict(zip(head, line, strict=True)) for line in lines]
        names = (*METRICS, *(name for name in head if name.startswith(RATE)))
        rows = [{name: float(row.get(name, math.nan)) for name in names} for row in columns]
        if [row["epoch"] for row in rows] != [*range(len(rows))]:
            raise ValueError("an epoch's row is missing")
    except (OSError, ValueError, csv.Error) as error:
        raise RunDirError(f"{path} is damaged: {error}") from None
    return rows
