"""The page's tables of runs, and of the data and software that they used."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from finetune.analysis.by_strategy import value_of, varied_fields
from finetune.analysis.comparison import percent
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.report.markup import (
    Column,
    code,
    esc,
    section,
    split_constant_columns,
    strategy_label,
    table,
)
from finetune.config.field_tables import shown, title


def field_columns(
    runs: Sequence[RunRecord], run_of: Callable[[Any], RunRecord] = lambda run: run
) -> list[Column]:
    """One column per field that differs between these runs; `run_of` gives the run of a row."""

    def column(name: str) -> Column:
        return Column(
            title(name),
            lambda row: value_of(run_of(row), name),
            lambda value: esc(shown(name, value)),
        )

    return [column(name) for name in varied_fields(runs)]


def finished_runs(runs: Sequence[RunRecord]) -> str:
    if not runs:
        return ""
    columns = [
        Column("run", lambda run: run.run_id, code, always=True),
        Column("strategy", lambda run: run.strategy, strategy_label, always=True),
        Column("accuracy", lambda run: run.accuracy, percent, always=True),
        Column("loss", lambda run: run.finished_result.best_val_loss, "{:.3f}".format),
        *field_columns(runs),
        Column("seed", lambda run: run.finished_result.seed, str),
        Column("best epoch", lambda run: run.finished_result.best_epoch),
        Column("epochs", lambda run: run.finished_result.epochs_run),
        Column("minutes", lambda run: run.finished_result.train_seconds / 60, "{:.2f}".format),
        Column("pictures/s", lambda run: run.finished_result.images_per_second, "{:.0f}".format),
    ]
    rows = sorted(runs, key=lambda run: -run.accuracy)
    constant, columns = split_constant_columns(columns, rows)
    about = f"{len(rows)} run{'s' * (len(rows) != 1)}. {constant}"
    return section("Finished runs", about, table(columns, rows, tall=True))


def excluded_runs(runs: Sequence[RunRecord]) -> str:
    if not runs:
        return ""

    def state(run: RunRecord) -> str:
        return "diverged" if run.diverged else run.state if run.result is None else "not compared"

    columns = [
        Column("run", lambda run: run.run_id, code),
        Column("strategy", lambda run: run.strategy if run.config else None, strategy_label),
        Column("state", state),
        Column("name", lambda run: run.name),
        Column("reason", lambda run: run.reason or "see the warnings above"),
    ]
    return section("Runs that did not finish or are not compared", "", table(columns, runs, True))


def data_and_software(runs: Sequence[RunRecord]) -> str:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in [run.result for run in runs if run.result is not None]:
        used = {
            "data": result.dataset_fingerprint,
            "split": result.split_fingerprint,
            "source weights": result.weights_fingerprint or "none (from scratch)",
            "pictures": f"{result.num_train} train, {result.num_val} validation",
            "git commit": result.git_commit or "unknown",
            "threads": result.num_threads,
            **result.versions,
        }
        for what, value in used.items():
            counts[what][str(value)] += 1
    rows = [(what, *pair) for what, values in counts.items() for pair in values.most_common(8)]
    if not rows:
        return ""
    columns = [
        Column("what", lambda row: row[0]),
        Column("value", lambda row: row[1], code),
        Column("runs", lambda row: row[2]),
    ]
    about = "Fingerprints and versions that the finished runs recorded."
    return section("Data and software", about, table(columns, rows))
