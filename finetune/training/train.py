"""One run, from a config to a result: the only place where a Trainer is put together.

Turns fields into a run directory with a `RunResult` in it, through W&B or without. Knows nothing
about sweeps.

    >>> from finetune import train_and_finetune
    >>> model = train_and_finetune(epochs=10, learning_rate=0.001)  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.loggers import WandbLogger
from torchvision.models import ResNet

from finetune.config.fields import RunConfig
from finetune.data.images import open_images
from finetune.data.splits import Splits
from finetune.features.feed import Feed
from finetune.model.network import build, build_from, load_best, read_checkpoint_of
from finetune.runs.resolve import prepare_run, resolve
from finetune.runs.result import RunResult, best_epoch
from finetune.runs.run_dir import RunDir
from finetune.system.array_store import Cache
from finetune.system.errors import FinetuneError, RunDirError, Shortage, WeightsError, failure_of
from finetune.system.progress import bar
from finetune.system.resources import is_out_of_memory, shortage
from finetune.system.shutdown import defer_stop, stoppable
from finetune.system.text import one_line
from finetune.tracking.tracker import Tracker
from finetune.training.module import FineTuning
from finetune.training.recorder import Checkpoints, OnEpoch, Recorder, read_last, recorded_state

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "wandb", "numpy", "pillow")


def train_and_finetune(**fields: Any) -> ResNet:
    """Fine-tune once, as these fields say, and return the best epoch's model in eval mode.

    The fields are those of `RunConfig`, besides `config` (a YAML file of fields) and `resume` (a
    run directory to go on with). The model's `.result` is the run's `RunResult`, which stays in
    its run directory together with the checkpoints. Raises `FinetuneError`.
    """
    config, run_dir = prepare_run(fields, say)
    try:
        run(config, run_dir)
    except Shortage as error:
        raise Shortage(f"{error}, then go on by --resume {run_dir.path}") from None
    return load_best(run_dir.path)


def say(line: str) -> None:
    print(one_line(line), flush=True)


def run(config: RunConfig, run_dir: RunDir, on_epoch: OnEpoch | None = None) -> RunResult:
    """Carry out one run in its directory, whatever its end: result.json or failure.json.

    `on_epoch` gets every epoch's row once its files are written; it may raise `Pruned`.
    """
    _quieten()
    config, splits = resolve(config)
    with stoppable():
        run_dir.claim(config)
        attempt = _Attempt(config, run_dir, splits, on_epoch)
        try:
            return attempt.carry_out()
        except BaseException as error:
            explained = _explained(error, config, run_dir)
            if not run_dir.finished:
                with defer_stop():
                    attempt.fail(explained)
            if explained is not error:
                raise explained from None
            raise
        finally:
            run_dir.release()


@dataclass
class _Attempt:
    """One try at a run, from its claimed directory to its result or failure."""

    config: RunConfig
    run_dir: RunDir
    splits: Splits
    on_epoch: OnEpoch | None = None
    tracker: Tracker | None = None
    recorder: Recorder | None = None

    def carry_out(self) -> RunResult:
        config, run_dir = self.config, self.run_dir
        say(f"run {run_dir.path.name}: {config.name} in {run_dir.path}")
        say(self.splits.note)
        num_classes, source = len(self.splits.class_names), None
        if config.weights is None:
            network = build(num_classes, config.seed)
        else:
            network, source = build_from(config.weights, num_classes, config.seed)
        self.recorder = recorder = Recorder(run_dir, config, source, say, self.on_epoch)
        resumed = self._resume_from(recorder, source)
        self.tracker = Tracker.open(config, run_dir, say)
        self.tracker.catch_up(recorder.rows)
        feed, unreadable, cache_seconds = self._open_feed()
        module = FineTuning(network, config, feed)
        if not recorder.is_complete:
            self._trainer(recorder).fit(module, ckpt_path=resumed)
        result = self._result(feed, source, unreadable, cache_seconds + feed.prepare_seconds)
        self.tracker.conclude(result, run_dir)
        with defer_stop():  # the server and the directory say the same
            self.tracker.close()
            run_dir.write_result(result)
        say(
            f"best val_acc {result.best_val_acc:.4f} in epoch {result.best_epoch} of "
            f"{result.epochs_run}{' (stopped early)' if result.stopped_early else ''}: "
            f"{run_dir.path}"
        )
        return result

    def _resume_from(self, recorder: Recorder, source: str | None) -> Path | None:
        """last.ckpt where there is one, its rows given to the recorder. Raises `WeightsError`."""
        path = self.run_dir.last_path
        if not path.exists():
            return None
        try:
            checkpoint = read_last(path)
            recorder.load_state_dict(recorded_state(checkpoint, path))
            # It may never be written again.
            read_checkpoint_of(self.run_dir.path)
            self.run_dir.read_predictions()
        except (WeightsError, RunDirError) as error:
            raise WeightsError(
                f"{error}. Remove {path} to start the run from its beginning"
            ) from None
        if checkpoint.get("weights_fingerprint") != source:
            raise WeightsError(
                f"{path} belongs to weights {checkpoint.get('weights_fingerprint')}; "
                f"{self.config.weights} are {source}. Resume with the weights that it started from"
            )
        self.run_dir.write_metrics(recorder.rows)
        say(f"going on after epoch {len(recorder.rows) - 1}")
        return path

    def _open_feed(self) -> tuple[Feed, list[str], float]:
        """The batches' source, the pictures it goes without, and the seconds it took to open."""
        config = self.config
        started = time.perf_counter()
        cache = None
        if config.cache and config.cache_gb:
            cache = Cache(config.cache_dir, config.cache_gb * 1e9, say)
        opened = [
            open_images(split, config.image_size, config.skip_unreadable, cache, bar)
            for split in (self.splits.train, self.splits.val)
        ]
        (train, lost_train), (val, lost_val) = opened
        unreadable = [f"{train.pictures.folder.name}/{name}" for name in lost_train]
        unreadable += [f"{val.pictures.folder.name}/{name}" for name in lost_val]
        if unreadable:
            say(f"going on without {len(unreadable)} unreadable pictures: {unreadable[0]} ...")
        feed = Feed(config, train, val, cache, say, bar)
        return feed, unreadable, time.perf_counter() - started

    def _trainer(self, recorder: Recorder) -> pl.Trainer:
        assert self.tracker is not None
        run = self.tracker.run
        return pl.Trainer(
            max_epochs=self.config.epochs,
            accelerator=self.config.accelerator,
            devices=1,
            precision=self.config.precision,  # type: ignore[arg-type]
            logger=False if run is None else WandbLogger(experiment=run),
            callbacks=[recorder],
            plugins=[Checkpoints(), LightningEnvironment()],
            default_root_dir=self.run_dir.path,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
        )

    def _result(
        self, feed: Feed, source: str | None, unreadable: list[str], cache_seconds: float
    ) -> RunResult:
        assert self.recorder is not None
        rows, train_seconds = self.recorder.rows, self.recorder.train_seconds
        best = best_epoch(rows)
        num_train, num_val = len(feed.train_pictures), len(feed.val_pictures)
        return RunResult(
            run_id=self.run_dir.path.name,
            strategy=self.config.strategy,
            seed=self.config.seed,
            best_val_acc=rows[best]["val_acc"],
            best_val_loss=rows[best]["val_loss"],
            best_epoch=best,
            last_val_acc=rows[-1]["val_acc"],
            epochs_run=len(rows),
            stopped_early=len(rows) < self.config.epochs,
            num_threads=torch.get_num_threads(),
            train_seconds=train_seconds,
            cache_seconds=cache_seconds,
            images_per_second=len(rows) * (num_train + num_val) / train_seconds,
            trainable_parameters=int(max(row["trainable_parameters"] for row in rows)),
            class_names=list(self.splits.class_names),
            num_train=num_train,
            num_val=num_val,
            unreadable=unreadable,
            dataset_fingerprint=self.splits.dataset_fingerprint,
            split_fingerprint=self.splits.split_fingerprint,
            weights_fingerprint=source,
            versions={"python": sys.version.split()[0]} | {p: version(p) for p in _PACKAGES},
            git_commit=_git_commit(),
            config=self.config.to_fields(),
            prefix_timings=feed.timings,
        )

    def fail(self, error: BaseException) -> None:
        """Leave the reason in failure.json and, as far as it can be told, in W&B."""
        end = failure_of(error)
        epoch = len(self.recorder.rows) if self.recorder is not None else None
        with suppress(OSError):  # a full disk may be the very reason
            self.run_dir.write_failure(end.state, end.reason, epoch)
        if self.tracker is not None:
            try:
                self.tracker.fail(end, self.run_dir)
            except Exception as unsent:  # it must not hide what ended the run
                say(f"{type(unsent).__name__}: {unsent}")


def _explained(error: BaseException, config: RunConfig, run_dir: RunDir) -> BaseException:
    """Running out of something, in words that say what to change; any other error as it is."""
    if not isinstance(error, Exception):
        return error
    if not is_out_of_memory(error) and not isinstance(error, torch.OutOfMemoryError):
        if short := shortage(error):
            return short
        if isinstance(error, OSError) and Path(error.filename or "").is_relative_to(run_dir.path):
            return RunDirError(f"out: {error.filename} can't be used: {error.strerror}")
        return error
    return FinetuneError(
        f"out of memory at batch_size {config.batch_size} and image_size "
        f"{config.image_size}; pass a smaller --batch_size"
    )


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from, if it is one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _quieten() -> None:
    """Lightning's advice for its own loaders and defaults, which this trainer doesn't use."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
