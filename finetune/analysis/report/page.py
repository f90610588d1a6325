"""One self-contained HTML page from a comparison.

Turns outcomes and what can be said of them into text that needs nothing but a browser: plotly.js,
style and pictures stand in it. Knows nothing about where runs come from.

    >>> html = page(outcomes, comparison, "runs")  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources

from finetune.analysis.by_strategy import StrategySummary
from finetune.analysis.comparison import CONFIRM, Comparison, p_value, percent, points
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.report import figures
from finetune.analysis.report import search_figures as search
from finetune.analysis.report.markup import (
    Cell,
    Drawn,
    dot,
    esc,
    number,
    section,
    split_constant_columns,
    table,
)
from finetune.analysis.report.runs import ended_well, others, provenance
from finetune.analysis.report.winner import winner_section
from finetune.system.errors import MissingPackage


def page(
    outcomes: Sequence[RunRecord],
    comparison: Comparison,
    place: str,
    importances: Mapping[str, float] | None = None,
) -> str:
    """The whole page. Raises `MissingPackage` without plotly."""
    drawn = Drawn()
    finished = [one for standing in comparison.standings for one in standing.outcomes]
    left_out = {id(one) for one in comparison.others}
    finished = [one for one in finished if one.result and id(one) not in left_out]
    sections = [_opening(outcomes, comparison, place)]
    if finished:
        sections += [
            _strategies(comparison),
            _differences(comparison, drawn),
            section(
                "Accuracy against time",
                "Each point is a run at its best epoch. The dotted frontier joins the runs that "
                "nothing quicker beats.",
                drawn.place("frontier", figures.frontier(finished)),
            ),
            section(
                "Learning curves",
                "Validation accuracy of each strategy's chosen runs; dotted: training accuracy."
                f"{_unfreezing(comparison)}",
                drawn.place("curves", figures.learning_curves(comparison)),
            ),
            _search(finished, importances or {}, drawn),
            winner_section(comparison, drawn),
        ]
    sections += [ended_well(finished), others(comparison), provenance(outcomes)]
    return _document("".join(sections), drawn)


def _document(body: str, drawn: Drawn) -> str:
    files = resources.files("finetune.analysis.report")
    data = json.dumps(drawn.figures, separators=(",", ":")).replace("<", "\\u003c")
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"  # noqa: E501  # fmt: skip
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>Fine-tuning strategies compared</title>
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


def _opening(outcomes: Sequence[RunRecord], comparison: Comparison, place: str) -> str:
    parts = [f"<h1>{esc(comparison.headline)}</h1>"]
    if comparison.advice:
        advice = esc(comparison.advice).replace(CONFIRM, f"<code>{CONFIRM}</code>")
        parts.append(f"<p>{advice}</p>")
    strategies = len({one.strategy for one in outcomes})
    parts.append(
        f'<p class="soft">{len(outcomes)} runs of {strategies} '
        f"strateg{'y' if strategies == 1 else 'ies'} in {esc(place)}, "
        f"{datetime.now():%Y-%m-%d %H:%M}</p>"
    )
    parts += [f'<div class="note warn"><p>{esc(line)}</p></div>' for line in comparison.warnings]
    winner = comparison.winner
    if winner and winner.result:
        result = winner.result
        best = "best fresh run" if comparison.about_strategies else "best run"
        tiles = [(percent(result.best_val_acc), f"{best}, on {result.num_val} pictures")]
        if comparison.corrected and comparison.num_candidates > 1:
            found = comparison.corrected
            tiles.append(
                (
                    percent(found.accuracy),
                    f"corrected for being the best of {comparison.num_candidates} "
                    f"(95 %: {percent(found.low)} to {percent(found.high)})",
                )
            )
        tiles.append((esc(winner.name), f"the winner, seed {result.seed}, run {esc(winner.run_id)}"))  # noqa: E501  # fmt: skip
        ended = Counter(one.state for one in outcomes)
        others = ", ".join(f"{n} {esc(s)}" for s, n in ended.items() if s != "finished")
        tiles.append((f"{ended['finished']}", f"runs ended well{'; ' + others if others else ''}"))
        shown = "".join(
            f'<div class="tile"><b>{big}</b><span>{small}</span></div>' for big, small in tiles
        )
        parts.append(f'<div class="tiles">{shown}</div>')
    return "".join(parts)


def _strategies(comparison: Comparison) -> str:
    about = (
        "Accuracy is the mean over fresh seeds of the chosen setting, range their lowest to "
        "highest; weights are those that train."
        if comparison.about_strategies
        else "Accuracy is that of the best run alone: the more runs, the more it flatters; weights "
        "are those that train."
    )
    heads = (
        *("strategy", "accuracy", "runs", "range", "seeds", "diverged"),
        *("learning rate", "batch", "augmentation", "best epoch", "minutes", "weights"),
    )
    rows = [_strategy_row(one) for one in comparison.standings]
    alike, columns = split_constant_columns(heads, rows, always=("strategy", "accuracy", "runs"))
    return section("Strategies", f"{about} {alike}", table(*columns))


def _range(accuracies: list[float]) -> str:
    """The lowest and the highest of several seeds."""
    if len(accuracies) == 1:
        return "–"
    return f"{points(min(accuracies))} to {percent(max(accuracies))}"


def _strategy_row(standing: StrategySummary) -> list[str | Cell]:
    results = [one.result for one in standing.chosen if one.result]
    accuracies = [one.best_val_acc for one in results]
    config = standing.best.config
    marks = "".join(f'<span class="mark">{esc(mark)}</span>' for mark in standing.marks)
    minutes = sum(one.train_seconds for one in results) / len(results) / 60
    trained = max(one.trainable_parameters for one in results)
    best = standing.best.result
    assert best is not None
    return [
        f"{dot(standing.strategy)}{marks}",
        number(standing.accuracy, percent(standing.accuracy)),
        number(len(standing.outcomes)),
        number(min(accuracies), _range(accuracies)),
        number(len(results)),
        number(standing.num_diverged),
        number(config.get("learning_rate")),
        number(config.get("batch_size")),
        esc(config.get("data_aug")),
        number(best.best_epoch),
        number(minutes, f"{minutes:.1f}" if minutes >= 1 else f"{minutes:.2f}"),
        number(trained, f"{trained / 1e6:.2f} M" if trained >= 1e5 else f"{trained:,}"),
    ]


def _differences(comparison: Comparison, drawn: Drawn) -> str:
    if not comparison.differences:
        return ""
    if comparison.about_strategies:
        title = "Differences between strategies"
        about = (
            "95 % intervals over other seeds and other pictures; p corrected for all pairs (Holm, "
            "with Shaffer's counts). Below 0.05 a difference is told from luck."
        )
    else:
        title = "Differences between these models"
        about = (
            "95 % intervals over other pictures, for these trained models alone: another seed "
            "could turn them. p corrected for all pairs (Holm, with Shaffer's counts)."
        )
    heads = ["pair", "verdict", "points", "from", "to", "p (Holm)"]
    rows: list[list[str | Cell]] = []
    for one in comparison.differences:
        verdict = '<span class="yes">told from luck</span>' if one.significant else "may be luck"
        row: list[str | Cell] = [
            f"{esc(one.first)} − {esc(one.second)}",
            verdict,
            number(one.estimate, points(one.estimate)),
            number(one.low, points(one.low)),
            number(one.high, points(one.high)),
            number(one.p_holm, p_value(one.p_holm)),
        ]
        if one.p_mcnemar is not None:
            row.append(number(one.p_mcnemar, p_value(one.p_mcnemar)))
        rows.append(row)
    if not comparison.about_strategies:
        heads.append("McNemar p")
    drawing = drawn.place("intervals", figures.intervals(comparison))
    return section(title, about, drawing, table(heads, rows))


def _unfreezing(comparison: Comparison) -> str:
    """Where more of each strategy's network starts to train, in words."""
    told = []
    for standing in comparison.standings:
        if starts := figures.unfreezings(standing.chosen[0]):
            moments = ", ".join(
                f"{' and '.join(parts)} from epoch {e}" for e, parts in starts.items()
            )
            told.append(f"{standing.strategy} trains {moments}")
    return f" Diamonds stand where more starts to train: {'; '.join(told)} on." if told else ""


def _search(finished: Sequence[RunRecord], shares: Mapping[str, float], drawn: Drawn) -> str:
    varying = search.varying(finished)
    if not varying:
        return ""
    parts = [
        '<p class="soft">Every line is a run: its strategy and settings, and the accuracy it '
        "reached on the right.</p>",
        drawn.place("parallel", search.parallel_coordinates(finished), wide=True),
        "<h3>Marginal means</h3>",
        '<p class="soft">Mean accuracy at each value, over whatever else varied.</p>',
        '<div class="columns">',
        *(
            drawn.place(f"marginal-{name}", search.marginal_means(finished, name, values))
            for name, values in varying.items()
        ),
        "</div>",
    ]
    if shares:
        parts += [
            "<h3>Importances</h3>",
            '<p class="soft">How much of the accuracy each parameter decides, by Optuna. '
            "Not every combination was tried, so marginal means mix parameters up.</p>",
            drawn.place("importances", search.importances(shares)),
        ]
    return section("The search", "", *parts)
