"""What a run writes and logs after every epoch: metrics, checkpoints and predictions.

last.ckpt is written last and holds everything that a resume needs.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from finetune.config.fields import RunConfig
from finetune.config.strategies import epochs_since_best
from finetune.model.network import load_best
from finetune.model.weights import FORMAT_VERSION, read_checkpoint, write_checkpoint
from finetune.runs.result import Row, epoch_rank
from finetune.runs.run_dir import RunDir
from finetune.system.errors import Diverged, RunDirError, WeightsError
from finetune.system.shutdown import defer_stop
from finetune.training.module import FineTuning

EpochCallback = Callable[[Row], None]
"""Called with each epoch's row after its files are written."""

STATE_KEY, _STATE_KEY_0_1 = "recorder", "Recorder"
"""The recorder's entry among the callbacks of last.ckpt, now and in 0.1; part of the format."""

_ORIGINS = {
    "weights_fingerprint": ("weights", "weights"),
    "dataset_fingerprint": ("pictures", "data_dir"),
    "split_fingerprint": ("pictures", "data_dir"),
}
"""What a fingerprint is of, and the field that says where it is."""


def read_last(path: Path) -> dict[str, Any]:
    """A last.ckpt of this or an older version, in this version's format. Raises `WeightsError`."""
    checkpoint = read_checkpoint(path)
    try:
        callbacks = checkpoint["callbacks"]
        if _STATE_KEY_0_1 in callbacks:
            callbacks[STATE_KEY] = callbacks.pop(_STATE_KEY_0_1)
        epochs = [row["epoch"] for row in callbacks[STATE_KEY]["rows"]]
        is_complete = epochs == list(range(checkpoint["epoch"] + 1))
    except (KeyError, TypeError, AttributeError):
        is_complete = False
    if not is_complete:
        raise WeightsError(f"{path} is not a run's last.ckpt")
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written atomically and checked when loaded."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        return read_last(Path(path))


