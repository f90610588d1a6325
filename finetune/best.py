"""The best model within a given time: `python -m finetune best DATA_DIR --minutes N`.

First every strategy once, the cheapest first; then values that Optuna draws, for the strategies
that are near the best; then fresh seeds of the two best; then the best setting on training and
validation pictures together.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from finetune.analysis.comparison import compare
from finetune.analysis.read_runs import read_runs
from finetune.analysis.report.report import print_report
from finetune.analysis.statistics import MIN_SEEDS
from finetune.config.backbones import DEFAULT_MODEL
from finetune.config.strategies import STRATEGIES
from finetune.inference.evaluate import evaluate
from finetune.runs.result import RunResult
from finetune.runs.settings import best_setting, results_by_group, results_by_setting
from finetune.sweep.confirmation import confirmation
from finetune.sweep.runner import run_sweep
from finetune.sweep.table import open_console
from finetune.system.errors import ConfigError, FinetuneError, Stopped
from finetune.system.text import command_line
from finetune.training.refit import FOLDER, refit

SEARCH_SHARE, CONFIRM_SHARE = 0.6, 0.9
"""The parts of the time after which the search and the confirmation end."""

NUM_CONFIRMED, NUM_SEEDS = 2, 5
"""How many settings get fresh seeds, and at most how many."""

NEAR = 0.1
"""A strategy is searched further if its first accuracy is at most so far from the best such."""

_END_SECONDS = 1.0
"""Reserved for the report, and for the start of the last run."""

_METRIC = {"name": "best_val_acc", "goal": "maximize"}
_FIRST = {"learning_rate": {"value": 0.003}, "lr_schedule": {"value": "cosine"}}
_SEARCHED = {
    "learning_rate": {"distribution": "log_uniform_values", "min": 0.0003, "max": 0.03},
    "data_aug": {"values": ["y", "n"]},
    "weight_decay": {"values": [0.0, 0.0001, 0.001]},
    "lr_schedule": {"value": "cosine"},
}


def best(
    data_dir: Path,
    minutes: float,
    models: Sequence[str] = (DEFAULT_MODEL,),
    fields: Mapping[str, Any] | None = None,
) -> int:
    """Search, confirm, train and test the best model; returns the exit code.

    `fields` hold for all runs. The run directories go to the field `out` (default: runs/best). When
    it is stopped it reports what it has found so far. Raises `ConfigError` for a time <= 0, and
    `FinetuneError` if no run has finished.
    """
    if minutes <= 0:
        raise ConfigError(f"minutes: got {minutes:g}; must be above 0")
    fields = fields or {}
    found = _Search(Path(str(fields.get("out", "runs/best"))), minutes)
    given = {**fields, "data_dir": str(data_dir)}
    try:
        found.search(list(models), given)
        num_seeds = found.confirm()
        refitted = found.refit()
    except Stopped:
        found.answer()
        raise
    return found.answer(num_seeds, refitted)


class _Search:
    """The steps of `best`, each within its part of the time."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.out = out
        self.started = time.monotonic()
        self.seconds = 60 * minutes
        self.console = open_console()

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the time is over."""
        return self.started + share * self.seconds - time.monotonic()

    def _say(self, step: str, share: float = 1.0) -> None:
        """Announce a step, which may last until this share of the time."""
        self.console.print(f"{step} (until minute {share * self.seconds / 60:.1f})", soft_wrap=True)

    def search(self, models: Sequence[str], fields: Mapping[str, Any]) -> None:
        """Every strategy that uses the weights once, then drawn values for those near the best."""
        strategies = [name for name, s in STRATEGIES.items() if "weights" not in s.ignores]
        by_model = {"model": {"values": models}}
        first = {"strategy": {"values": strategies}, **by_model, **_FIRST}
        self._say(f"each strategy once: {', '.join(strategies)}", SEARCH_SHARE)
        self._sweep("first", {"method": "grid", "parameters": first}, fields)
        reached: dict[str, float] = {}
        for group, results in self._groups().items():  # of each network
            if "learning_rate" not in STRATEGIES[group.strategy].ignores:
                accuracy = max(result.best_val_acc for result in results)
                reached[group.strategy] = max(accuracy, reached.get(group.strategy, 0.0))
        highest = max(reached.values(), default=0.0)
        near = [name for name, accuracy in reached.items() if accuracy >= highest - NEAR]
        if near and self.left(SEARCH_SHARE) > 0:
            drawn = {"strategy": {"values": near}, **by_model, **_SEARCHED}
            rule = {"type": "hyperband", "min_iter": 2}
            further = {"method": "bayes", "early_terminate": rule}
            self._say(f"further settings of {', '.join(near)}", SEARCH_SHARE)
            self._sweep("drawn", {**further, "parameters": drawn}, fields)

    def _sweep(self, name: str, content: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        parameters = {k: v for k, v in content["parameters"].items() if k not in fields}
        run_sweep(
            {**content, "metric": _METRIC, "parameters": parameters},
            name=name,
            out=self.out,
            fields=fields,
            minutes=self.left(SEARCH_SHARE) / 60,
            console=self.console,
        )

    def _groups(self) -> Any:
        return results_by_group([RunResult.load(path.parent) for path in self._result_paths()])

    def _result_paths(self) -> list[Path]:
        return sorted(self.out.glob("*/result.json"))

    def confirm(self) -> int:
        """Fresh seeds of the best settings; how many each of them got in the time."""
        means = []
        for group, results in self._groups().items():
            settings = results_by_setting(results)
            repeated = settings[best_setting(settings)]
            means.append((fmean(result.best_val_acc for result in repeated), str(group)))
        chosen = [group for _, group in sorted(means, reverse=True)[:NUM_CONFIRMED]]
        if not chosen or self.left(CONFIRM_SHARE) <= 0:
            return 0
        self._say(f"fresh seeds of the best settings of {' and '.join(chosen)}", CONFIRM_SHARE)
        sweep = confirmation(self.out, NUM_SEEDS, chosen)
        minutes = self.left(CONFIRM_SHARE) / 60
        trials = run_sweep(sweep, minutes=minutes, console=self.console)
        finished = Counter(
            (trial.setting.get("model"), trial.strategy)
            for trial in trials
            if trial.state == "finished"
        )
        return min(finished.values(), default=0) if len(finished) == len(chosen) else 0

    def refit(self) -> Path | None:
        """The leading setting on training and validation pictures; None if there is no time."""
        run = self._leader() if self._result_paths() else None
        if run is None or (run / FOLDER / "result.json").exists():
            return run and run / FOLDER
        result = RunResult.load(run)
        expected = (result.train_seconds + result.cache_seconds) * 1.5 + _END_SECONDS
        if expected > self.left() - _END_SECONDS:
            return None
        self._say("the best setting on training and validation pictures together")
        refit(run)
        return run / FOLDER

    def _leader(self) -> Path | None:
        """The best run of the most accurate strategy."""
        summaries = compare(read_runs(self.out)).summaries
        return summaries[0].best.run_dir if summaries else None

    def answer(self, num_seeds: int = 0, refitted: Path | None = None) -> int:
        """Print what was found, and what is missing to rely on it."""
        if not self._result_paths():
            raise FinetuneError(
                f"no run has finished in {self.seconds / 60:g} minutes; pass more --minutes, a "
                f"smaller --image_size or fewer --epochs (what is cached in {self.out} is kept)"
            )
        print_report(self.out, self.out)
        leader = refitted or self._leader()
        if refitted:
            try:
                evaluate(refitted)
            except FinetuneError as error:  # such as no test pictures
                self.console.print(str(error), soft_wrap=True)
        missing = []
        if num_seeds < MIN_SEEDS:
            missing.append(f"{num_seeds} instead of {MIN_SEEDS} fresh seeds of the best settings")
        missing += [] if refitted else ["not trained on the validation pictures"]
        if missing:
            self.console.print(f"not enough time: {'; '.join(missing)}", soft_wrap=True)
        self.console.print(f"best model: {leader}", soft_wrap=True)
        words = ("-m", "finetune", "predict", leader, "PICTURE")
        self.console.print(f"next: {command_line(*words)}", soft_wrap=True)
        return 0
