"""The W&B run of one run: opened, fed with its result or failure, and finished."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from finetune.config.fields import RunConfig
from finetune.runs.result import METRICS, RATE, Failure, Row, RunResult, failure_of
from finetune.runs.run_dir import RunDir
from finetune.system.errors import FinetuneError, Stopped
from finetune.system.resources import require_handles
from finetune.system.shutdown import defer_stop, is_stopping
from finetune.system.text import one_line
from finetune.tracking.environment import (
    active_run,
    mode,
    sweep_name,
    sweep_parameters,
    use_writable_folders,
)
from finetune.tracking.result_tables import result_tables

FOLDER = "finetune"  # of a run's W&B files
RUN_FILES = ("metrics.csv", "predictions.npz", "result.json")  # uploaded into it for `report`
INIT_SECONDS = 60.0  # timeout of a run's start, unless WANDB_INIT_TIMEOUT says another
STOP_SECONDS = 20.0  # of its end after a stop: W&B's agent kills its run 30 s after SIGTERM
ARTIFACT_SECONDS = 600.0  # of the first answer to an artifact
_POLL_SECONDS = 0.1
_NUM_HANDLES = 16  # twice what W&B's client opens; without them its threads die and it hangs


class Tracker:
    """The W&B side of one run. It does nothing, and doesn't import wandb, if W&B is disabled."""

    has_opened: ClassVar[bool] = False
    """Whether the run that this process carries out has a W&B run."""

    def __init__(self, run: Any | None, is_joined: bool = False) -> None:
        self.run = run
        """W&B's run object; None if W&B is disabled or the run has ended."""
        self.is_joined = is_joined
        """Whether the caller has opened the run. It is then the caller who finishes it."""

    @classmethod
    def open(
        cls, config: RunConfig, run_dir: RunDir, log: Callable[[str], None] = print
    ) -> Tracker:
        """Start or resume the W&B run that has the name of the run directory as its id.

        If the caller has an active W&B run, this run is logged into it. Raises `FinetuneError` if
        W&B can't be reached or refuses.
        """
        active = active_run()
        if active is None and mode() == "disabled":
            return cls(None)
        use_writable_folders(run_dir.path.parent, log)
        if active is not None:
            return cls(None) if active.disabled else cls._join(active, config, log)
        wandb_mode = mode()
        if wandb_mode == "offline" and "WANDB_MODE" not in os.environ:
            log("W&B: no key is configured; logging offline (wandb sync sends the run later)")
        locked = sweep_parameters()
        run = _init(
            wandb_mode,
            project=config.project,
            entity=config.entity,
            group=config.group or sweep_name(config, wandb_mode),
            name=config.name,
            id=run_dir.path.name,
            tags=[config.strategy],
            config={k: v for k, v in config.to_fields().items() if k not in locked},
            dir=run_dir.path,
        )
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")
        return cls(run)

    @classmethod
    def _join(cls, run: Any, config: RunConfig, log: Callable[[str], None]) -> Tracker:
        """Log into the caller's run: its config gets this run's fields."""
        sends = " (`wandb sync` with it sends the run)" if run.offline else ""
        log(f"W&B: logging into the active run {run.id}; its files are in {_folder(run)}{sends}")
        locked = sweep_parameters()
        fields = {k: v for k, v in config.to_fields().items() if k not in locked}
        before = dict(run.config)
        for name in fields.keys() & before.keys():
            if before[name] != fields[name]:
                log(
                    f"W&B: {name} was {before[name]} in the active run's config; it is now "
                    f"{fields[name]}"
                )
        run.config.update(fields, allow_val_change=True)
        run.tags = tuple(dict.fromkeys((*(run.tags or ()), config.strategy)))
        for name in (*METRICS, f"{RATE}*"):
            run.define_metric(name, step_metric=None if name == "epoch" else "epoch")
        cls.has_opened = True
        return cls(run, is_joined=True)

    def log_row(self, row: Row) -> None:
        """Log one epoch."""
        if self.run is not None:
            self.run.log(row)

    def log_missing_epochs(self, rows: Sequence[Row]) -> None:
        """Log the epochs that W&B lacks: a killed attempt may not have sent its last ones."""
        if self.run is None:
            return
        for row in rows[self._num_logged(len(rows)) :]:
            self.run.log(row)

    def _num_logged(self, num_rows: int) -> int:
        """How many of the run's first rows W&B has."""
        assert self.run is not None
        # Its steps may be the caller's own; a run that has finished before has logged its tables.
        if self.is_joined or self.run.summary.get("best_epoch") is not None:
            return int(self.run.summary.get("epoch", -1)) + 1
        # An offline run can't ask. Earlier attempts left folders, which `wandb sync` joins.
        folder = _folder(self.run)
        has_earlier = any(other != folder for other in folder.parent.glob("*run-*-*"))
        return num_rows if self.run.offline and has_earlier else int(self.run.starting_step)

    def log_result(
        self, result: RunResult, run_dir: RunDir, log: Callable[[str], None] = print
    ) -> None:
        """Send the best epoch: model, confusion, accuracy by class, mistakes, summary."""
        if self.run is None:
            return
        logits, labels, paths = run_dir.read_predictions()
        names = {"best_val_acc", "best_val_loss", "best_val_macro_f1", "best_epoch"}
        summary = result.model_dump(include={*names, "stopped_early"}, exclude_none=True)
        classes = [one_line(name) for name in result.class_names]
        self._log_model(run_dir, summary | {"strategy": result.strategy, "class_names": classes})
        self.run.log(result_tables(logits, labels, paths, classes, log))
        # An interrupted attempt may have left another state.
        end = {"state": "finished", "reason": "", "train_seconds": result.train_seconds}
        self.run.summary.update(summary | end)
        self._upload_files(run_dir, result)

    def _upload_files(self, run_dir: RunDir, result: RunResult | None = None) -> None:
        """Upload `RUN_FILES`. The run directory gets its result.json only after W&B's end."""
        assert self.run is not None
        folder = Path(self.run.dir) / FOLDER
        folder.mkdir(exist_ok=True)
        for path in (run_dir.metrics_path, run_dir.predictions_path):
            if path.exists():
                shutil.copyfile(path, folder / path.name)
        if result is not None:
            (folder / "result.json").write_bytes(result.to_json())
        self.run.save(f"{folder}/*", base_path=folder.parent, policy="now")

    def _log_model(self, run_dir: RunDir, metadata: dict[str, Any]) -> None:
        """Log best.ckpt as an artifact with the alias `best`.

        Before the first artifact W&B's client asks the server for the user, and takes 19 s without
        an answer for a wrong key, although it waits for uploads without a limit. So this retries.
        """
        import wandb

        assert self.run is not None
        artifact = wandb.Artifact(f"finetune-{self.run.id}", type="model", metadata=metadata)
        file = str(run_dir.best_path)  # which W&B neither copies nor caches
        artifact.add_file(file, name="best.ckpt", policy="immutable", skip_cache=True)
        deadline = time.monotonic() + ARTIFACT_SECONDS
        while True:
            try:
                self.run.log_artifact(artifact, aliases=["best"])
                return
            except wandb.errors.AuthenticationError:
                if is_stopping() or time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def fail(self, failure: Failure, run_dir: RunDir | None = None) -> None:
        """End the W&B run with its state, the reason and the best model so far."""
        if (run := self.run) is None:
            return

        def send() -> None:
            run.summary.update({"state": failure.state, "reason": failure.reason})
            if failure.state == "preempted":
                run.mark_preempting()  # the sweep's server queues the run again
            try:
                if run_dir is not None and run_dir.best_path.exists():
                    self._upload_files(run_dir)
                    self._log_model(run_dir, {"state": failure.state})
            finally:
                if not self.is_joined:
                    run.finish(exit_code=failure.exit_code)

        self._end(send)

    def close(self) -> None:
        """Send everything and end the W&B run as finished, unless it is the caller's."""
        if self.run is not None and not self.is_joined:
            self._end(self.run.finish)

    def _end(self, send: Callable[[], object]) -> None:
        """End the W&B run by calling `send`.

        What was sent can't be withdrawn, so a stop doesn't interrupt this but limits its time:
        raises `FinetuneError` if it takes longer than `STOP_SECONDS` after a stop.
        """
        run = self.run
        assert run is not None
        done: Future[object] = Future()

        def call() -> None:
            try:
                done.set_result(send())
            except Exception as error:
                done.set_exception(error)

        threading.Thread(target=call, daemon=True).start()
        deadline = math.inf
        while time.monotonic() < deadline and not wait([done], _POLL_SECONDS).done:
            if is_stopping():
                deadline = min(deadline, time.monotonic() + STOP_SECONDS)
        self.run = None
        if not done.done():
            raise FinetuneError(f"W&B: timed out; `wandb sync {_folder(run)}` sends the rest")
        done.result()


