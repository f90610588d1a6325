"""What a sweep shows while it runs, and at its end.

Turns the course of trials into a live table on a terminal, or into lines elsewhere, and outcomes
into a final table. Knows nothing about storages or processes.

    >>> with LiveTable(48, "best_val_acc", "maximize") as view: ...  # doctest: +SKIP
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune.config.fields import RunConfig
from finetune.runs.result import Row
from finetune.sweep.distributions import Value
from finetune.system.text import one_line


@dataclass(frozen=True)
class TrialResult:
    """One trial of a sweep, as it stands."""

    run_id: str
    run_dir: Path
    strategy: str
    setting: dict[str, Value]
    """The fields that vary in the sweep and mean something to the strategy, besides it."""
    state: str
    """finished, pruned, failed; or, in a sweep that was ended before: running, waiting."""
    value: float | None = None
    """The sweep's metric, its last value."""
    best_val_acc: float | None = None
    best_epoch: int | None = None
    seconds: float | None = None
    """Wall time of the trial's last attempt."""
    reason: str = ""


@dataclass
class _Running:
    name: str
    epochs: int
    row: Row | None = None


def open_console() -> Console:
    """The terminal; where there is none, lines wide enough that nothing is folded."""
    console = Console(highlight=False, markup=False)  # names may hold brackets
    if not console.is_terminal:
        console.width = 200
    return console


class LiveTable:
    """Running trials, the best so far, done and left, time left."""

    def __init__(
        self, num_trials: int, metric: str, goal: str, console: Console | None = None
    ) -> None:
        self._console = console or open_console()
        self._num_trials = num_trials
        self._metric, self._sign = metric, 1 if goal == "maximize" else -1
        self._running: dict[str, _Running] = {}
        self._num_done = self._num_before = 0
        self._best: TrialResult | None = None
        self._started = time.monotonic()
        self._live = (
            Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        self._console.print(one_line(line), markup=False, soft_wrap=True)

    def found(self, num_done: int, best: TrialResult | None) -> None:
        """So many trials are done, those before this process and elsewhere among them."""
        self._num_before = max(self._num_before, num_done - self._num_done)
        if best is not None:
            self._best = best

    def started(self, run_id: str, config: RunConfig) -> None:
        self._running[run_id] = _Running(one_line(config.name), config.epochs)

    def epoch(self, run_id: str, row: Row) -> None:
        running = self._running[run_id]
        running.row = row
        if self._live is None:
            self.say(f"{run_id}  {running.name}  {_progress(running)}")

    def ended(self, outcome: TrialResult) -> None:
        """A trial's end; one that was cut off isn't done."""
        name = self._running.pop(outcome.run_id, _Running(outcome.strategy, 0)).name
        if outcome.state in ("finished", "pruned", "failed"):
            self._num_done += 1
        if outcome.state == "finished" and outcome.value is not None:
            before = None if self._best is None else self._best.value
            if before is None or self._sign * (outcome.value - before) > 0:
                self._best = outcome
        words = [f"[{self._done}/{self._num_trials}]", outcome.run_id, name, outcome.state]
        if outcome.value is not None:
            words.append(f"{self._metric} {outcome.value:.4f}")
        if outcome.seconds is not None:
            words.append(f"{outcome.seconds:.1f} s")
        words += [outcome.reason.splitlines()[0]] if outcome.reason else []
        left = self._seconds_left()
        if left is not None and self._live is None:
            words.append(f"({_clock(left)} left)")
        self.say("  ".join(words))

    @property
    def _done(self) -> int:
        return min(self._num_done + self._num_before, self._num_trials)

    def _seconds_left(self) -> float | None:
        if not self._num_done:
            return None
        pace = (time.monotonic() - self._started) / self._num_done
        return pace * (self._num_trials - self._done)

    def _render(self) -> Group:
        left = self._seconds_left()
        title = f"{self._done} of {self._num_trials} done"
        if left is not None:
            title += f", {_clock(left)} left"
        if self._best is not None and self._best.value is not None:
            setting = one_line(describe(self._best))
            title += f"; best so far: {setting}, {self._metric} {self._best.value:.4f}"
        table = Table(box=None, pad_edge=False)
        for heading in ("running", "", "progress"):
            table.add_column(heading)
        for run_id, running in self._running.items():
            table.add_row(run_id, running.name, _progress(running))
        # A table's own title would be folded at the table's width.
        return Group(Text(title, style="italic"), table)


def _progress(running: _Running) -> str:
    if running.row is None:
        return "starting"
    row = running.row
    return (
        f"epoch {row['epoch']:.0f}/{running.epochs - 1}  val_acc {row['val_acc']:.4f}  "
        f"best {row['best_val_acc']:.4f}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe(outcome: TrialResult) -> str:
    """A trial's strategy and setting in words."""
    return " ".join([outcome.strategy, _setting(outcome)]).strip()


def _setting(outcome: TrialResult) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in outcome.setting.items()
    )


def final_table(outcomes: Sequence[TrialResult], metric: str = "best_val_acc") -> Table:
    """Every trial, in the order given: `run_sweep` returns the best first."""
    table = Table(box=None, pad_edge=False)
    columns: list[tuple[str, Callable[[TrialResult], Any]]] = [
        ("strategy", lambda o: o.strategy),
        ("setting", _setting),
        ("best_val_acc", lambda o: _number(o.best_val_acc, ".4f")),
        ("best epoch", lambda o: _number(o.best_epoch, "d")),
        ("seconds", lambda o: _number(o.seconds, ".1f")),
        ("state", lambda o: o.state),
        ("run", lambda o: o.run_id),
    ]
    if metric != "best_val_acc":
        columns.insert(2, (metric, lambda o: _number(o.value, ".4f")))
    for heading, _ in columns:
        numeric = heading in ("best_val_acc", "best epoch", "seconds", metric)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for outcome in outcomes:
        table.add_row(*(one_line(read(outcome)) for _, read in columns))
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
