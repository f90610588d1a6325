"""Run a sweep on this machine: claim trials, run them in worker processes, record how they end."""

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune.sweep.checks import check_places
from finetune.sweep.retention import Retention
from finetune.sweep.spec import Sweep
from finetune.sweep.storage import sqlite_url, storage_errors_as_messages
from finetune.sweep.sweep_file import read_sweep
from finetune.sweep.table import LiveTable, final_table, open_console
from finetune.sweep.time_budget import TimeBudget
from finetune.sweep.trial_queue import TrialQueue
from finetune.sweep.trial_runner import TrialRunner
from finetune.sweep.trials import TrialResult
from finetune.sweep.worker_pool import WorkerPool
from finetune.system.devices import worker_devices
from finetune.system.errors import ConfigError, FinetuneError, Stopped
from finetune.system.shutdown import stoppable
from finetune.system.text import command_line, this_command


def run_sweep(
    sweep: Sweep | Path | str | Mapping[str, Any],
    *,
    out: Path | str | None = None,
    workers: int | None = None,
    storage: str | None = None,
    max_runs: int | None = None,
    name: str | None = None,
    retry_failed: bool = False,
    keep_best: int | None = None,
    minutes: float | None = None,
    fields: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> list[TrialResult]:
    """Run a sweep here, resume it, or join it; return every trial's result, the best first.

    `sweep` is a sweep.yaml, a mapping with the same content, or a `Sweep`. Run directories go to
    `out` (default: the sweep's own `out`, else runs/), and so does the database NAME.db unless
    `storage` is given. `fields` are defaults for what the sweep does not set, such as data_dir.
    The default of `workers` is one per visible GPU, two per GPU of 40 GB or more, else 1. With
    `keep_best` only so many of the best trials, and each strategy's best, keep their checkpoints.
    With `minutes`, no trial is started that can't end in time; what runs at its end is requeued.

    Raises `ConfigError`, `DataError` or `WeightsError` if all trials lack their data or weights,
    `FinetuneError` if the first ones all fail, and `Stopped` on a signal, after requeuing trials.
    """
    if not isinstance(sweep, Sweep):
        sweep = read_sweep(Path(sweep) if isinstance(sweep, str) else sweep)
    spec = sweep.amended(name, fields or {}, {} if out is None else {"out": str(out)})
    num_trials = spec.num_trials(max_runs, is_timed=minutes is not None)
    _check_positive(workers=workers, minutes=minutes)
    check_places(spec)
    budget = None if minutes is None else TimeBudget.of_minutes(minutes)
    _make(spec.out_dir)
    where = storage or sqlite_url(spec.out_dir / f"{spec.slug}.db")
    with stoppable(), storage_errors_as_messages(where):
        live_table = LiveTable(num_trials, spec.metric.name, console, budget)
        worker_pool = WorkerPool(workers or max(1, len(worker_devices())))
        with closing(TrialQueue(spec, where, num_trials)) as queue:
            if retry_failed and (num_requeued := queue.retry_failed()):
                live_table.log(f"trials to run again: {num_requeued}")
            retention = None if keep_best is None else Retention(keep_best)
            with live_table.display:
                TrialRunner(spec, queue, worker_pool, live_table, retention, budget).run()
            queue.refresh()  # trials may have been requeued
            results = queue.results()
            if retention is not None:
                retention.apply(results)
            return results


def sweep_command(sweep: Path, fields: Mapping[str, Any] | None = None, **options: Any) -> int:
    """`python -m finetune sweep`: run the sweep and print its results; returns the exit code.

    `fields` hold for all trials.
    """
    console, spec = open_console(), read_sweep(sweep, fields)
    for line in (spec.summary(), *spec.notes):
        console.print(line, soft_wrap=True)
    try:
        results = run_sweep(spec, console=console, **options)
    except Stopped:
        console.print(f"resume: {this_command()}", soft_wrap=True)
        raise
    code = conclude(results, spec.metric.name, console, is_timed=options.get("minutes") is not None)
    for command in ("report", "confirm"):
        words = ("-m", "finetune", command, results[0].run_dir.parent)
        console.print(f"next: {command_line(*words)}", soft_wrap=True)
    return code


def conclude(
    results: list[TrialResult], metric: str, console: Console, is_timed: bool = False
) -> int:
    """Print every trial that has started, and the number of those in each state.

    Returns 0 if all have finished or were pruned, else 1. A sweep with a limit of its time may
    leave trials waiting.
    """
    console.print(final_table([r for r in results if r.state != "waiting"], metric))
    counts = Counter(result.state for result in results)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))
    if counts["failed"]:
        console.print("run it again with --retry_failed to retry the failed trials")
    expected = {"finished", "pruned", *(["waiting", "interrupted"] if is_timed else [])}
    return 0 if counts.keys() <= expected else 1


def _check_positive(workers: int | None, minutes: float | None) -> None:
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: got {workers}; must be an integer >= 1")
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"minutes: got {minutes:g}; must be above 0")


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"{directory} can't be created: {error.strerror}"
        raise FinetuneError(f"out: {problem}; pass another --out") from None