def _folder(run: Any) -> Path:
    """The folder of a run's W&B files, which `wandb sync` sends."""
    return Path(run.dir).parent


def _init(wandb_mode: str, timeout_seconds: float | None = None, **options: Any) -> Any:
    """Start or resume the W&B run of this process. Raises `FinetuneError`."""
    import wandb

    offline = wandb_mode in ("offline", "dryrun")
    require_handles(_NUM_HANDLES)
    settings = wandb.Settings(
        silent=offline,
        disable_git=True,
        save_code=False,
        x_save_requirements=False,  # listing every package takes 0.1 s
    )
    if timeout_seconds is not None or "WANDB_INIT_TIMEOUT" not in os.environ:
        settings.init_timeout = timeout_seconds or INIT_SECONDS
    try:
        run = wandb.init(
            **options,
            mode="offline" if offline else wandb_mode,  # type: ignore[arg-type]
            resume=None if offline else "allow",
            settings=settings,
        )
    except Exception as error:  # of the server or of the client's own service
        other, does = (
            ("disabled", "run without W&B")
            if offline
            else ("offline", "log into the run directory instead")
        )
        raise FinetuneError(f"W&B: {error}. Set WANDB_MODE={other} to {does}") from error
    except BaseException:  # a stop: the server may know the run already
        wandb.teardown(exit_code=1)
        raise
    Tracker.has_opened = True
    return run


@contextmanager
def report_early_failure() -> Iterator[None]:
    """Within it, an error before the W&B run is open is sent to W&B if an agent started the run.

    Otherwise the run would stay pending: the agent doesn't report how its programs end. An active
    run of the caller gets the state and the reason too.
    """
    Tracker.has_opened = False
    try:
        yield
    except (Exception, Stopped) as error:
        if not Tracker.has_opened:
            Tracker.has_opened = True  # of several such contexts one reports
            # If W&B can't be reached, the error itself is more important.
            with suppress(FinetuneError), defer_stop():
                _report(failure_of(error))
        raise


def _report(failure: Failure) -> None:
    by_agent = os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID")
    if (active := active_run()) is not None:
        Tracker(active, is_joined=True).fail(failure)
    elif by_agent and mode() == "online":
        timeout_seconds = STOP_SECONDS / 2 if is_stopping() else None
        Tracker(_init("online", timeout_seconds)).fail(failure)
