"""The report as one HTML page that needs no other file and no network."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources

from finetune.analysis.by_strategy import StrategySummary, varied_fields
from finetune.analysis.comparison import CONFIRM, Comparison, num_runs, p_value, percent, points
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.report import figures, run_tables, search_figures
from finetune.analysis.report.markup import Column, esc, place, section, table_section, warning
from finetune.analysis.report.winner import winner_section
from finetune.system.errors import MissingPackage

_SIGNIFICANT = '<span class="yes">significant</span>'


def page(
    runs: Sequence[RunRecord], comparison: Comparison, source: str, importances: Mapping[str, float]
) -> str:
    """The page's HTML; `source` says where the runs are from. Raises `MissingPackage` without
    plotly."""
    sections = [_overview(runs, comparison, source)]
    if comparison.winner:
        sections += [
            run_tables.strategies(comparison),
            _differences(comparison),
            section(
                "Accuracy and training time",
                "One point per run, at its best epoch. No run is both quicker and more accurate "
                "than those on the dotted frontier.",
                place("frontier", figures.accuracy_against_time(comparison.compared)),
            ),
            section(
                "Learning curves",
                "Validation accuracy of each strategy's compared runs; dotted: training accuracy."
                f"{_unfreezings(comparison.summaries)}",
                place("curves", figures.learning_curves(comparison.summaries)),
            ),
            _search(comparison.compared, importances),
            winner_section(comparison.winner),
        ]
    sections += [
        run_tables.finished_runs(comparison.compared),
        run_tables.excluded_runs(comparison.excluded),
        run_tables.data_and_software(runs),
    ]
    return _document("".join(sections))


def _document(body: str) -> str:
    files = resources.files("finetune.analysis.report")
    policy = (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src data: blob:"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>Comparison of fine-tuning strategies</title>
<style>{files.joinpath("page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>{body}</main>
<script>{_plotly()}</script>
<script>{files.joinpath("page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingPackage("plotly", "report", "the report's page") from None
    source: str = get_plotlyjs()
    return source.replace("</script", "<\\/script")


def _overview(runs: Sequence[RunRecord], comparison: Comparison, source: str) -> str:
    advice = esc(comparison.advice).replace(CONFIRM, f"<code>{CONFIRM}</code>")
    strategies = len({run.strategy for run in runs if run.config})
    parts = [
        f"<h1>{esc(comparison.headline)}</h1>",
        f"<p>{advice}</p>" if advice else "",
        f'<p class="soft">{num_runs(len(runs))} of {strategies} '
        f"strateg{'y' if strategies == 1 else 'ies'} in {esc(source)}, "
        f"{datetime.now():%Y-%m-%d %H:%M}</p>",
        *map(warning, comparison.warnings),
    ]
    if comparison.winner:
        tiles = "".join(
            f'<div class="tile"><b>{esc(big)}</b><span>{esc(small)}</span></div>'
            for big, small in _tiles(runs, comparison, comparison.winner)
        )
        parts.append(f'<div class="tiles">{tiles}</div>')
    return "".join(parts)


def _tiles(
    runs: Sequence[RunRecord], comparison: Comparison, winner: RunRecord
) -> list[tuple[str, str]]:
    result, corrected = winner.finished_result, comparison.corrected
    best = "best run with a fresh seed" if comparison.about_strategies else "best run"
    f1 = f"macro F1 {percent(winner.macro_f1)}"
    tiles = [(percent(winner.accuracy), f"{best}, on {result.num_val} pictures; {f1}")]
    if corrected:
        interval = f"{percent(corrected.low)} to {percent(corrected.high)}"
        about = f"corrected for selection from {comparison.num_candidates} runs (95 %: {interval})"
        tiles.append((percent(corrected.accuracy), about))
    tiles.append((winner.name, f"the winner, seed {result.seed}, run {winner.run_id}"))
    states = Counter(run.state for run in runs)
    finished = states.pop("finished")
    unfinished = [f"{count} {state}" for state, count in states.items()]
    return [*tiles, (str(finished), "; ".join(["finished runs", *unfinished]))]


def _differences(comparison: Comparison) -> str:
    corrected = (
        "p-values are corrected for the number of pairs (Holm, with Shaffer's counts); below 0.05 "
        "a difference is significant."
    )
    columns = [
        Column("pair", lambda d: f"{d.first} − {d.second}"),
        Column("difference", lambda d: _SIGNIFICANT if d.significant else "not significant", str),
        Column("points", lambda d: d.estimate, points),
        Column("from", lambda d: d.low, points),
        Column("to", lambda d: d.high, points),
        Column("p (Holm)", lambda d: d.p_holm, p_value),
    ]
    title, limits = "Differences between strategies", "other seeds and other pictures"
    if not comparison.about_strategies:
        title = "Differences between these models"
        limits = (
            "other pictures but only for these trained models: with other seeds the order could "
            "change"
        )
        columns.append(Column("p (McNemar)", lambda d: d.p_mcnemar, p_value))
    drawing = place("intervals", figures.difference_intervals(comparison.differences))
    about = f"95 % intervals for {limits}. {corrected}"
    return table_section(title, about, columns, comparison.differences, above=drawing)


def _unfreezings(summaries: Sequence[StrategySummary]) -> str:
    """When more parts of each strategy's network start to train, as a sentence."""
    sentences = []
    for summary in summaries:
        if starts := figures.unfreezings(summary.chosen[0]):
            epochs = [f"{' and '.join(parts)} from epoch {e}" for e, parts in starts.items()]
            sentences.append(f"{summary.strategy} trains {', '.join(epochs)}")
    return f" A diamond marks an unfreezing: {'; '.join(sentences)}." if sentences else ""


def _search(finished: Sequence[RunRecord], importances: Mapping[str, float]) -> str:
    varied = varied_fields(finished)
    if not varied:
        return ""
    marginal_means = [
        place(f"marginal-{name}", search_figures.marginal_means(finished, name, values))
        for name, values in varied.items()
    ]
    parts = [
        place("parallel", search_figures.parallel_coordinates(finished, varied), wide=True),
        "<h3>Marginal means</h3>",
        '<p class="soft">Mean accuracy at each value, over all values of the other fields.</p>',
        f'<div class="columns">{"".join(marginal_means)}</div>',
    ]
    if importances:
        parts += [
            "<h3>Importances</h3>",
            '<p class="soft">How much each field affects the accuracy, estimated by Optuna. Not '
            "every combination was tried, so that a marginal mean may also show the effect of "
            "other fields.</p>",
            place("importances", search_figures.importance_bars(importances)),
        ]
    about = "One line per run: its strategy, its settings, and its accuracy on the right."
    return section("The search", about, *parts)
