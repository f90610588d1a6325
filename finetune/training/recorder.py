"""What a run leaves on disk and in its logger after every epoch.

Turns the end of an epoch into a row of metrics, checkpoints and the decision to stop. Everything
that a resume needs is in last.ckpt, written last. Knows nothing about how the numbers came about.

    >>> trainer = pl.Trainer(callbacks=[Recorder(...)], plugins=[Checkpoints()])  # doctest: +SKIP
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.plugins.io import CheckpointIO

from finetune.config.fields import RunConfig
from finetune.config.strategies import epochs_since_best
from finetune.data.pictures import Pictures
from finetune.model.network import MEAN, STD
from finetune.model.weights import read_checkpoint, write_checkpoint
from finetune.runs.result import Row, best_epoch
from finetune.runs.run_dir import RunDir
from finetune.system.errors import Diverged, WeightsError
from finetune.system.files import write_atomically
from finetune.system.shutdown import defer_stop
from finetune.training.module import FineTuning

OnEpoch = Callable[[Row], None]
"""Called with each epoch's row after its files are written."""


STATE_KEY = "recorder"
"""The recorder's entry of last.ckpt; part of the file's format."""

_STATE_KEY_0_1 = "Recorder"


def read_last(path: Path) -> dict[str, Any]:
    """A last.ckpt of this or an older version, as this version writes it. Raises `WeightsError`."""
    checkpoint = read_checkpoint(path)
    callbacks = checkpoint.get("callbacks")
    if isinstance(callbacks, dict) and _STATE_KEY_0_1 in callbacks:
        callbacks[STATE_KEY] = callbacks.pop(_STATE_KEY_0_1)
    return checkpoint


class Checkpoints(CheckpointIO):
    """Lightning's checkpoints, written beside their target and renamed, checked when loaded."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_last(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Recorder(pl.Callback):
    """After each epoch: its row, the best epoch's files, last.ckpt, and whether to stop."""

    def __init__(
        self,
        run_dir: RunDir,
        config: RunConfig,
        weights_fingerprint: str | None,
        say: Callable[[str], None] = print,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._weights_fingerprint = weights_fingerprint
        self._say = say
        self._on_epoch = on_epoch
        self.rows: list[Row] = []
        self.train_seconds = 0.0
        self._epoch_started = 0.0

    @property
    def state_key(self) -> str:
        return STATE_KEY

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self.train_seconds = float(state_dict["train_seconds"])

    @property
    def out_of_patience(self) -> bool:
        """Whether early stopping ends the run; it follows from the rows alone."""
        losses = [row["val_loss"] for row in self.rows]
        since_best = epochs_since_best(losses, self._config.plan)
        return 0 < self._config.patience_epochs <= since_best

    @property
    def is_complete(self) -> bool:
        return len(self.rows) >= self._config.epochs or self.out_of_patience

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, FineTuning)
        row = pl_module.epoch_metrics()
        self._check_finite(row)
        feed = pl_module.feed
        num_pictures = len(feed.train_pictures) + len(feed.val_pictures)
        seconds = time.perf_counter() - self._epoch_started
        row["images_per_second"] = num_pictures / seconds
        with defer_stop():
            self._keep(row, trainer, pl_module)
        if self._on_epoch is not None:
            self._on_epoch(row)
        if self.out_of_patience:
            trainer.should_stop = True

    def _keep(self, row: Row, trainer: pl.Trainer, module: FineTuning) -> None:
        """Write and log an epoch. W&B hears of it once last.ckpt has it: a resume that repeated an
        epoch would log it a second time; one that W&B lacks is logged when the run is resumed."""
        self.rows.append(row)
        best = best_epoch(self.rows)
        row["best_val_acc"] = self.rows[best]["val_acc"]
        if best == row["epoch"]:
            write_best(self._run_dir, module, row)
            pictures = module.feed.val_pictures
            write_predictions(self._run_dir, module.val_logits().numpy(), pictures)
        self._run_dir.write_metrics(self.rows)
        self.train_seconds += time.perf_counter() - self._epoch_started
        trainer.save_checkpoint(self._run_dir.last_path)
        for logger in trainer.loggers:
            logger.log_metrics(row)
        self._say(_line(row, self._config.epochs))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["weights_fingerprint"] = self._weights_fingerprint

    def _check_finite(self, row: Row) -> None:
        losses = {name: row[name] for name in ("train_loss", "val_loss")}
        if all(map(math.isfinite, losses.values())):
            return
        found = ", ".join(f"{name} is {value}" for name, value in losses.items())
        raise Diverged(
            f"diverged in epoch {row['epoch']:.0f} at learning_rate "
            f"{self._config.learning_rate:g}: {found}; pass a smaller --learning_rate"
        )


def recorded_state(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a `Recorder` left in a last.ckpt. Raises `WeightsError`."""
    try:
        state: dict[str, Any] = checkpoint["callbacks"][STATE_KEY]
        if [row["epoch"] for row in state["rows"]] != list(range(checkpoint["epoch"] + 1)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise WeightsError(f"{path} is no run's last.ckpt") from None
    return state


def write_best(run_dir: RunDir, module: FineTuning, row: Row) -> None:
    """The whole network with what its use needs: classes, size and normalisation."""
    content = {
        "state_dict": {k: v.cpu() for k, v in module.network.state_dict().items()},
        "class_names": list(module.feed.train_pictures.class_names),
        "image_size": module.config.image_size,
        "mean": list(MEAN),
        "std": list(STD),
        "epoch": row["epoch"],
        "val_acc": row["val_acc"],
    }
    write_checkpoint(content, run_dir.best_path)


def write_predictions(run_dir: RunDir, logits: np.ndarray[Any, Any], pictures: Pictures) -> None:
    buffer = io.BytesIO()
    paths = np.array([str(pictures.path(i)) for i in range(len(pictures))])
    np.savez(buffer, logits=logits, labels=pictures.labels, paths=paths)
    write_atomically(run_dir.predictions_path, buffer.getvalue())


def _line(row: Row, epochs: int) -> str:
    return (
        f"epoch {row['epoch']:>2.0f}/{epochs - 1}  train loss {row['train_loss']:.3f} "
        f"acc {row['train_acc']:.3f}  val loss {row['val_loss']:.3f} acc {row['val_acc']:.3f}  "
        f"best {row['best_val_acc']:.3f}  {row['images_per_second']:.0f} images/s"
    )
