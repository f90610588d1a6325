"""A finished run's setting, trained once more on its training and validation pictures together.

    python -m finetune refit RUN_DIR

It trains as many epochs as were best for the run, with its seed and its head's penalty. Nothing is
left to validate on: its result has the accuracy of the run's setting.
"""

import time
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl

from finetune.data.splits import Splits
from finetune.features.loader import EpochLoader
from finetune.model.network import build_from
from finetune.runs.resolve import resolve
from finetune.runs.result import Row, RunResult
from finetune.runs.run_dir import RunDir
from finetune.runs.settings import setting_of
from finetune.system.errors import DataError, RunDirError
from finetune.system.progress import bar
from finetune.system.shutdown import stoppable
from finetune.system.text import command_line, num
from finetune.training.module import FineTuning
from finetune.training.recorder import write_best
from finetune.training.solve_head import Choice
from finetune.training.train import log, make_trainer

FOLDER = "refit"
"""In the run directory; it is a run directory without predictions."""


def refit(run_dir: Path) -> int:
    """Train RUN_DIR's setting on all its labelled pictures but the test's; returns the exit code.

    RUN_DIR/refit holds the model. Raises `RunDirError` if it is there already, and `DataError` if
    the pictures are not those of the run.
    """
    source, target = RunResult.load(run_dir), RunDir(run_dir / FOLDER)
    if target.finished:
        raise RunDirError(f"{target.path} is finished; remove it to train it again")
    config, splits, cache = resolve(RunDir(run_dir).read_config(), log, bar)
    if splits.split_fingerprint != source.split_fingerprint:
        raise DataError(f"{config.data_dir}: its pictures are not those of the run {run_dir}")
    with stoppable():
        target.claim(config)
        try:
            together = splits.with_val_in_training()
            chain, fingerprint = build_from(config, len(splits.class_names), log)
            if fingerprint != source.weights_fingerprint:
                raise DataError(f"weights: {config.weights} are not those of the run {run_dir}")
            loader = EpochLoader(config, together, cache, log)
            choice = source.solved_head and Choice(**source.solved_head)
            module = FineTuning(chain, config, loader, head_choice=choice or None)
            recorder = _Recorder()
            num_epochs = source.best_epoch + 1
            options: dict[str, Any] = {"max_epochs": num_epochs, "limit_val_batches": 0}
            started = time.perf_counter()
            make_trainer(config, target.path, recorder, **options).fit(module)
            accuracy, described = _accuracy(run_dir, source)
            target.write_metrics(recorder.rows)
            write_best(target, config, module, epoch=num_epochs - 1, val_acc=accuracy)
            changes = {
                "run_id": f"{source.run_id}-{FOLDER}",
                "refit_of": source.run_id,
                "best_val_acc": accuracy,
                "epochs_run": num_epochs,
                "train_seconds": time.perf_counter() - started,
                "num_train": len(loader.train.pictures),
                "num_val": 0,
            }
            target.write_result(source.model_copy(update=changes))
        finally:
            target.release()
    _print_end(target.path, len(loader.train.pictures), num_epochs, described, together)
    return 0


class _Recorder(pl.Callback):
    """Keeps each epoch's training metrics."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, FineTuning)
        self.rows.append(row := pl_module.epoch_metrics())
        log(f"epoch {row['epoch']:.0f}  train {row['train_loss']:.3f} acc {row['train_acc']:.3f}")


def _accuracy(run_dir: Path, source: RunResult) -> tuple[float, str]:
    """The mean accuracy of the setting's repeats with fresh seeds, else that of the run."""
    runs_dir = run_dir.parent.parent if run_dir.parent.name == "confirm" else run_dir.parent
    setting, found = setting_of(source.config, source.weights_fingerprint), []
    for path in sorted(runs_dir.glob("confirm/*/result.json")):
        result = RunResult.load(path.parent)
        is_same = setting_of(result.config, result.weights_fingerprint) == setting
        if is_same and result.split_fingerprint == source.split_fingerprint:
            found.append(result.best_val_acc)
    if found:
        return fmean(found), f"confirmed with {num(len(found), 'fresh seed')}"
    return source.best_val_acc, "of a single run, not confirmed"


def _print_end(path: Path, num_pictures: int, epochs: int, described: str, splits: Splits) -> None:
    accuracy = RunResult.load(path).best_val_acc
    log(f"{num(num_pictures, 'picture')}, {num(epochs, 'epoch')}: {path}")
    log(f"not validated; its setting's validation accuracy is {accuracy:.4f}, {described}")
    if splits.test:
        log(f"next: {command_line('-m', 'finetune', 'evaluate', path)}")
