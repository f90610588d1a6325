"""Which trials of a sweep keep their checkpoints: `sweep --keep_best N`.

Those of the N best finished trials and of each strategy's best setting (of each network with each
strategy, if there are several networks), which the report shows, are kept. Of the other trials that
have finished or were pruned, best.ckpt and last.ckpt are removed; result.json, metrics.csv and
predictions.npz stay.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir
from finetune.runs.settings import best_setting, results_by_group, results_by_setting
from finetune.system.errors import RunDirError

if TYPE_CHECKING:  # it imports optuna, whose absence `storage` explains
    from finetune.sweep.trials import TrialResult


@dataclass(eq=False)
class Retention:
    """Removes checkpoints as better trials end."""

    num_best: int
    _loaded: dict[Path, RunResult] = field(default_factory=dict)

    def apply(self, trials: Sequence["TrialResult"]) -> None:
        """Remove the checkpoints that aren't kept; `trials` are all of the sweep, the best first.

        A trial whose result can't be read keeps its own.
        """
        finished = [trial.run_dir for trial in trials if trial.state == "finished"]
        kept = {*finished[: self.num_best], *self._of_best_settings(finished)}
        pruned = [trial.run_dir for trial in trials if trial.state == "pruned"]
        for path in {*finished, *pruned} - kept:
            run_dir = RunDir(path)
            for checkpoint in (run_dir.best_path, run_dir.last_path):
                checkpoint.unlink(missing_ok=True)

    def _of_best_settings(self, run_dirs: Iterable[Path]) -> list[Path]:
        kept, places, loaded = [], {}, []
        for run_dir in run_dirs:
            try:
                result = self._load(run_dir)
            except RunDirError:
                kept.append(run_dir)
                continue
            places[result.run_id] = run_dir
            loaded.append(result)
        for results in results_by_group(loaded).values():
            settings = results_by_setting(results)
            kept += [places[result.run_id] for result in settings[best_setting(settings)]]
        return kept

    def _load(self, run_dir: Path) -> RunResult:
        if run_dir not in self._loaded:
            self._loaded[run_dir] = RunResult.load(run_dir)
        return self._loaded[run_dir]
