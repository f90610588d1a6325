"""Runs that train only the head, carried out together in one process.

They share the features of the frozen network, the batches and the training loop; each has its own
run directory, W&B run and result, with the numbers that it would have alone.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytorch_lightning as pl
from torch import Tensor

from finetune.config.fields import RunConfig
from finetune.features.loader import EpochLoader
from finetune.model.network import build_from
from finetune.runs.resolve import resolve
from finetune.runs.result import Row
from finetune.runs.run_dir import RunDir
from finetune.runs.settings import HEAD_FIELDS
from finetune.system.errors import Diverged, Pruned
from finetune.system.progress import bar
from finetune.system.shutdown import stoppable
from finetune.training.recorder import Recorder
from finetune.training.several_heads import SeveralHeads
from finetune.training.train import Execution, make_trainer

Log = Callable[[str], None]


@dataclass
class Member:
    """One of the runs, and what is kept of its best epoch until the end."""

    execution: Execution
    recorder: Recorder
    best_head: dict[str, Tensor] = field(default_factory=dict)
    best_logits: Tensor | None = None
    failure: Exception | None = None

    @property
    def is_training(self) -> bool:
        return self.failure is None and not self.recorder.is_complete


def run_together(
    configs: Sequence[RunConfig],
    run_dirs: Sequence[RunDir],
    logs: Sequence[Log],
    on_epoch: Callable[[int, Row], None],
    on_end: Callable[[int, Exception | None], None],
) -> None:
    """Carry out runs whose `head_group` is the same, and which have not begun before.

    `on_epoch` is called with a run's index and each epoch's row, and may raise `Pruned`; `on_end`
    with its index and the error that ended it, if any. A run that ends doesn't end the others.
    Raises what concerns all, as `train.run` does.
    """
    first, splits, cache = resolve(configs[0], logs[0], bar)
    given = [config.model_dump(include=HEAD_FIELDS) for config in configs]
    resolved = [first.model_copy(update=own) for own in given]
    chain, source = build_from(first, len(splits.class_names), logs[0])
    with stoppable(), ExitStack() as stack:
        runs = zip(resolved, run_dirs, logs, strict=True)
        executions = [Execution(config, path, splits, cache, log) for config, path, log in runs]
        for execution in executions:
            stack.enter_context(execution.claimed())
        members = [Member(e, e.start(source)) for e in executions]
        loader = EpochLoader(first, splits, cache, logs[0])
        module = SeveralHeads(chain, resolved, loader)
        trained = _Recorders(members, on_epoch)
        make_trainer(first, run_dirs[0].path, trained, max_epochs=first.num_epochs).fit(module)
        for i, member in enumerate(members):
            try:
                _finish(member, module)
            except Exception as error:  # of this run alone
                member.failure = error
                member.execution.record_failure(error)
            on_end(i, member.failure)


def _finish(member: Member, module: SeveralHeads) -> None:
    """Write what a run leaves, and log it to W&B. Raises the run's failure."""
    recorder = member.recorder
    if member.best_logits is not None:
        module.chain.network.load_state_dict(member.best_head, strict=False)
        recorder.write_best_epoch(module, member.best_logits)
        recorder.run_dir.write_metrics(recorder.rows)
    tracker = member.execution.open_tracker(recorder)
    if member.failure is not None:
        raise member.failure
    member.execution.finish(recorder, tracker, module.loader)


@dataclass(eq=False)
class _Recorders(pl.Callback):
    """After each epoch: adds a row to every run that still trains."""

    members: Sequence[Member]
    on_epoch: Callable[[int, Row], None]
    _epoch_started: float = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SeveralHeads)
        rows, logits = pl_module.rows(), pl_module.val_logits()
        assert logits is not None
        seconds = (time.perf_counter() - self._epoch_started) / len(rows)
        for i, (member, row) in enumerate(zip(self.members, rows, strict=True)):
            if not member.is_training:
                continue
            recorder = member.recorder
            row["images_per_second"] = pl_module.loader.num_pictures / seconds
            try:
                recorder.check_finite(row)
                if recorder.add(row):
                    member.best_head, member.best_logits = pl_module.head_state(i), logits[i]
                recorder.train_seconds += seconds
                recorder.log_epoch(row)
                self.on_epoch(i, row)
            except (Diverged, Pruned) as error:
                member.failure = error
        if not any(member.is_training for member in self.members):
            trainer.should_stop = True
