"""One run, from a config to a result in its run directory.

from finetune import train_and_finetune
model = train_and_finetune(epochs=10, learning_rate=0.001)
"""

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from torch import nn

from finetune.config.field_tables import takes_fields
from finetune.config.fields import RunConfig
from finetune.data.splits import Splits
from finetune.features.loader import EpochLoader
from finetune.model.network import build_from, load_best
from finetune.runs.resolve import prepare_run, resolve
from finetune.runs.result import RunResult, failure_of
from finetune.runs.run_dir import RunDir
from finetune.runs.summary import summary
from finetune.system.array_store import Cache
from finetune.system.cuda import device_name
from finetune.system.errors import FinetuneError, RunDirError, Shortage, Stopped
from finetune.system.progress import bar
from finetune.system.resources import is_out_of_memory, shortage
from finetune.system.shutdown import defer_stop, stoppable
from finetune.system.text import command_line, one_line
from finetune.tracking.environment import fields_of_run, run_id
from finetune.tracking.tracker import Tracker, report_early_failure
from finetune.training.module import FineTuning
from finetune.training.recorder import AtomicCheckpointIO, EpochCallback, Recorder

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "wandb", "numpy", "pillow")


@takes_fields
def train_and_finetune(**fields: Any) -> nn.Module:
    """Fine-tune once and return the best epoch's model in eval mode.

    `fields` are those of `RunConfig`, and `config` (a YAML file of fields) or `resume` (a run
    directory to continue). In a function that `wandb.agent` calls, fields that the sweep sets come
    from it. The model's `.result` is the run's `RunResult`, which is also in the run directory,
    with the checkpoints. Raises `FinetuneError`.
    """
    with report_early_failure():
        config, run_dir = prepare_run(fields_of_run(fields), log, run_id())
        try:
            run(config, run_dir)
        except Shortage as error:
            raise Shortage(f"{error}, then continue with --resume {run_dir.path}") from None
        except Stopped:
            if run_dir.last_path.exists():
                log(f"resume: {command_line('agent.py', '--resume', run_dir.path)}")
            raise
    return load_best(run_dir.path)


def log(line: str) -> None:
    print(one_line(line), flush=True)


def run(config: RunConfig, run_dir: RunDir, on_epoch: EpochCallback | None = None) -> RunResult:
    """Execute one run in its directory; leaves result.json, or failure.json if it raises.

    `on_epoch` is called with every epoch's row after its files are written; it may raise `Pruned`.
    """
    config, splits, cache = resolve(config, log, bar)
    execution = Execution(config, run_dir, splits, cache, log)
    with stoppable(), execution.claimed():
        return execution.run(on_epoch)


@dataclass
class Execution:
    """The execution of a run in its directory, from its start or from last.ckpt."""

    config: RunConfig
    run_dir: RunDir
    splits: Splits
    cache: Cache | None
    log: Callable[[str], None]
    tracker: Tracker | None = None
    recorder: Recorder | None = None
    _has_failed: bool = False

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the directory; an error that leaves the block is recorded as the run's failure."""
        self.run_dir.claim(self.config)
        try:
            yield
        except BaseException as error:
            explained = _with_advice(error, self.config, self.run_dir)
            if not (self.run_dir.finished or self._has_failed):
                with defer_stop():
                    self.record_failure(explained)
            if explained is not error:
                raise explained from None
            raise
        finally:
            self.run_dir.release()

    def run(self, on_epoch: EpochCallback | None) -> RunResult:
        config, run_dir = self.config, self.run_dir
        chain, source = build_from(config, len(self.splits.class_names), self.log)
        recorder = self.start(source, on_epoch)
        checkpoint_path = recorder.restore()
        tracker = self.open_tracker(recorder)
        recorder.log_row = tracker.log_row
        loader = EpochLoader(config, self.splits, self.cache, self.log)
        if recorder.rows:
            run_dir.move_predictions(loader.val.pictures.paths)
        if not recorder.is_complete:
            module = FineTuning(chain, config, loader, first_epoch=len(recorder.rows))
            trainer = make_trainer(config, run_dir.path, recorder, max_epochs=config.num_epochs)
            trainer.fit(module, ckpt_path=checkpoint_path)
        return self.finish(recorder, tracker, loader)

    def start(self, source: str | None, on_epoch: EpochCallback | None = None) -> Recorder:
        """`source`: the fingerprint of the source weights."""
        self.log(f"run {self.run_dir.path.name}: {self.config.name} in {self.run_dir.path}")
        for note in self.splits.notes:
            self.log(note)
        fingerprints = {"weights_fingerprint": source, **self.splits.fingerprints}
        self.recorder = Recorder(self.run_dir, self.config, fingerprints, self.log, on_epoch)
        return self.recorder

    def open_tracker(self, recorder: Recorder) -> Tracker:
        """Open the W&B run, and log to it the epochs so far that it lacks."""
        self.tracker = Tracker.open(self.config, self.run_dir, self.log)
        self.tracker.log_missing_epochs(recorder.rows)
        return self.tracker

    def finish(self, recorder: Recorder, tracker: Tracker, loader: EpochLoader) -> RunResult:
        """Write and log the result of a run whose epochs are complete."""
        config, run_dir, log = self.config, self.run_dir, self.log
        result = _result(recorder, loader, self.splits)
        tracker.log_result(result, run_dir, log)
        with defer_stop():  # the server and the directory agree on how the run ended
            tracker.close()
            run_dir.write_result(result)
            if not config.keep_last:
                run_dir.last_path.unlink(missing_ok=True)
        for line in summary(result, *run_dir.read_predictions()[:2]):
            log(line)
        log(f"{run_dir.path}")
        return result

    def record_failure(self, error: BaseException) -> None:
        """Write failure.json and end the W&B run, as far as possible."""
        self._has_failed = True
        failure = failure_of(error)
        num_epochs = len(self.recorder.rows) if self.recorder is not None else None
        with suppress(OSError):  # a full disk may be the cause of the failure
            self.run_dir.write_failure(failure.state, failure.reason, num_epochs)
        if self.tracker is not None:
            try:
                self.tracker.fail(failure, self.run_dir)
            except Exception as unsent:  # it must not hide the error that ended the run
                self.log(f"{type(unsent).__name__}: {unsent}")


