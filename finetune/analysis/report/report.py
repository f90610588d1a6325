"""The report on a folder of runs: an HTML page, a table of all runs, and a summary on the terminal.

python -m finetune report runs
"""

import csv
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.analysis.comparison import Comparison, compare
from finetune.analysis.conclusion import num_runs, p_value, percent, points
from finetune.analysis.read_runs import RunRecord, read_runs
from finetune.system.errors import RunDirError
from finetune.system.files import write_atomically
from finetune.system.text import one_line

PAGE, TABLE = "report.html", "runs.csv"
_TERMINAL_WIDTH = 96


def report(runs_dir: Path, out: Path | None = None, wandb: str | None = None) -> int:
    """Write OUT/report.html and OUT/runs.csv (default: in `runs_dir`) and print a summary.

    The runs of a W&B sweep, `wandb` as ENTITY/PROJECT/SWEEP, are first downloaded to `runs_dir`;
    then the report is about them only.
    """
    from finetune.analysis.report.overview import next_step

    comparison = print_report(runs_dir, out or runs_dir, wandb)
    if wandb is None and comparison.winner:  # fetched runs have no checkpoints
        command, purpose = next_step(comparison, comparison.winner, runs_dir)
        print(f"next: {command}    # {purpose}")
    return 0


def print_report(runs_dir: Path, out: Path, wandb: str | None = None) -> Comparison:
    """Write the page and the table, and print a summary and where they are."""
    comparison = write_report(runs_dir, out, wandb)
    print(terminal_summary(comparison))
    print(f"\n{out / PAGE} ({(out / PAGE).stat().st_size / 1e6:.1f} MB)\n{out / TABLE}")
    return comparison


def write_report(runs_dir: Path, out: Path, wandb: str | None = None) -> Comparison:
    """Write the page and the table; the comparison that they show.

    Raises `RunDirError` if there are no runs, or `out` can't be written.
    """
    from finetune.analysis.importances import field_importances
    from finetune.analysis.report.page import page
    from finetune.analysis.report.run_tables import Places

    if wandb is None:
        source, runs = str(runs_dir), read_runs(runs_dir)
    else:
        from finetune.tracking.from_wandb import fetch_sweep

        source, runs = wandb, read_runs(fetch_sweep(wandb, runs_dir))
    comparison = compare(runs)
    unfinished = [run for run in comparison.excluded if run.result is None]
    importances = field_importances([*comparison.compared, *comparison.pruned, *unfinished])
    project = f"https://wandb.ai/{wandb.rpartition('/')[0]}" if wandb else ""
    content = page(runs, comparison, source, importances, Places(runs_dir, out, project))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in ((TABLE, runs_csv(runs)), (PAGE, content)):
            # names may hold undecodable bytes
            write_atomically(out / name, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise RunDirError(f"{out} can't be written: {error.strerror or error}") from None
    return comparison


def runs_csv(runs: Sequence[RunRecord]) -> str:
    """One row per run, finished or not, with its config and its result."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        row: dict[str, Any] = {"run_id": run.run_id, "state": run.state, "reason": run.reason}
        row |= {name: run.config.get(name) for name in ("model", "strategy")}
        if run.result is not None:
            values = run.result.model_dump(exclude={"config"})
            row |= {k: v for k, v in values.items() if not isinstance(v, list | dict)}
        config = {name: value for name, value in run.config.items() if name not in row}
        rows.append(row | config | {"run_dir": str(run.run_dir)})
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def terminal_summary(comparison: Comparison) -> str:
    """The main results of the page as lines of text."""
    lines = textwrap.wrap(comparison.headline, _TERMINAL_WIDTH)
    if comparison.advice:
        lines += ["", *textwrap.wrap(comparison.advice, _TERMINAL_WIDTH)]
    if comparison.summaries:
        lines += ["", *_strategy_lines(comparison)]
    if comparison.winner and comparison.corrected:
        accuracy, corrected = comparison.winner.accuracy, comparison.corrected.accuracy
        lines += [
            "",
            f"winner: {comparison.winner.run_dir} with {percent(accuracy)}; {percent(corrected)} "
            f"corrected for selection from {comparison.num_candidates} runs",
        ]
    if comparison.differences:
        lines += ["", *_difference_lines(comparison)]
    lines += ["", *(f"warning: {line}" for line in comparison.warnings)]
    if count := len(comparison.pruned):
        lines.append(f"{num_runs(count)} pruned by early termination, counted in the correction")
    unfinished = [run for run in comparison.excluded if run.result is None]
    if unfinished:
        first = f"{unfinished[0].run_id}: {' '.join(unfinished[0].reason.split())}"
        lines.append(f"{num_runs(len(unfinished))} did not finish; the first is {first}")
    return "\n".join(map(one_line, lines)).rstrip()


def _strategy_lines(comparison: Comparison) -> list[str]:
    rows: list[tuple[str, ...]] = [
        (comparison.group_title, "accuracy", "macro F1", "seeds", "runs", "diverged", "best run")
    ]
    for summary in comparison.summaries:
        numbers = (len(summary.chosen), len(summary.runs), summary.num_diverged)
        scores = (percent(summary.accuracy), percent(summary.macro_f1))
        rows.append((str(summary.group), *scores, *map(str, numbers), summary.best.name))
    notes = [f"{s.group}: {'; '.join(s.caveats)}" for s in comparison.summaries if s.caveats]
    return [*_aligned(rows), *_indented(notes)]


def _indented(notes: Sequence[str]) -> list[str]:
    wrapper = textwrap.TextWrapper(_TERMINAL_WIDTH, "  ", "    ")
    return [line for note in notes for line in wrapper.wrap(note)]


def _difference_lines(comparison: Comparison) -> list[str]:
    what = comparison.subject if comparison.about_strategies else "these models"
    shown = comparison.main_differences
    left_out = len(comparison.differences) - len(shown)
    more = f"; the page has the other {left_out} pairs" * bool(left_out)
    rows = [
        (
            f"  {d.first} - {d.second}",
            points(d.estimate),
            f"({points(d.low)} to {points(d.high)})",
            f"p {p_value(d.p_holm)}",
            "significant" if d.significant else "not significant",
        )
        for d in shown
    ]
    head = (
        f"differences between {what}, in percentage points (95 % interval, corrected like p){more}"
    )
    return [head, *_aligned(rows)]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, all but the first and the last column aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:]), row[-1]])
        for row in rows
    ]
