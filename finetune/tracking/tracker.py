"""A run in Weights & Biases: opened, described, and ended with the truth.

Turns a config into a W&B run that Lightning's logger writes to, and a finished run directory into
what the dashboard shows at the end. Knows nothing about training.

    >>> tracker = Tracker.open(config, run_dir)  # doctest: +SKIP
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from finetune.config.fields import RunConfig
from finetune.data.layout import PICTURE_FORMATS
from finetune.runs.predictions import confident_mistakes
from finetune.runs.result import Failure, Row, RunResult, failure_of
from finetune.runs.run_dir import RunDir
from finetune.system.errors import FinetuneError, Stopped
from finetune.system.resources import require_handles
from finetune.system.shutdown import defer_stop, is_stopping
from finetune.system.text import one_line
from finetune.tracking.environment import mode, sweep_name, sweep_parameters

FOLDER = "finetune"
RUN_FILES = ("metrics.csv", "predictions.npz", "result.json")
"""What a run sends along, in this folder of its W&B files, for a report on the whole sweep."""

NUM_MISTAKES = 50

INIT_SECONDS = 60.0
"""How long a server is waited for at the start."""

STOP_SECONDS = 20.0
"""How long it is waited for after a stop: W&B's agent kills its run 30 s after SIGTERM."""

PATIENCE_SECONDS = 600.0
"""How long it is waited for at the end, for the first word."""

_LOOK_SECONDS = 0.1
_NUM_HANDLES = 16  # twice what W&B's client opens; without, its threads die and it waits for them


class Tracker:
    """One run's W&B side; with `WANDB_MODE=disabled` it does nothing, and wandb isn't imported."""

    has_opened: ClassVar[bool] = False
    """A W&B run was opened in this process."""

    def __init__(self, run: Any | None) -> None:
        self._run = run

    @classmethod
    def open(
        cls, config: RunConfig, run_dir: RunDir, say: Callable[[str], None] = print
    ) -> Tracker:
        """Start or go on with the W&B run whose id names the run directory.

        Raises `FinetuneError` when W&B can't be reached or refuses.
        """
        chosen = mode()
        if chosen == "disabled":
            return cls(None)
        if chosen == "offline" and "WANDB_MODE" not in os.environ:
            say("W&B: no key is configured; logging offline (wandb sync sends the run later)")
        locked = sweep_parameters()
        run = _init(
            chosen,
            project=config.project,
            entity=config.entity,
            group=config.group or sweep_name(config, chosen),
            name=config.name,
            id=run_dir.path.name,
            tags=[config.strategy],
            config={k: v for k, v in config.to_fields().items() if k not in locked},
            dir=run_dir.path,
        )
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")
        return cls(run)

    @property
    def run(self) -> Any | None:
        """W&B's own run object; None when W&B is disabled."""
        return self._run

    def catch_up(self, rows: Sequence[Row]) -> None:
        """Log the epochs that W&B hasn't: an attempt that was killed may not have sent its last.

        Offline nobody can be asked, but earlier attempts have left their folders, and `wandb sync`
        puts one after the other.
        """
        if self._run is None:
            return
        ours = Path(self._run.dir).parent
        earlier = any(folder != ours for folder in ours.parent.glob("*run-*-*"))
        num_known = len(rows) if self._run.offline and earlier else self._run.starting_step
        for row in rows[num_known:]:
            self._run.log(row)

    def conclude(self, result: RunResult, run_dir: RunDir) -> None:
        """The best epoch's summary, confusion, per-class accuracy, mistakes, and the artifact."""
        if self._run is None:
            return
        import wandb

        logits, labels, paths = run_dir.read_predictions()
        predicted = logits.argmax(axis=1)
        summary = result.model_dump(
            include={"best_val_acc", "best_val_loss", "best_epoch", "stopped_early"}
        )
        names = [one_line(name) for name in result.class_names]
        self._log_best(run_dir, summary | {"strategy": result.strategy, "class_names": names})
        per_class = [
            [name, float((predicted[labels == i] == i).mean())] for i, name in enumerate(names)
        ]
        mistakes = [
            (str(paths[i]), labels[i], guess, probability)
            for i, guess, probability in confident_mistakes(logits, labels, NUM_MISTAKES)
        ]
        self._run.log(
            {
                "confusion_matrix": wandb.plot.confusion_matrix(
                    y_true=labels.tolist(), preds=predicted.tolist(), class_names=names
                ),
                "per_class_accuracy": wandb.Table(columns=["class", "accuracy"], data=per_class),
                "confident_mistakes": wandb.Table(
                    columns=["picture", "path", "truth", "predicted", "probability"],
                    data=[
                        [_picture(path), one_line(path), names[truth], names[guess], probability]
                        for path, truth, guess, probability in mistakes
                    ],
                ),
            }
        )
        # An attempt that was cut off has left another state.
        self._run.summary.update(summary | {"state": "finished", "reason": ""})
        self._send_files(run_dir, result)

    def _send_files(self, run_dir: RunDir, result: RunResult | None = None) -> None:
        """`RUN_FILES` as they are now; the directory's own result.json comes after W&B's end."""
        assert self._run is not None
        folder = Path(self._run.dir) / FOLDER
        folder.mkdir(exist_ok=True)
        for path in (run_dir.metrics_path, run_dir.predictions_path):
            if path.exists():
                shutil.copyfile(path, folder / path.name)
        if result is not None:
            (folder / "result.json").write_bytes(result.to_json())
        self._run.save(f"{folder}/*", base_path=folder.parent, policy="now")

    def _log_best(self, run_dir: RunDir, metadata: dict[str, Any]) -> None:
        import wandb

        assert self._run is not None
        artifact = wandb.Artifact(f"finetune-{self._run.id}", type="model", metadata=metadata)
        # Neither copied nor cached by W&B: it stays as it is in the run directory.
        artifact.add_file(
            str(run_dir.best_path), name="best.ckpt", policy="immutable", skip_cache=True
        )
        _patiently(partial(self._run.log_artifact, artifact, aliases=["best"]))

    def fail(self, end: Failure, run_dir: RunDir | None = None) -> None:
        """End the W&B run with its state, the reason and the best model so far.

        A sweep's server queues a preempted run again.
        """
        run = self._run
        if run is None:
            return

        def tell() -> None:
            run.summary.update({"state": end.state, "reason": end.reason})
            if end.state == "preempted":
                run.mark_preempting()
            try:
                if run_dir is not None and run_dir.best_path.exists():
                    self._send_files(run_dir)
                    self._log_best(run_dir, {"state": end.state})
            finally:
                run.finish(exit_code=end.exit_code)

        self._in_time(tell)

    def close(self) -> None:
        """Send everything and end the W&B run as finished."""
        if self._run is not None:
            self._in_time(self._run.finish)

    def _in_time(self, end_run: Callable[[], None]) -> None:
        """End the W&B run. What is sent can't be unsaid, so a stop doesn't interrupt this, but
        limits it: raises `FinetuneError` when `STOP_SECONDS` after one it isn't done."""
        run = self._run
        assert run is not None
        done: Future[None] = Future()

        def carry_out() -> None:
            try:
                end_run()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        threading.Thread(target=carry_out, daemon=True).start()
        deadline = math.inf
        while time.monotonic() < deadline and not wait([done], _LOOK_SECONDS).done:
            if is_stopping():
                deadline = min(deadline, time.monotonic() + STOP_SECONDS)
        self._run = None
        if not done.done():
            place = Path(run.dir).parent
            raise FinetuneError(f"W&B: no answer in time; `wandb sync {place}` sends the rest")
        done.result()


