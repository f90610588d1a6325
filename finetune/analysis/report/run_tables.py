"""The page's tables of strategies and runs, and of the data and software that they used."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

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
    columns = [
        Column(comparison.group_title, _group_cell, str),
        Column("accuracy", lambda s: s.accuracy, percent),
        Column("macro F1", lambda s: s.macro_f1, percent),
        Column("runs", lambda s: len(s.runs)),
        Column("lowest", lambda s: _of_several(min, s), percent),
        Column("highest", lambda s: _of_several(max, s), percent),
        Column("seeds", lambda s: len(s.chosen)),
        Column("diverged", lambda s: s.num_diverged),
        *field_columns(comparison.compared, lambda s: s.best),
        Column("best epoch", lambda s: s.best.finished_result.best_epoch),
        Column(
            "minutes", lambda s: s.train_minutes, lambda m: f"{m:.1f}" if m >= 1 else f"{m:.2f}"
        ),
        Column(
            "trained weights",
            lambda s: s.trainable_parameters,
            lambda n: f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n:,}",
        ),
    ]
    return table_section(
        comparison.subject.capitalize(), about, columns, comparison.summaries, num_fixed=4
    )


def _group_cell(summary: StrategySummary) -> str:
    caveats = "".join(f'<span class="caveat">{esc(text)}</span>' for text in summary.caveats)
    return group_label(summary.group) + caveats


def _of_several(extreme: Callable[[list[float]], float], summary: StrategySummary) -> float | None:
    accuracies = [run.accuracy for run in summary.chosen]
    return extreme(accuracies) if len(accuracies) > 1 else None


def finished_runs(comparison: Comparison) -> str:
    runs = comparison.compared
    columns = [
        Column("run", lambda run: run.run_id, code),
        Column(comparison.group_title, lambda run: run.group, group_label),
        Column("accuracy", lambda run: run.accuracy, percent),
        Column("macro F1", lambda run: run.macro_f1, percent),
        Column("loss", lambda run: run.finished_result.best_val_loss, "{:.3f}".format),
        *field_columns(runs),
        Column("seed", lambda run: run.finished_result.seed, str),
        Column("best epoch", lambda run: run.finished_result.best_epoch),
        Column("epochs", lambda run: run.finished_result.epochs_run),
        Column("minutes", lambda run: run.finished_result.train_seconds / 60, "{:.2f}".format),
        Column("pictures/s", lambda run: run.finished_result.images_per_second, "{:.0f}".format),
    ]
    rows = sorted(runs, key=lambda run: -run.accuracy)
    about = f"{num_runs(len(rows))}. "
    return table_section("Finished runs", about, columns, rows, tall=True, num_fixed=4)


def excluded_runs(comparison: Comparison) -> str:
    def state(run: RunRecord) -> str:
        return "diverged" if run.diverged else run.state if run.result is None else "not compared"

    columns = [
        Column("run", lambda run: run.run_id, code),
        Column(comparison.group_title, lambda run: run.group if run.config else None, group_label),
        Column("state", state),
        Column("name", lambda run: run.name),
        Column("reason", lambda run: run.reason or "see the warnings above"),
    ]
    title = "Runs that did not finish or are not compared"
    return table_section(title, "", columns, comparison.excluded, tall=True)


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
    return table_section("Data and software", about, columns, rows)
