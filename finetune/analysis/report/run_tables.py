"""The page's tables of strategies and runs, and of the data and software that they used."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finetune.analysis.by_strategy import StrategySummary, value_of, varied_fields
from finetune.analysis.comparison import Comparison
from finetune.analysis.conclusion import num_runs, percent
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.report.markup import Column, code, esc, group_label, table_section
from finetune.config.field_tables import shown, title


def field_columns(
    runs: Sequence[RunRecord], run_of: Callable[[Any], RunRecord] = lambda run: run
) -> list[Column]:
    """One column per field that differs between these runs; `run_of` gives the run of a row."""

    def column(name: str) -> Column:
        def value(row: Any) -> Any:
            return value_of(run_of(row), name)

        return Column(title(name), value, lambda value: esc(shown(name, value)))

    return [column(name) for name in varied_fields(runs) if name != "model"]  # a group has it


def strategies(comparison: Comparison) -> str:
    about = (
        "Accuracy and macro F1 are the means over the fresh seeds of the best setting. "
        if comparison.about_strategies
        else "Accuracy and macro F1 are those of the best run, which are too optimistic, the more "
        "so the more runs there are. "
    )
    compared = comparison.compared
    columns = [
        Column(comparison.group_title, lambda s: s.group, group_label),
        Column("accuracy", lambda s: s.accuracy, percent),
        Column("macro F1", lambda s: s.macro_f1, percent),
        Column("runs", lambda s: len(s.runs)),
        Column("lowest", lambda s: _of_several(min, s), percent),
        Column("highest", lambda s: _of_several(max, s), percent),
        Column("seeds", lambda s: len(s.chosen)),
        Column("diverged", lambda s: s.num_diverged),
        *([] if comparison.about_settings else field_columns(compared, lambda s: s.best)),
        Column("best epoch", lambda s: s.best.finished_result.best_epoch),
        Column("training", lambda s: s.train_seconds, duration),
        Column(
            "trained weights",
            lambda s: s.trainable_parameters,
            lambda n: f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n:,}",
        ),
    ]
    return table_section(
        comparison.subject.capitalize(),
        about,
        columns,
        comparison.summaries,
        num_fixed=4,
        note=lambda summary: "; ".join(summary.caveats),
    )


def _of_several(extreme: Callable[[list[float]], float], summary: StrategySummary) -> float | None:
    accuracies = [run.accuracy for run in summary.chosen]
    return extreme(accuracies) if len(accuracies) > 1 else None


@dataclass(frozen=True)
class Places:
    """Where the page's links lead."""

    runs_dir: Path
    out: Path
    """The folder of the page."""
    project_url: str = ""
    """Of the W&B project from which the runs are, if they are."""

    def directory(self, run: RunRecord) -> str:
        """The link to a run's directory, relative to the page."""
        return quote(os.fsencode(os.path.relpath(run.run_dir, self.out)))

    def wandb(self, run: RunRecord) -> str | None:
        """The run's page in W&B, if it was logged online by an entity that is known."""
        if self.project_url:
            return f"{self.project_url}/runs/{run.run_id}"
        entity, project = run.config.get("entity"), run.config.get("project")
        if not (entity and project and any(run.run_dir.glob("wandb/run-*"))):
            return None
        return f"https://wandb.ai/{quote(entity)}/{quote(project)}/runs/{run.run_id}"


def all_runs(comparison: Comparison, places: Places) -> str:
    """Every run: the compared ones, the most accurate first, the pruned ones, then the others."""

    def state(run: RunRecord) -> str:
        if run.diverged:
            return "diverged"
        is_apart = run.result is not None and run not in compared
        return "not compared" if is_apart else run.state

    def of_result(name: str) -> Callable[[RunRecord], Any]:
        return lambda run: getattr(run.result, name, None)

    def directory(run: RunRecord) -> str:
        link = f'<a href="{esc(places.directory(run))}">{code(run.run_id)}</a>'
        url = places.wandb(run)
        return f'{link} <a href="{esc(url)}">W&amp;B</a>' if url else link

    group = Column(comparison.group_title, lambda r: r.group if r.config else None, group_label)
    compared = {*comparison.compared}
    is_scored = compared | {*comparison.pruned}
    columns = [
        Column("run", lambda run: run, directory),
        *([] if comparison.about_settings else [group]),
        Column("accuracy", lambda run: run.accuracy if run in is_scored else None, percent),
        Column("state", state),
        Column("macro F1", lambda run: run.macro_f1 if run.result else None, percent),
        Column("loss", of_result("best_val_loss"), "{:.3g}".format),
        *field_columns(comparison.compared),
        Column("seed", lambda run: run.config.get("seed")),
        Column("best epoch", of_result("best_epoch")),
        Column("epochs", lambda run: len(run.rows)),
        Column("training", of_result("train_seconds"), duration),
        Column("pictures/s", of_result("images_per_second"), "{:.0f}".format),
    ]
    best_first = sorted(comparison.compared, key=lambda run: -run.accuracy)
    rows = [*best_first, *comparison.pruned, *comparison.excluded]
    about = f"{num_runs(len(rows))}. Macro F1 and loss are those of the most accurate epoch. "
    notes = {run: " ".join(run.reason.split()) for run in rows}
    given = ("All runs", about, columns, rows)
    has_filter = len(rows) > 8
    return table_section(
        *given, tall=True, num_fixed=4, note=notes.__getitem__, with_filter=has_filter
    )


def duration(seconds: float) -> str:
    """
    >>> duration(0.42), duration(75), duration(600)
    ('0.4 s', '75 s', '10.0 min')
    """
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"


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
    columns = [
        Column("what", lambda row: row[0]),
        Column("value", lambda row: row[1], code),
        Column("runs", lambda row: row[2]),
    ]
    rows = [(what, *pair) for what, values in counts.items() for pair in values.most_common(8)]
    about = "Fingerprints and versions that the finished runs recorded."
    return table_section("Data and software", about, columns, rows, folded=True)