def _patiently(log: Callable[[], object]) -> None:
    """Log the first artifact. Before it W&B's client asks the server who is there, and takes 19 s
    of silence for a wrong key, whereas it waits for its uploads as long as it takes."""
    import wandb

    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            log()
            return
        except wandb.errors.AuthenticationError:
            if is_stopping() or time.monotonic() > deadline:
                raise
            time.sleep(1)


def _init(chosen: str, seconds: float = INIT_SECONDS, **described: Any) -> Any:
    """The W&B run of this process, made or gone on with. Raises `FinetuneError`."""
    import wandb

    offline = chosen in ("offline", "dryrun")
    require_handles(_NUM_HANDLES)
    try:
        run = wandb.init(
            **described,
            mode="offline" if offline else chosen,  # type: ignore[arg-type]
            resume=None if offline else "allow",
            settings=wandb.Settings(
                silent=offline,
                disable_git=True,
                save_code=False,
                x_save_requirements=False,  # listing every package takes 0.1 s
                init_timeout=seconds,
            ),
        )
    except Exception as error:  # the server, its answer, or the client's own service
        raise FinetuneError(
            f"W&B: {error}. Set WANDB_MODE=offline to log into the run directory instead"
        ) from error
    except BaseException:  # stopped meanwhile: the server may know of the run already
        wandb.teardown(exit_code=1)
        raise
    Tracker.has_opened = True
    return run


def _picture(path: str) -> Any:
    """A picture for W&B, which can't keep a file whose name is no text: then a copy of it."""
    import wandb
    from PIL import Image

    if path.isprintable():
        return wandb.Image(path)
    with Image.open(path, formats=PICTURE_FORMATS) as image:
        return wandb.Image(image.convert("RGB"))


@contextmanager
def report_early_failure() -> Iterator[None]:
    """Within it, whatever ends a W&B agent's run before the run is open is told to the server.

    It would stay pending there: the agent says nothing about how its programs end.
    """
    try:
        yield
    except (Exception, Stopped) as error:
        by_agent = os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID")
        if by_agent and mode() == "online" and not Tracker.has_opened:
            # Where it can't be reached, what happened matters more.
            with suppress(FinetuneError), defer_stop():
                granted = STOP_SECONDS / 2 if is_stopping() else INIT_SECONDS
                Tracker(_init("online", granted)).fail(failure_of(error))
        raise