@dataclass(eq=False)
class Recorder(pl.Callback):
    """After each epoch: adds a row, writes the run's files, and stops a run out of patience."""

    run_dir: RunDir
    config: RunConfig
    fingerprints: Mapping[str, str | None]
    """Of the weights, the data set and the split, by their names in last.ckpt and result.json."""
    log_line: Callable[[str], None] = print  # Lightning sets `log` to its own
    on_epoch: EpochCallback | None = None
    log_row: EpochCallback | None = None
    rows: list[Row] = field(default_factory=list)
    best_epoch: int = 0
    """That of best.ckpt: the first with the highest `epoch_rank`."""
    solved_head: dict[str, Any] | None = None
    train_seconds: float = 0.0
    _epoch_started: float = 0.0

    state_key = STATE_KEY

    def state_dict(self) -> dict[str, Any]:
        names = ("rows", "best_epoch", "solved_head", "train_seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        # 0.1 took the first epoch with the highest accuracy, and best.ckpt is that one's.
        accuracies = [row["val_acc"] for row in self.rows]
        first = accuracies.index(max(accuracies))
        self.best_epoch = int(state_dict.get("best_epoch", first))
        self.solved_head = state_dict.get("solved_head")
        self.train_seconds = float(state_dict.get("train_seconds", 0.0))

    def restore(self) -> Path | None:
        """Restore the rows from last.ckpt, if it exists; its path. Raises `WeightsError`."""
        path = self.run_dir.last_path
        if not path.exists():
            return None
        try:
            checkpoint = read_last(path)
            self.load_state_dict(checkpoint["callbacks"][STATE_KEY])
            # The best epoch's files may not be written again: check them now.
            load_best(self.run_dir.path)
            self.run_dir.read_predictions()
        except (WeightsError, RunDirError) as error:
            restart = f"Remove {path} to start from the beginning"
            advice = "Start a new run" if self.run_dir.finished else restart
            raise WeightsError(f"{error}. {advice}") from None
        self._compare_fingerprints(checkpoint)
        self.run_dir.resume(self.config)
        self.run_dir.write_metrics(self.rows)
        self.log_line(f"resuming after epoch {len(self.rows) - 1}")
        return path

    def _compare_fingerprints(self, checkpoint: Mapping[str, Any]) -> None:
        """Raises `WeightsError` if last.ckpt belongs to other weights or pictures."""
        if missing := [name for name in self.fingerprints if name not in checkpoint]:
            self.log_line(
                f"{self.run_dir.last_path} was written by an older version, without "
                f"{' and '.join(missing)}; whether these are the same is not checked"
            )
        for name, found in self.fingerprints.items():
            if (recorded := checkpoint.get(name, found)) != found:
                what, field = _ORIGINS[name]
                raise WeightsError(
                    f"{self.run_dir.last_path} belongs to {what} {recorded}; those of "
                    f"{getattr(self.config, field)} are {found} ({name}). Resume with the {what} "
                    f"that it started from (--{field})"
                )

    @property
    def out_of_patience(self) -> bool:
        """Whether early stopping ends the run."""
        since_best = epochs_since_best([row["val_loss"] for row in self.rows], self.config.plan)
        return 0 < (self.config.patience or 0) <= since_best

    @property
    def is_complete(self) -> bool:
        return len(self.rows) >= self.config.num_epochs or self.out_of_patience

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, FineTuning)
        row = pl_module.epoch_metrics()
        self.check_finite(row)
        seconds = time.perf_counter() - self._epoch_started
        row["images_per_second"] = pl_module.loader.num_pictures / seconds
        with defer_stop():
            self._record(row, trainer, pl_module)
        if self.on_epoch is not None:
            self.on_epoch(row)
        if self.out_of_patience:
            trainer.should_stop = True

    def check_finite(self, row: Row) -> None:
        """Raises `Diverged`."""
        if not math.isfinite(row["train_loss"] + row["val_loss"]):
            raise Diverged(
                f"diverged in epoch {row['epoch']:.0f} at learning_rate "
                f"{self.config.learning_rate}: train_loss is {row['train_loss']}, val_loss is "
                f"{row['val_loss']}; pass a smaller --learning_rate"
            )

    def add(self, row: Row) -> bool:
        """Append an epoch's row and set its `best_val_acc`; whether it is the best so far."""
        self.rows.append(row)
        is_best = len(self.rows) == 1 or epoch_rank(row) > epoch_rank(self.rows[self.best_epoch])
        if is_best:
            self.best_epoch = len(self.rows) - 1
        row["best_val_acc"] = self.rows[self.best_epoch]["val_acc"]
        return is_best

    def _record(self, row: Row, trainer: pl.Trainer, module: FineTuning) -> None:
        """Write the epoch's files, then log it: if a resume repeated it, it would be logged twice.

        An epoch that was written but not logged is logged by the tracker when the run is resumed.
        """
        if self.add(row):
            logits = module.val_logits()
            assert logits is not None
            self.write_best_epoch(module, logits)
        if module.head_choice is not None:
            self.solved_head = module.head_choice._asdict()
        self.run_dir.write_metrics(self.rows)
        self.train_seconds += time.perf_counter() - self._epoch_started
        trainer.save_checkpoint(self.run_dir.last_path)
        if self.log_row is not None:
            self.log_row(row)
        self.log_epoch(row)

    def write_best_epoch(self, module: FineTuning, logits: Tensor) -> None:
        """best.ckpt and predictions.npz of the best epoch, from its network and logits."""
        epoch, pictures = self.best_epoch, module.loader.val.pictures
        write_best(self.run_dir, self.config, module, epoch, self.rows[epoch]["val_acc"])
        self.run_dir.write_predictions(logits.numpy(), pictures.labels, pictures.paths)

    def log_epoch(self, row: Row) -> None:
        train_loss, val_loss = (
            f"{loss:.3f}" if loss < 1e3 else f"{loss:.0e}"
            for loss in (row["train_loss"], row["val_loss"])
        )
        self.log_line(
            f"epoch {row['epoch']:>2.0f}/{self.config.num_epochs - 1}  train {train_loss} "
            f"acc {row['train_acc']:.3f}  val {val_loss} acc {row['val_acc']:.3f} "
            f"f1 {row['val_macro_f1']:.3f}  best {row['best_val_acc']:.3f}"
        )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["format_version"] = FORMAT_VERSION
        checkpoint.update(self.fingerprints)


def write_best(
    run_dir: RunDir, config: RunConfig, module: FineTuning, epoch: int, val_acc: float
) -> None:
    """best.ckpt, the complete network with its classes and preprocessing."""
    content = {
        "format_version": FORMAT_VERSION,
        "model": config.model,
        "state_dict": {k: v.cpu() for k, v in module.network.state_dict().items()},
        "class_names": list(module.loader.train.pictures.class_names),
        "image_size": config.image_size,
        "background": config.background,
        "pixel_range": config.pixel_range,
        "mean": list(config.backbone.mean),
        "std": list(config.backbone.std),
        "epoch": epoch,
        "val_acc": val_acc,
    }
    write_checkpoint(content, run_dir.best_path)
