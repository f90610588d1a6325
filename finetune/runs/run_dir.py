"""A run's directory: the files that a run leaves, written atomically and read with checks."""

from __future__ import annotations

import csv
import errno
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from finetune.config.fields import RunConfig, read_mapping
from finetune.runs.result import METRICS, Array, Row, RunResult, json_bytes
from finetune.system.errors import ConfigError, RunDirError
from finetune.system.files import write_atomically

_EVALUATION = frozenset(
    {"folder", "pictures_fingerprint", "model_fingerprint", "accuracy", "accuracy_interval"}
    | {"num_pictures", "per_class", "class_names", "confusion", "unreadable", "recorded_at"}
)


class RunDir:
    """The directory of one run; only its holder writes there."""

    def __init__(self, path: Path, wait_seconds: float = 0) -> None:
        """`wait_seconds`: how long `claim` waits for another process to let go of it."""
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

    def read_config(self) -> RunConfig:
        """The config that the run was started with. Raises `RunDirError`."""
        if not self.config_path.exists():
            raise RunDirError(f"{self.path} is no run directory: it has no config.yaml")
        try:
            fields = read_mapping(self.config_path)
            if "name" not in fields:  # the last one that is written
                raise RunDirError(f"{self.config_path} is damaged: its end is missing")
            return RunConfig.from_fields(fields)
        except ConfigError as error:
            raise RunDirError(f"{self.config_path} is damaged: {error}") from None

    def claim(self, config: RunConfig) -> None:
        """Hold the directory for this process until `release`, made or taken up again.

        An unfinished directory is gone on with; a finished one too when `config` has more epochs:
        its result is then kept under another name. Raises `RunDirError` when another process holds
        it, it is finished, or it can't be written, and `OSError` without file handles.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            if self.finished:
                self._reopen(config)
            for left_behind in self.path.glob(".*.tmp"):
                left_behind.unlink()
            self.write_config(config)
        except Timeout:
            raise RunDirError(f"{self.path} is in use by another process") from None
        except OSError as error:
            self.release()
            if error.errno in (errno.EMFILE, errno.ENFILE):  # another place would not help
                raise
            raise RunDirError(
                f"out: {self.path} can't be written: {error.strerror or error}; pass another --out"
            ) from None
        except RunDirError:
            self.release()
            raise

    def _reopen(self, config: RunConfig) -> None:
        """Take up a finished run for more epochs."""
        result = RunResult.load(self.path)
        if config.epochs <= result.config["epochs"]:
            raise RunDirError(
                f"{self.path} is finished; resume it with a larger --epochs, or start a new run"
            )
        if result.stopped_early:
            raise RunDirError(
                f"{self.path} stopped early by its patience; more epochs would not change that"
            )
        self.result_path.replace(self.path / f"result.{result.config['epochs']}-epochs.json")

    def release(self) -> None:
        self._lock.release()

    def write_config(self, config: RunConfig) -> None:
        text = yaml.safe_dump(config.to_fields(), sort_keys=False, allow_unicode=True)
        write_atomically(self.config_path, text.encode())

    def write_metrics(self, rows: Iterable[Row]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, METRICS)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.metrics_path, text.getvalue().encode())

    def write_result(self, result: RunResult) -> None:
        """Written last: its existence means that the run ended well."""
        write_atomically(self.result_path, result.to_json())
        self.failure_path.unlink(missing_ok=True)

    def write_failure(self, state: str, reason: str, epoch: int | None) -> None:
        failure = {"state": state, "reason": reason, "epoch": epoch}
        write_atomically(self.failure_path, json.dumps(failure, indent=2).encode())

    def read_evaluations(self) -> list[dict[str, Any]]:
        """What `evaluate` has recorded, the oldest first. Raises `RunDirError`."""
        try:
            records = json.loads(self.evaluation_path.read_bytes())["evaluations"]
            for record in records:
                if missing := _EVALUATION - record.keys():
                    raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunDirError(
                f"{self.evaluation_path} can't be read: {error}; remove it to evaluate anew"
            ) from None
        return list(records)

    def write_evaluations(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Raises `RunDirError`."""
        try:
            write_atomically(self.evaluation_path, json_bytes({"evaluations": records}))
        except OSError as error:
            raise RunDirError(
                f"{self.evaluation_path} can't be written: {error.strerror or error}"
            ) from None

    def read_predictions(self) -> tuple[Array, Array, Array]:
        """The best epoch's logits, (N, K), labels and paths, (N,). Raises `RunDirError`."""
        import numpy as np

        try:
            # np.load would leave a damaged file open
            with self.predictions_path.open("rb") as file, np.load(file) as predictions:
                logits, labels, paths = (predictions[k] for k in ("logits", "labels", "paths"))
            if not (
                (logits.ndim, logits.dtype.kind, labels.dtype.kind) == (2, "f", "i")
                and labels.shape == paths.shape == logits.shape[:1]
                and np.isfinite(logits).all()
                and 0 <= labels.min(initial=0) <= labels.max(initial=0) < logits.shape[1]
            ):
                raise ValueError("its arrays don't fit together")
        except Exception as error:  # zip, zlib and NumPy raise whatever they like
            reason = str(error) or type(error).__name__
            raise RunDirError(f"{self.predictions_path} is damaged: {reason}") from None
        return logits, labels, paths


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.csv, an epoch each; no file, no rows. Raises `RunDirError`."""
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode("ascii")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = [{key: float(value) for key, value in row.items()} for row in reader]
        whole = text.endswith("\r\n") and tuple(reader.fieldnames or ()) == METRICS
        if not whole or [row["epoch"] for row in rows] != list(range(len(rows))):
            raise ValueError("not every epoch has its row")
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise RunDirError(f"{path} is damaged: {error}") from None
    return rows
