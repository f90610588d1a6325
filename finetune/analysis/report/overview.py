"""The page's beginning: the headline, the accuracies, and tiles with what comes next."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from finetune.analysis.comparison import Comparison
from finetune.analysis.conclusion import CONFIRM, num_runs, percent
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.report.group_figures import group_accuracies
from finetune.analysis.report.markup import esc, place, section, warning
from finetune.runs.run_dir import RunDir
from finetune.system.errors import RunDirError
from finetune.system.text import command_line, num


def overview(runs: Sequence[RunRecord], comparison: Comparison, source: str) -> str:
    advice = esc(comparison.advice).replace(CONFIRM, f"<code>{CONFIRM}</code>")
    return "".join(
        [
            f"<h1>{esc(comparison.title)}</h1>",
            f"<p>{esc(comparison.headline)}</p>" * (comparison.title != comparison.headline),
            f"<p>{advice}</p>" if advice else "",
            f'<p class="soft">{esc(_about(runs, source))}</p>',
            *map(warning, comparison.warnings),
        ]
    )


def _about(runs: Sequence[RunRecord], source: str) -> str:
    states = Counter(run.state for run in runs)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    kinds = f"{num_runs(len(runs))} of {_number_of_groups(runs)} in {source}"
    return f"{kinds}: {counts}; {datetime.now():%Y-%m-%d %H:%M}"


def _number_of_groups(runs: Sequence[RunRecord]) -> str:
    groups = {run.group for run in runs if run.config}
    models, strategies = ({g.model for g in groups}, {g.strategy for g in groups})
    networks = f"{len(models)} networks and " if len(models) > 1 else ""
    return networks + num(len(strategies), "strategy", "strategies")


def accuracies(comparison: Comparison) -> str:
    """The figure of all groups, which comes first."""
    several = "the mean of fresh seeds, with its 95 % interval for other seeds and other pictures"
    single = (
        "the best run, with its 95 % interval for other pictures. It is too optimistic, the more "
        "so the more runs there are"
    )
    about = (
        f"The large mark is {several if comparison.about_strategies else single}; each small dot "
        "is a run."
    )
    kind = comparison.group_title.partition(":")[0]
    title = f"Accuracy by {kind.replace(', ', ' and ')}"
    return section(title, about, place("accuracies", group_accuracies(comparison)))


def tiles(comparison: Comparison, winner: RunRecord, runs_dir: Path) -> str:
    corrected, result = comparison.corrected, winner.finished_result
    best = "best run with a fresh seed" if comparison.about_strategies else "best run"
    f1 = f"macro F1 {percent(winner.macro_f1)}"
    shown = [(esc(percent(winner.accuracy)), f"{best}, on {result.num_val} pictures; {f1}")]
    if corrected:
        interval = f"{percent(corrected.low)} to {percent(corrected.high)}"
        about = f"corrected for selection from {comparison.num_candidates} runs (95 %: {interval})"
        shown.append((esc(percent(corrected.accuracy)), about))
    evaluated = _test_accuracy(winner)
    shown += [evaluated] if evaluated else []
    shown.append(
        (
            f"<small>{esc(winner.name)}</small>",
            f"the winner, seed {result.seed}, run {winner.run_id}",
        )
    )
    command, purpose = next_step(comparison, winner, runs_dir)
    shown.append((f"<code>{esc(command)}</code>", f"next: {purpose}"))
    inner = "".join(
        f'<div class="tile"><b>{big}</b><span>{esc(small)}</span></div>' for big, small in shown
    )
    return f'<div class="tiles">{inner}</div>'


def _test_accuracy(winner: RunRecord) -> tuple[str, str] | None:
    """The latest evaluation of the winner, if there is one."""
    try:
        records = RunDir(winner.run_dir).read_evaluations()
    except RunDirError:  # the winner's section says so
        return None
    if not records:
        return None
    record = records[-1]
    pictures = f"on {num(record['num_pictures'], 'picture')} of {Path(record['folder']).name}/"
    return esc(percent(record["accuracy"])), f"test accuracy of the winner, {pictures}"


def next_step(comparison: Comparison, winner: RunRecord, runs_dir: Path) -> tuple[str, str]:
    """The next command and what it is for."""
    start = ("-m", "finetune")
    is_confirmed = comparison.about_strategies or len(comparison.summaries[0].chosen) > 1
    if not is_confirmed and len(comparison.compared) > 1:
        return command_line(*start, "confirm", runs_dir), "fresh seeds of each best setting"
    if not _test_accuracy(winner):
        purpose = "the winner's accuracy on pictures that nothing was chosen by"
        return command_line(*start, "evaluate", winner.run_dir), purpose
    return command_line(*start, "predict", winner.run_dir, "PICTURES"), "the winner on new pictures"
