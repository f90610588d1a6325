"""What a sweep prints: its progress, and a table of its results."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune.config.fields import RunConfig
from finetune.runs.result import Row
from finetune.sweep.spec import UNLIMITED
from finetune.sweep.time_budget import TimeBudget
from finetune.sweep.trials import TrialResult
from finetune.system.progress import in_notebook
from finetune.system.text import one_line

ENDED = ("finished", "pruned", "failed")


def open_console() -> Console:
    """The terminal; if the output is not a terminal, wide lines that are not wrapped."""
    # In a notebook, rich would make an HTML block of each line, or take it for a terminal.
    plain = False if in_notebook() else None
    console = Console(
        highlight=False, markup=False, force_jupyter=plain, force_terminal=plain
    )  # names may contain brackets
    if not console.is_terminal:
        console.width = 200
    return console


class LiveTable:
    """The running trials, the best result, and the time left; without a terminal, lines.

    In a notebook the lines of epochs are left out.
    """

    def __init__(
        self,
        num_trials: int,
        metric: str,
        console: Console | None = None,
        budget: TimeBudget | None = None,
    ) -> None:
        """`num_trials` may be `UNLIMITED`."""
        self._console = console or open_console()
        self._num_trials = num_trials
        self._deadline = budget.deadline if budget else math.inf
        self._metric = metric
        self._running: dict[str, tuple[str, str]] = {}
        self._num_ended = self._num_ended_here = 0
        self._best: TrialResult | None = None
        self._started = time.monotonic()
        self._is_live = self._console.is_terminal
        self._shows_epochs = not self._is_live and not in_notebook()
        live = Live(console=self._console, get_renderable=self._render)
        self.display: AbstractContextManager[object] = live if self._is_live else nullcontext()
        """The table is shown within this context."""

    def log(self, line: str) -> None:
        self._console.print(one_line(line), markup=False, soft_wrap=True)

    def update(self, results: Sequence[TrialResult]) -> None:
        """Take over the results of all trials, the best first."""
        self._num_ended = min(sum(r.state in ENDED for r in results), self._num_trials)
        finished = (r for r in results if r.state == "finished" and r.value is not None)
        self._best = next(finished, None)

    def started(self, run_id: str, config: RunConfig) -> None:
        self._running[run_id] = one_line(config.name), "starting"
        if not self._is_live:
            self.log("  ".join([run_id, *self._running[run_id]]))

    def epoch_ended(self, run_id: str, config: RunConfig, row: Row) -> None:
        scores = f"val_acc {row['val_acc']:.4f}  f1 {row['val_macro_f1']:.4f}"
        progress = f"epoch {row['epoch']:.0f}/{config.num_epochs - 1}  {scores}"
        progress += f"  best {row['best_val_acc']:.4f}"
        self._running[run_id] = one_line(config.name), progress
        if self._shows_epochs:
            self.log("  ".join([run_id, *self._running[run_id]]))

    def ended(self, result: TrialResult) -> None:
        """A trial has ended or was interrupted."""
        name = self._running.pop(result.run_id, (result.strategy, ""))[0]
        self._num_ended_here += result.state in ENDED
        count = (
            f"{self._num_ended}" if self._is_endless else f"{self._num_ended}/{self._num_trials}"
        )
        words = [f"[{count}]", result.run_id, name, result.state]
        words += [f"{self._metric} {result.value:.4f}"] if result.value is not None else []
        words += [f"{result.seconds:.1f} s"] if result.seconds is not None else []
        words += result.reason.splitlines()[:1]
        if not self._is_live and (left := self._time_left()):
            words.append(f"({left} left)")
        self.log("  ".join(words))

    @property
    def _is_endless(self) -> bool:
        return self._num_trials == UNLIMITED

    def _time_left(self) -> str | None:
        """Until all trials have ended if they go on as fast, at most until the deadline."""
        now, seconds = time.monotonic(), math.inf
        if self._num_ended_here and not self._is_endless:
            seconds_per_trial = (now - self._started) / self._num_ended_here
            seconds = seconds_per_trial * (self._num_trials - self._num_ended)
        seconds = min(seconds, max(0.0, self._deadline - now))
        if math.isinf(seconds):
            return None
        return str(timedelta(seconds=round(seconds))).removeprefix("0:")

    def _render(self) -> Group:
        of = "" if self._is_endless else f" of {self._num_trials}"
        title = f"{self._num_ended}{of} done"
        if left := self._time_left():
            title += f", {left} left"
        if best := self._best:
            setting = one_line(f"{best.strategy} {_setting(best)}".strip())
            title += f"; best so far: {setting}, {self._metric} {best.value:.4f}"
        table = Table("running", "", "progress", box=None, pad_edge=False)
        for run_id, name_and_progress in self._running.items():
            table.add_row(run_id, *name_and_progress)
        # The table's own title would be wrapped at the table's width.
        return Group(Text(title, style="italic"), table)


def _setting(result: TrialResult) -> str:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in result.setting.items()}
    return " ".join(f"{name}={value}" for name, value in shown.items())


def final_table(results: Sequence[TrialResult], metric: str = "best_val_acc") -> Table:
    """Every trial, in the given order."""
    columns: dict[str, Callable[[TrialResult], Any]] = {
        "strategy": lambda r: r.strategy,
        "setting": _setting,
        metric: lambda r: _number(r.value, ".4f"),
        "best_val_acc": lambda r: _number(r.best_val_acc, ".4f"),
        "macro F1": lambda r: _number(r.best_val_macro_f1, ".4f"),
        "best epoch": lambda r: _number(r.best_epoch, "d"),
        "seconds": lambda r: _number(r.seconds, ".1f"),
        "state": lambda r: r.state,
        "run": lambda r: r.run_id,
    }
    table = Table(box=None, pad_edge=False)
    for heading in columns:
        is_text = heading in ("strategy", "setting", "state", "run")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for result in results:
        table.add_row(*(one_line(read(result)) for read in columns.values()))
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