def make_trainer(
    config: RunConfig, directory: Path, callback: pl.Callback, **options: Any
) -> pl.Trainer:
    """Lightning's Trainer on the config's device, without Lightning's own files and logs."""
    silence_lightning()
    precision: Any = config.precision
    return pl.Trainer(
        **options,
        accelerator=config.accelerator,
        devices=1,
        precision=precision,
        benchmark=True if config.accelerator == "cuda" else None,
        logger=False,  # Lightning's log on rank 0 only, and Slurm's tasks have ranks
        callbacks=[callback],
        plugins=[AtomicCheckpointIO(), LightningEnvironment()],
        default_root_dir=directory,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
    )


def _result(recorder: Recorder, loader: EpochLoader, splits: Splits) -> RunResult:
    config, rows, train_seconds = recorder.config, recorder.rows, recorder.train_seconds
    best = rows[recorder.best_epoch]
    return RunResult(
        run_id=recorder.run_dir.path.name,
        strategy=config.strategy,
        seed=config.seed,
        best_val_acc=best["val_acc"],
        best_val_loss=best["val_loss"],
        best_val_macro_f1=best.get("val_macro_f1"),
        best_epoch=recorder.best_epoch,
        last_val_acc=rows[-1]["val_acc"],
        epochs_run=len(rows),
        stopped_early=len(rows) < config.num_epochs,
        num_threads=torch.get_num_threads(),
        device=device_name(config.accelerator),
        train_seconds=train_seconds,
        cache_seconds=loader.cache_seconds,
        images_per_second=len(rows) * loader.num_pictures / train_seconds,
        trainable_parameters=int(max(row["trainable_parameters"] for row in rows)),
        start_epochs=dict(config.plan.start_epochs),
        solved_head=recorder.solved_head,
        class_names=list(splits.class_names),
        num_train=len(loader.train.pictures),
        num_val=len(loader.val.pictures),
        unreadable=loader.unreadable,
        **recorder.fingerprints,  # type: ignore[arg-type]
        versions={"python": sys.version.split()[0]} | {p: version(p) for p in _PACKAGES},
        git_commit=_git_commit(),
        config=config.to_fields(),
        prefix_timings=loader.timings,
    )


def _with_advice(error: BaseException, config: RunConfig, run_dir: RunDir) -> BaseException:
    """An exhausted resource as an error that says what to change; any other error unchanged."""
    if not isinstance(error, Exception):
        return error
    if is_out_of_memory(error):
        gpu = " or --gpu_cache_fraction" if config.accelerator == "cuda" else ""
        return FinetuneError(
            f"out of memory at batch_size {config.batch_size} and image_size "
            f"{config.image_size}; pass a smaller --batch_size{gpu}"
        )
    if short := shortage(error):
        return short
    if isinstance(error, OSError) and Path(error.filename or "").is_relative_to(run_dir.path):
        return RunDirError(f"out: {error.filename} can't be used: {error.strerror}")
    return error


def _git_commit() -> str | None:
    """The commit of the checkout that holds this package, if it is in one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()
    return None


def silence_lightning() -> None:
    """Hide Lightning's advice on data loaders and defaults that this trainer doesn't use."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
