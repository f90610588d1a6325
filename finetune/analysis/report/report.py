"""What came of runs, to look at: one page, a table for other tools, and a few lines here.

Turns a folder of run directories into report.html, runs.csv and the answer on the terminal.
Judging is `finetune.analysis.comparison`'s.

    python -m finetune report runs
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.analysis.by_strategy import accuracy_of
from finetune.analysis.comparison import Comparison, compare, p_value, percent, points
from finetune.analysis.read_runs import RunRecord, read_runs
from finetune.system.errors import RunDirError
from finetune.system.files import write_atomically
from finetune.system.text import one_line

PAGE, TABLE = "report.html", "runs.csv"


def report(runs_dir: Path, out: Path | None = None, wandb: str | None = None) -> int:
    """Write OUT/report.html and OUT/runs.csv (default: into `runs_dir`) and print the answer.

    `wandb`, as ENTITY/PROJECT/SWEEP, is fetched into `runs_dir` first, and reported on alone.
    Raises `RunDirError` where there are no runs, or OUT can't be written.
    """
    from finetune.analysis.importances import importances
    from finetune.analysis.report.page import page

    if wandb is None:
        source, outcomes = str(runs_dir), read_runs(runs_dir)
    else:
        from finetune.tracking.from_wandb import fetch_sweep

        source, outcomes = wandb, read_runs(fetch_sweep(wandb, runs_dir))
    comparison = compare(outcomes)
    print(summary(comparison))
    out = out or runs_dir
    foreign = {id(one) for one in comparison.others if one.result is not None}
    shares = importances([one for one in outcomes if id(one) not in foreign])
    content = page(outcomes, comparison, source, shares)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / TABLE, _encoded(runs_csv(outcomes)))
        write_atomically(out / PAGE, _encoded(content))
    except OSError as error:
        raise RunDirError(f"{out} can't be written: {error.strerror or error}") from None
    print(f"\n{out / PAGE} ({len(content) / 1e6:.1f} MB)\n{out / TABLE}")
    return 0


def _encoded(content: str) -> bytes:
    return content.encode("utf-8", "backslashreplace")  # names may hold bytes that are no text


def runs_csv(outcomes: Sequence[RunRecord]) -> str:
    """A row a run, whatever its end: what it was given, and what came of it."""
    rows: list[dict[str, Any]] = []
    for one in outcomes:
        row: dict[str, Any] = {"run_id": one.run_id, "state": one.state, "reason": one.reason}
        if one.result is not None:
            values = one.result.model_dump(exclude={"config", "versions", "prefix_timings"})
            row |= {k: v for k, v in values.items() if not isinstance(v, list)}
        rows.append(row | {k: v for k, v in one.config.items() if k not in row} | _place(one))
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _place(outcome: RunRecord) -> dict[str, str]:
    return {"run_dir": str(outcome.run_dir)}


def summary(comparison: Comparison) -> str:
    """The page in short, for a terminal."""
    lines = textwrap.wrap(comparison.headline, 96)
    if comparison.advice:
        lines += ["", *textwrap.wrap(comparison.advice, 96)]
    if comparison.standings:
        lines += ["", *_strategy_lines(comparison)]
    if comparison.winner and comparison.corrected and comparison.num_candidates > 1:
        accuracy, corrected = accuracy_of(comparison.winner), comparison.corrected.accuracy
        lines += [
            "",
            f"the winner: {comparison.winner.run_dir} at {percent(accuracy)}, {percent(corrected)} "
            f"once corrected for being the best of {comparison.num_candidates}",
        ]
    if comparison.differences:
        width = max(len(f"{d.first} - {d.second}") for d in comparison.differences)
        of = "strategies" if comparison.about_strategies else "these models"
        lines += ["", f"differences of {of}, in points of accuracy (95 % interval)"]
        lines += [
            f"  {f'{d.first} - {d.second}':{width}} {points(d.estimate):>6} "
            f"({points(d.low):>5} to {points(d.high):>5})  p {p_value(d.p_holm):>7}  "
            f"{'told from luck' if d.significant else 'may be luck'}"
            for d in comparison.differences
        ]
    lines += ["", *(f"warning: {line}" for line in comparison.warnings)]
    failed = [one for one in comparison.others if one.result is None]
    if failed:
        runs = "1 run" if len(failed) == 1 else f"{len(failed)} runs"
        first = f"{failed[0].run_id}: {failed[0].reason}"
        lines.append(f"{runs} did not end well; the first, {first}")
    return "\n".join(map(one_line, lines)).rstrip()


def _strategy_lines(comparison: Comparison) -> list[str]:
    rows = [("strategy", "accuracy", "seeds", "runs", "diverged", "setting of the best")]
    rows += [
        (
            one.strategy,
            percent(one.accuracy),
            str(len(one.chosen)),
            str(len(one.outcomes)),
            str(one.num_diverged),
            "; ".join([one.best.name, *one.marks]),
        )
        for one in comparison.standings
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [
        "  ".join(
            [f"{row[0]:{widths[0]}}", *(f"{row[i]:>{widths[i]}}" for i in range(1, 5)), row[5]]
        )
        for row in rows
    ]
