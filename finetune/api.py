"""What the commands do, as functions for Python and notebooks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.analysis.comparison import Comparison
from finetune.sweep.trials import TrialResult

Place = Path | str


def report(runs_dir: Place = "runs", out: Place | None = None) -> Comparison:
    """Write OUT/report.html and OUT/runs.csv (default: in `runs_dir`); the comparison.

    Its `headline` is the conclusion. Raises `RunDirError` if there are no runs.
    """
    from finetune.analysis.report.report import write_report

    return write_report(Path(runs_dir), Path(out or runs_dir))


def confirm(
    runs_dir: Place, num_seeds: int = 5, folds: int | None = None, workers: int | None = None
) -> list[TrialResult]:
    """Repeat each strategy's best setting with fresh seeds, or over `folds` folds of train/; every
    repeat, the best first."""
    from finetune.sweep.confirmation import confirmation, over_folds
    from finetune.sweep.runner import run_sweep

    place = Path(runs_dir)
    sweep = over_folds(place, folds) if folds else confirmation(place, num_seeds)
    return run_sweep(sweep, workers=workers)


def evaluate(run_dir: Place, folder: Place | None = None) -> dict[str, Any]:
    """Accuracy, per-class figures and confusion on the run's test set, or on `folder`/CLASS/*.

    The record is that of `python -m finetune evaluate --json`. Raises `DataError`.
    """
    from finetune.inference.evaluate import evaluation
    from finetune.system.files import run_directory

    record, _ = evaluation(run_directory(run_dir), Path(folder) if folder else None)
    return record


def predict(run_dir: Place, pictures: Any) -> Any:
    """The `Prediction` of a picture by a run's best model, or a list for a list of pictures.

    A picture is a path, a Pillow image or an array. Load the model once with `load_best` to
    predict more often. Raises `WeightsError` and `DataError`.
    """
    from finetune.model.network import load_best

    model: Any = load_best(Path(run_dir))
    return model.predict(pictures)


__all__: Sequence[str] = ("confirm", "evaluate", "predict", "report")
