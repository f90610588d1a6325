"""Which runs, in which order, where. As a function, `finetune.sweep(FILE)` runs a sweep."""

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.sweep.trials import TrialResult

# Optuna's progress bar, which is not used, asks for ipywidgets in a notebook.
warnings.filterwarnings("ignore", message="IProgress not found")


class _SweepModule(ModuleType):
    """The package `finetune.sweep`, which is also the function of that name."""

    def __call__(
        self,
        sweep: Path | str | Mapping[str, Any],
        *,
        out: Path | str | None = None,
        workers: int | None = None,
        max_runs: int | None = None,
        keep_best: int | None = None,
        minutes: float | None = None,
        **fields: Any,
    ) -> "list[TrialResult]":
        """Run a sweep file, or a mapping with its content; every trial's result, the best first.

        `fields` are those of a run and hold for all trials. The same call resumes the sweep. Raises
        what `finetune.sweep.runner.run_sweep` raises.
        """
        from finetune.sweep.runner import run_sweep
        from finetune.sweep.sweep_file import read_sweep

        source = Path(sweep) if isinstance(sweep, str) else sweep
        return run_sweep(
            read_sweep(source, fields),
            out=out,
            workers=workers,
            max_runs=max_runs,
            keep_best=keep_best,
            minutes=minutes,
        )


sys.modules[__name__].__class__ = _SweepModule
