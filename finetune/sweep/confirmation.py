"""Each strategy's best setting again, with fresh seeds, equally often.

Turns a folder of finished runs into a sweep of its own: the setting with the best mean of each
strategy, repeated. The best of many tries flatters itself; fresh seeds don't. Knows nothing about
storages or processes.

    python -m finetune confirm runs --seeds 5
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from finetune.config.fields import RunConfig
from finetune.runs.result import RunResult
from finetune.sweep.runner import conclude, run_sweep
from finetune.sweep.spec import Sweep
from finetune.sweep.table import open_console
from finetune.sweep.trials import TrialResult
from finetune.system.errors import ConfigError, RunDirError
from finetune.system.text import message

_NOT_A_SETTING = ("seed", "out", "name", "group", "cache_gb")  # the last follows the disk


def confirm(
    runs_dir: Path, num_seeds: int = 5, workers: int | None = None, storage: str | None = None
) -> int:
    """Repeat, and print each strategy's accuracies; the exit code.

    The runs go to RUNS_DIR/confirm. Started again it goes on, and with more seeds it adds them.
    Raises `ConfigError` and what `run_sweep` raises.
    """
    sweep = confirmation(runs_dir, num_seeds)
    console = open_console()
    strategies = len(sweep.source["settings"])
    console.print(f"{strategies} strategies, {num_seeds} fresh seeds each: {sweep.out_dir}")
    outcomes = run_sweep(sweep, workers=workers, storage=storage, console=console)
    code = conclude(outcomes, sweep.metric.name, console)
    console.print(spread_table(outcomes))
    return code


def confirmation(runs_dir: Path, num_seeds: int) -> Sweep:
    """The sweep that repeats the best settings of a folder of runs."""
    if num_seeds < 1:
        raise ConfigError(f"seeds: got {num_seeds}; a whole number from 1 on is needed")
    best = _best_settings(_results(runs_dir))
    text = json.dumps(best, sort_keys=True)
    name = f"confirm-{hashlib.blake2b(text.encode(), digest_size=3).hexdigest()}"
    first_seed = _first_seed(runs_dir, name)
    cells = [
        {**setting, "seed": (first_seed + i) % 2**32}
        for i in range(num_seeds)
        for setting in best.values()
    ]
    return Sweep(
        name=name,
        method="grid",
        dimensions=(),
        fixed={"out": str(runs_dir / "confirm")},
        listed=tuple(cells),
        source={"settings": best, "first_seed": first_seed},
    )


def _first_seed(runs_dir: Path, name: str) -> int:
    """Where this confirmation began, if it did; else behind every seed that was used, by other
    confirmations too: a seed that two settings share is fresh for neither."""
    results = _load(runs_dir.rglob("result.json"))
    mine = [result.seed for result in results if result.config.get("group") == name]
    return min(mine) if mine else max(result.seed for result in results) + 1


def _load(paths: Iterable[Path]) -> list[RunResult]:
    results = []
    for path in sorted(paths):
        try:
            results.append(RunResult.load(path.parent))
        except RunDirError as error:
            print(f"left out: {message(error)}", flush=True)
    return results


def _results(runs_dir: Path) -> list[RunResult]:
    results = _load(runs_dir.glob("*/result.json"))
    if not results:
        raise ConfigError(
            f"{runs_dir} holds no finished runs; pass the folder that a sweep's --out named"
        )
    splits = {result.split_fingerprint for result in results}
    if len(splits) > 1:
        raise ConfigError(
            f"{runs_dir} holds runs on {len(splits)} different splits or data sets, whose "
            "accuracies can't be compared; pass a folder with runs on one"
        )
    return results


def _best_settings(results: list[RunResult]) -> dict[str, dict[str, Any]]:
    """Strategy -> the fields of its setting with the best mean over the seeds tried."""
    tried: dict[tuple[str, str], list[float]] = defaultdict(list)
    for result in results:
        fields = {
            name: value
            for name, value in result.config.items()
            if name in RunConfig.model_fields and name not in _NOT_A_SETTING and value is not None
        }
        tried[result.strategy, json.dumps(fields, sort_keys=True)].append(result.best_val_acc)
    best: dict[str, dict[str, Any]] = {}
    for (strategy, text), _ in sorted(tried.items(), key=lambda item: (-mean(item[1]), item[0])):
        best.setdefault(strategy, json.loads(text))
    return dict(sorted(best.items()))


def spread_table(outcomes: list[TrialResult]) -> Table:
    """Each strategy's best_val_acc over its seeds, the best mean first."""
    found: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.state == "finished" and outcome.best_val_acc is not None:
            found[outcome.strategy].append(outcome.best_val_acc)
    table = Table(box=None, pad_edge=False)
    for heading in ("strategy", "seeds", "mean", "standard deviation", "lowest", "highest"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    for strategy, values in sorted(found.items(), key=lambda item: -mean(item[1])):
        spread = f"{stdev(values):.4f}" if len(values) > 1 else "-"
        numbers = (f"{v:.4f}" for v in (min(values), max(values)))
        table.add_row(strategy, str(len(values)), f"{mean(values):.4f}", spread, *numbers)
    return table
