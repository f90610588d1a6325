"""The report as one HTML page that needs no other file and no network."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources

from finetune.analysis.by_strategy import StrategySummary, by_group
from finetune.analysis.comparison import Comparison
from finetune.analysis.conclusion import p_value, points
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.report import figures, overview, run_tables, search_figures
from finetune.analysis.report.markup import (
    Column,
    marked,
    place,
    section,
    table_section,
)
from finetune.analysis.report.run_tables import Places
from finetune.analysis.report.traces import colour_of, mark_of
from finetune.analysis.report.winner import winner_section
from finetune.system.errors import MissingPackage
from finetune.system.text import listed

_SIGNIFICANT = '<span class="yes">significant</span>'


def page(
    runs: Sequence[RunRecord],
    comparison: Comparison,
    source: str,
    importances: Mapping[str, float],
    places: Places,
) -> str:
    """The page's HTML; `source` says where the runs are from. Raises `MissingPackage` without
    plotly."""
    sections = [overview.overview(runs, comparison, source)]
    if comparison.winner:
        sections += [
            overview.accuracies(comparison),
            overview.tiles(comparison, comparison.winner, places.runs_dir),
            run_tables.strategies(comparison),
            _differences(comparison),
            section(
                "Accuracy and training time",
                "One point per run, at its best epoch. No run is both quicker and more accurate "
                f"than those on the dotted frontier.{_on_pruned(comparison, 'an open symbol')}",
                _legend(comparison, "symbol is"),
                place(
                    "frontier",
                    figures.accuracy_against_time(comparison.compared, comparison.pruned),
                ),
            ),
            section(
                "Learning curves",
                f"Validation accuracy of the compared runs of each {_each(comparison)}; dotted: "
                f"training accuracy.{_unfreezings(comparison.summaries)}",
                place("curves", figures.learning_curves(comparison.summaries)),
            ),
            _search(comparison, importances),
            winner_section(comparison.winner, [*comparison.varied]),
        ]
    sections += [run_tables.all_runs(comparison, places), run_tables.data_and_software(runs)]
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


def _each(comparison: Comparison) -> str:
    return "network and strategy" if comparison.about_networks else "strategy"


def _legend(comparison: Comparison, what: str) -> str:
    """How strategies and networks are drawn, as HTML; nothing for a single network."""
    if not comparison.about_networks:
        return ""
    groups = by_group(comparison.compared)
    strategies = {g.strategy: marked(g.strategy, colour=colour_of(g)) for g in groups}
    networks = {g.model: marked(g.model, mark_of(g).character) for g in groups}
    return (
        f'<p class="soft">The colour is the strategy: {", ".join(strategies.values())}. '
        f"The {what} the network: {', '.join(networks.values())}.</p>"
    )


def _differences(comparison: Comparison) -> str:
    corrected = (
        "Intervals and p-values are corrected for the number of pairs (Holm, with Shaffer's "
        "counts): with a p below 0.05 the interval excludes 0, and the difference is significant."
    )
    columns = [
        Column("pair", lambda d: f"{d.first} − {d.second}"),
        Column("difference", lambda d: _SIGNIFICANT if d.significant else "not significant", str),
        Column("points", lambda d: d.estimate, points),
        Column("from", lambda d: d.low, points),
        Column("to", lambda d: d.high, points),
        Column("p (Holm)", lambda d: d.p_holm, p_value),
    ]
    title, limits = f"Differences between {comparison.subject}", "other seeds and other pictures"
    if not comparison.about_strategies:
        title = "Differences between these models"
        limits = (
            "other pictures but only for these trained models: with other seeds the order could "
            "change"
        )
        columns.append(Column("p (McNemar)", lambda d: d.p_mcnemar, p_value))
    drawn = comparison.main_differences
    is_part = len(drawn) < len(comparison.differences)
    figure = figures.difference_intervals(drawn, long_names=comparison.has_long_names)
    about = f"95 % intervals for {limits}. {corrected}"
    if is_part:
        about += f" The figure has the pairs with {drawn[0].first}, the table has all pairs."
    rows, drawing = comparison.differences, place("intervals", figure)
    return table_section(title, about, columns, rows, above=drawing, tall=is_part)


def _on_pruned(comparison: Comparison, drawn: str) -> str:
    """How the runs are drawn that early termination ended, if there are any."""
    return f" A run that was pruned has {drawn}." if comparison.pruned else ""


def _unfreezings(summaries: Sequence[StrategySummary]) -> str:
    """When more parts of each group's network start to train, as a sentence."""
    groups: dict[str, list[str]] = defaultdict(list)
    for summary in summaries:
        if starts := figures.unfreezings(summary.chosen[0]):
            epochs = [f"{' and '.join(parts)} from epoch {e}" for e, parts in starts.items()]
            groups[", ".join(epochs)].append(summary.group.in_words)
    sentences = [
        f"{listed(names)} train{'s' * (len(names) == 1)} {what}" for what, names in groups.items()
    ]
    return f" A diamond marks an unfreezing: {'; '.join(sentences)}." if sentences else ""


def _search(comparison: Comparison, importances: Mapping[str, float]) -> str:
    finished, varied = comparison.compared, comparison.varied
    if not varied:
        return ""
    marginal_means = [
        place(f"marginal-{name}", search_figures.marginal_means(finished, name, values))
        for name, values in varied.items()
    ]
    parts = [
        place(
            "parallel",
            search_figures.parallel_coordinates(finished, varied, comparison.pruned),
            wide=True,
        ),
        "<h3>Marginal means</h3>",
        '<p class="soft">Mean accuracy at each value, over all values of the other fields.</p>',
        _legend(comparison, "symbol and the dashes are"),
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
    what = "network, its strategy" if comparison.about_networks else "strategy"
    about = f"One line per run: its {what}, its settings, and its accuracy on the right."
    about += _on_pruned(comparison, "a dotted line")
    return section("The search", about, *parts)
