"""What a sweep prints: its progress, and a table of its results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune.config.fields import RunConfig
from finetune.runs.result import Row
from finetune.sweep.trials import TrialResult
from finetune.system.text import one_line

ENDED = ("finished", "pruned", "failed")


@dataclass
class _Running:
    name: str
    epochs: int
    row: Row | None = None


def open_console() -> Console:
    """The terminal; if the output is not a terminal, wide lines that are not wrapped."""
    console = Console(highlight=False, markup=False)  # names may contain brackets
    if not console.is_terminal:
        console.width = 200
    return console


class LiveTable:
    """The running trials, the best result, and the time left; without a terminal, lines."""

    def __init__(
        self, num_trials: int, metric: str, goal: str, console: Console | None = None
    ) -> None:
        self._console = console or open_console()
        self._num_trials = num_trials
        self._metric, self._sign = metric, 1 if goal == "maximize" else -1
        self._running: dict[str, _Running] = {}
        self._num_ended_here = self._num_ended_elsewhere = 0
        self._best: TrialResult | None = None
        self._started = time.monotonic()
        self._is_live = self._console.is_terminal
        self.display: AbstractContextManager[object] = (
            Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
            if self._is_live
            else nullcontext()
        )
        """The table is shown within this context."""

    def log(self, line: str) -> None:
        self._console.print(one_line(line), markup=False, soft_wrap=True)

    def update_done(self, results: Sequence[TrialResult]) -> None:
        """Count trials that ended before this process started, or in other processes."""
        num_ended = sum(result.state in ENDED for result in results)
        self._num_ended_elsewhere = max(self._num_ended_elsewhere, num_ended - self._num_ended_here)
        for result in results:
            self._compare(result)

    def _compare(self, result: TrialResult) -> None:
        """Keep the better of a finished trial and the best one so far."""
        if result.state == "finished" and result.value is not None:
            best = None if self._best is None else self._best.value
            if best is None or self._sign * (result.value - best) > 0:
                self._best = result

    def started(self, run_id: str, config: RunConfig) -> None:
        self._running[run_id] = _Running(one_line(config.name), config.epochs)

    def epoch_ended(self, run_id: str, row: Row) -> None:
        running = self._running[run_id]
        running.row = row
        if not self._is_live:
            self.log(f"{run_id}  {running.name}  {_progress(running)}")

    def ended(self, result: TrialResult) -> None:
        """A trial has ended or was interrupted."""
        name = self._running.pop(result.run_id, _Running(result.strategy, 0)).name
        self._num_ended_here += result.state in ENDED
        self._compare(result)
        words = [f"[{self._num_ended}/{self._num_trials}]", result.run_id, name, result.state]
        if result.value is not None:
            words.append(f"{self._metric} {result.value:.4f}")
        if result.seconds is not None:
            words.append(f"{result.seconds:.1f} s")
        words += result.reason.splitlines()[:1]
        if not self._is_live and (left := self._time_left()):
            words.append(f"({left} left)")
        self.log("  ".join(words))

    @property
    def _num_ended(self) -> int:
        return min(self._num_ended_here + self._num_ended_elsewhere, self._num_trials)

    def _time_left(self) -> str | None:
        if not self._num_ended_here:
            return None
        seconds_per_trial = (time.monotonic() - self._started) / self._num_ended_here
        minutes, seconds = divmod(
            round(seconds_per_trial * (self._num_trials - self._num_ended)), 60
        )
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

    def _render(self) -> Group:
        title = f"{self._num_ended} of {self._num_trials} done"
        if left := self._time_left():
            title += f", {left} left"
        if self._best is not None:
            best = one_line(describe(self._best))
            title += f"; best so far: {best}, {self._metric} {self._best.value:.4f}"
        table = Table(box=None, pad_edge=False)
        for heading in ("running", "", "progress"):
            table.add_column(heading)
        for run_id, running in self._running.items():
            table.add_row(run_id, running.name, _progress(running))
        # The table's own title would be wrapped at the table's width.
        return Group(Text(title, style="italic"), table)


def _progress(running: _Running) -> str:
    if running.row is None:
        return "starting"
    row = running.row
    return (
        f"epoch {row['epoch']:.0f}/{running.epochs - 1}  val_acc {row['val_acc']:.4f}  "
        f"best {row['best_val_acc']:.4f}"
    )


def describe(result: TrialResult) -> str:
    """A trial's strategy and setting in words."""
    return " ".join([result.strategy, _setting(result)]).strip()


def _setting(result: TrialResult) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in result.setting.items()
    )


def final_table(results: Sequence[TrialResult], metric: str = "best_val_acc") -> Table:
    """Every trial, in the order given: `run_sweep` returns the best first."""
    table = Table(box=None, pad_edge=False)
    columns: list[tuple[str, Callable[[TrialResult], Any]]] = [
        ("strategy", lambda r: r.strategy),
        ("setting", _setting),
        ("best_val_acc", lambda r: _number(r.best_val_acc, ".4f")),
        ("best epoch", lambda r: _number(r.best_epoch, "d")),
        ("seconds", lambda r: _number(r.seconds, ".1f")),
        ("state", lambda r: r.state),
        ("run", lambda r: r.run_id),
    ]
    if metric != "best_val_acc":
        columns.insert(2, (metric, lambda r: _number(r.value, ".4f")))
    for heading, _ in columns:
        numeric = heading in ("best_val_acc", "best epoch", "seconds", metric)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for result in results:
        table.add_row(*(one_line(read(result)) for _, read in columns))
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
