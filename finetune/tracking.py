"""A run in Weights & Biases: opened, described, and ended with the truth.

Turns a config into a W&B run that Lightning's logger writes to, and a finished run directory into
what the dashboard shows at the end. Without an account it logs offline, into the run directory; it
never waits at a prompt. Knows nothing about training.

    >>> tracker = Tracker.open(config, run_dir)  # doctest: +SKIP
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import numpy as np
import yaml

from finetune.config import RunConfig
from finetune.errors import FinetuneError
from finetune.result import RunDir, RunResult

if TYPE_CHECKING:
    from pytorch_lightning.loggers import WandbLogger

NUM_MISTAKES = 50


def mode(environ: dict[str, str] | None = None) -> str:
    """`WANDB_MODE` where it is set; else online with a key, offline without one."""
    variables = os.environ if environ is None else environ
    if asked := variables.get("WANDB_MODE"):
        return asked
    if variables.get("WANDB_SWEEP_ID") or _has_key(dict(variables)):
        return "online"
    return "offline"


def _has_key(environ: dict[str, str]) -> bool:
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    path = Path(environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return path.exists() and netrc.netrc(str(path)).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


class Tracker:
    """One run's W&B side; with `WANDB_MODE=disabled` it does nothing, and wandb isn't imported."""

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
        import wandb

        offline = chosen in ("offline", "dryrun")
        locked = _sweep_parameters()
        described = {k: v for k, v in config.to_fields().items() if k not in locked}
        try:
            run = wandb.init(
                mode=None if offline else chosen,  # type: ignore[arg-type]
                project=config.project,
                entity=config.entity,
                group=config.group or os.environ.get("WANDB_SWEEP_ID"),
                name=config.name,
                id=run_dir.path.name,
                resume=None if offline else "allow",
                tags=[config.strategy],
                config=described,
                dir=run_dir.path,
                settings=wandb.Settings(
                    mode="offline" if offline else None,  # type: ignore[arg-type]
                    silent=offline,
                    disable_git=True,
                    save_code=False,
                ),
            )
        except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
            raise FinetuneError(
                f"W&B: {error}. Set WANDB_MODE=offline to log into the run directory instead"
            ) from None
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")
        return cls(run)

    def loggers(self) -> list[WandbLogger]:
        """Lightning's logger on this run; none when W&B is disabled."""
        if self._run is None:
            return []
        from pytorch_lightning.loggers import WandbLogger

        return [WandbLogger(experiment=self._run)]

    def note(self, values: dict[str, Any]) -> None:
        """Facts of the run, in its config."""
        if self._run is not None:
            self._run.config.update(values, allow_val_change=True)

    def conclude(self, result: RunResult, run_dir: RunDir) -> None:
        """The best epoch's summary, confusion, per-class accuracy, mistakes, and the artifact."""
        if self._run is None:
            return
        import wandb

        with np.load(run_dir.predictions_path) as predictions:
            logits, labels, paths = (predictions[k] for k in ("logits", "labels", "paths"))
        predicted = logits.argmax(axis=1)
        names = result.class_names
        per_class = [
            [name, float((predicted[labels == i] == i).mean())] for i, name in enumerate(names)
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
                        [wandb.Image(path), path, names[truth], names[guess], probability]
                        for path, truth, guess, probability in confident_mistakes(
                            logits, labels, paths
                        )
                    ],
                ),
            }
        )
        summary = result.model_dump(
            include={"best_val_acc", "best_val_loss", "best_epoch", "stopped_early"}
        )
        self._run.summary.update(summary)
        self._log_best(run_dir, summary | {"strategy": result.strategy, "class_names": names})

    def _log_best(self, run_dir: RunDir, metadata: dict[str, Any]) -> None:
        import wandb

        assert self._run is not None
        artifact = wandb.Artifact(f"finetune-{self._run.id}", type="model", metadata=metadata)
        artifact.add_file(str(run_dir.best_path), name="best.ckpt")
        self._run.log_artifact(artifact, aliases=["best"])

    def fail(self, state: str, reason: str, run_dir: RunDir) -> None:
        """End the W&B run with its state, the reason and the best model so far.

        What a sweep has pruned has not failed.
        """
        if self._run is None:
            return
        self._run.summary.update({"state": state, "reason": reason})
        if run_dir.best_path.exists():
            self._log_best(run_dir, {"state": state})
        self.close(exit_code=0 if state == "pruned" else 1)

    def close(self, exit_code: int = 0) -> None:
        """Send everything and end the W&B run; a code above 0 marks it as failed."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None


def confident_mistakes(
    logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], paths: Sequence[str]
) -> list[tuple[str, int, int, float]]:
    """(path, truth, prediction, probability) of wrong predictions, the most probable first."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    guesses = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    wrong = np.flatnonzero(guesses != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:NUM_MISTAKES]
    return [(str(paths[i]), int(labels[i]), int(guesses[i]), float(confidence[i])) for i in worst]


def _sweep_parameters() -> frozenset[str]:
    """Names that a W&B sweep has set and locked: setting them again would only be a warning."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path or not Path(path).exists():
        return frozenset()
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return frozenset(content) if isinstance(content, dict) else frozenset()
