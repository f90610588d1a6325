"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources

from finetune.analysis.by_strategy import StrategySummary, varied_fields
from finetune.analysis.comparison import CONFIRM, Comparison, p_value, percent, points
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.report import figures, search_figures
from finetune.analysis.report.markup import (
    Column,
    PageFigures,
    esc,
    section,
    split_constant_columns,
    strategy_label,
    table,
    warning,
)
from finetune.analysis.report.run_tables import (
    data_and_software,
    excluded_runs,
    field_columns,
    finished_runs,
)
from finetune.analysis.report.winner import winner_section
from finetune.system.errors import MissingPackage


def page(
    runs: Sequence[RunRecord],
    comparison: Comparison,
    source: str,
    importances: Mapping[str, float] | None = None,
) -> str:
    """The page's HTML; `source` says where the runs are from. Raises `MissingPackage` without
    plotly."""
    page_figures = PageFigures()
    sections = [_overview(runs, comparison, source)]
    if comparison.winner:
        sections += [
            _strategies(comparison),
            _differences(comparison, page_figures),
            section(
                "Accuracy and training time",
                "One point per run, at its best epoch. No run is both quicker and more accurate "
                "than those on the dotted frontier.",
                page_figures.add("frontier", figures.accuracy_against_time(comparison.compared)),
            ),
            section(
                "Learning curves",
                "Validation accuracy of each strategy's compared runs; dotted: training accuracy."
                f"{_unfreezings(comparison)}",
                page_figures.add("curves", figures.learning_curves(comparison)),
            ),
            _search(comparison.compared, importances or {}, page_figures),
            winner_section(comparison.winner, page_figures),
        ]
    sections += [
        finished_runs(comparison.compared),
        excluded_runs(comparison.excluded),
        data_and_software(runs),
    ]
    return _document("".join(sections), page_figures)


def _document(body: str, page_figures: PageFigures) -> str:
    files = resources.files("finetune.analysis.report")
    data = json.dumps(page_figures.figures, separators=(",", ":")).replace("<", "\\u003c")
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
<script id="figures" type="application/json">{data}</script>
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
        f'<p class="soft">{len(runs)} run{"s" * (len(runs) != 1)} of {strategies} '
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
    num_val = winner.finished_result.num_val
    best = "best run with a fresh seed" if comparison.about_strategies else "best run"
    tiles = [(percent(winner.accuracy), f"{best}, on {num_val} pictures")]
    if comparison.corrected and comparison.num_candidates > 1:
        corrected = comparison.corrected
        interval = f"{percent(corrected.low)} to {percent(corrected.high)}"
        about = f"corrected for selection from {comparison.num_candidates} runs (95 %: {interval})"
        tiles.append((percent(corrected.accuracy), about))
    seed = winner.finished_result.seed
    tiles.append((winner.name, f"the winner, seed {seed}, run {winner.run_id}"))
    states = Counter(run.state for run in runs)
    unfinished = [f"{count} {state}" for state, count in states.items() if state != "finished"]
    tiles.append((str(states["finished"]), "; ".join(["finished runs", *unfinished])))
    return tiles


def _strategies(comparison: Comparison) -> str:
    fresh = comparison.about_strategies
    about = (
        "Accuracy is the mean over the fresh seeds of the best setting. "
        if fresh
        else "Accuracy is that of the best run, which is too optimistic, the more so the more runs "
        "there are. "
    )
    columns = [
        Column("strategy", _strategy_cell, str, always=True),
        Column("accuracy", lambda s: s.accuracy, percent, always=True),
        Column("runs", lambda s: len(s.runs), always=True),
        Column("lowest", lambda s: min(_seed_accuracies(s), default=None), percent),
        Column("highest", lambda s: max(_seed_accuracies(s), default=None), percent),
        Column("seeds", lambda s: len(s.chosen)),
        Column("diverged", lambda s: s.num_diverged),
        *field_columns(comparison.compared, lambda s: s.best),
        Column("best epoch", lambda s: s.best.finished_result.best_epoch),
        Column(
            "minutes", lambda s: s.train_minutes, lambda m: f"{m:.1f}" if m >= 1 else f"{m:.2f}"
        ),
        Column("trained weights", lambda s: s.trainable_parameters, _in_millions),
    ]
    constant, columns = split_constant_columns(columns, comparison.summaries)
    return section("Strategies", about + constant, table(columns, comparison.summaries))


def _strategy_cell(summary: StrategySummary) -> str:
    caveats = "".join(f'<span class="caveat">{esc(text)}</span>' for text in summary.caveats)
    return strategy_label(summary.strategy) + caveats


def _seed_accuracies(summary: StrategySummary) -> list[float]:
    return [run.accuracy for run in summary.chosen] if len(summary.chosen) > 1 else []


def _in_millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"


def _differences(comparison: Comparison, page_figures: PageFigures) -> str:
    if not comparison.differences:
        return ""
    corrected = (
        "p-values are corrected for the number of pairs (Holm, with Shaffer's counts); below 0.05 "
        "a difference is significant."
    )
    if comparison.about_strategies:
        title = "Differences between strategies"
        about = f"95 % intervals for other seeds and other pictures. {corrected}"
    else:
        title = "Differences between these models"
        about = (
            "95 % intervals for other pictures but only for these trained models: with other seeds "
            f"the order could change. {corrected}"
        )
    columns = [
        Column("pair", lambda d: f"{d.first} − {d.second}"),
        Column(
            "difference",
            lambda d: (
                '<span class="yes">significant</span>' if d.significant else "not significant"
            ),
            str,
        ),
        Column("points", lambda d: d.estimate, points),
        Column("from", lambda d: d.low, points),
        Column("to", lambda d: d.high, points),
        Column("p (Holm)", lambda d: d.p_holm, p_value),
    ]
    if not comparison.about_strategies:
        columns.append(Column("p (McNemar)", lambda d: d.p_mcnemar, p_value))
    drawing = page_figures.add("intervals", figures.difference_intervals(comparison))
    return section(title, about, drawing, table(columns, comparison.differences))


def _unfreezings(comparison: Comparison) -> str:
    """When more parts of each strategy's network start to train, as a sentence."""
    sentences = []
    for summary in comparison.summaries:
        if starts := figures.unfreezings(summary.chosen[0]):
            epochs = [f"{' and '.join(parts)} from epoch {e}" for e, parts in starts.items()]
            sentences.append(f"{summary.strategy} trains {', '.join(epochs)}")
    return f" A diamond marks an unfreezing: {'; '.join(sentences)}." if sentences else ""


def _search(
    finished: Sequence[RunRecord], importances: Mapping[str, float], page_figures: PageFigures
) -> str:
    varied = varied_fields(finished)
    if not varied:
        return ""
    parallel = search_figures.parallel_coordinates(finished)
    parts = [
        page_figures.add("parallel", parallel, wide=True),
        "<h3>Marginal means</h3>",
        '<p class="soft">Mean accuracy at each value, over all values of the other fields.</p>',
        '<div class="columns">',
        *(
            page_figures.add(
                f"marginal-{name}", search_figures.marginal_means(finished, name, values)
            )
            for name, values in varied.items()
        ),
        "</div>",
    ]
    if importances:
        parts += [
            "<h3>Importances</h3>",
            '<p class="soft">How much each field affects the accuracy, estimated by Optuna. Not '
            "every combination was tried, so that a marginal mean may also show the effect of "
            "other fields.</p>",
            page_figures.add("importances", search_figures.importance_bars(importances)),
        ]
    about = "One line per run: its strategy, its settings, and its accuracy on the right."
    return section("The search", about, *parts)
