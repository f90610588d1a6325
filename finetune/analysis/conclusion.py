"""What a comparison says in words: its headline, its advice, and how numbers are written."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from finetune.analysis.by_strategy import StrategySummary
from finetune.analysis.statistics import MIN_SEEDS, Difference
from finetune.system.text import listed, num

if TYPE_CHECKING:
    from finetune.analysis.comparison import Comparison

CONFIRM = "python -m finetune confirm RUNS_DIR"
_MAX_NAMED = 4
"""The most groups that the conclusion names as equal or worse."""


def num_runs(count: int) -> str:
    return num(count, "run")


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.1f} %"


def points(difference: float) -> str:
    return f"{100 * difference:.1f}"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def advice(comparison: "Comparison") -> str:
    """What a comparison of the groups still needs; empty if nothing."""
    if comparison.about_strategies or len(comparison.summaries) < 2:
        return ""
    subject, needed = comparison.subject, f"needs at least {MIN_SEEDS}"
    opening = (
        f"This compares these models, not the {subject}: with other seeds the order could change."
    )
    if comparison.about_settings:
        return (
            f"{opening} A comparison of settings {needed} seeds of each: in the sweep file, seed: "
            f"{{values: [1, 2, 3]}}. Fresh seeds of the best one: {CONFIRM}"
        )
    each = "network with each strategy" if comparison.about_networks else "strategy"
    return (
        f"{opening} A comparison of {subject} {needed} fresh seeds of each {each}'s best setting: "
        f"{CONFIRM}"
    )


def headline(comparison: "Comparison") -> str:
    """The conclusion in one or two sentences."""
    if not comparison.summaries:
        return "No run that can be compared has finished yet."
    leader, *rivals = comparison.summaries
    if not rivals:
        return _alone(comparison, leader)
    differences = {d.second: d for d in comparison.differences if d.first == str(leader.group)}
    compared = [rival for rival in rivals if str(rival.group) in differences]
    similar = [rival for rival in compared if not differences[str(rival.group)].significant]
    worse = {s: differences[str(s.group)] for s in compared if s not in similar}
    if comparison.about_strategies:
        return _verdict(leader, worse, similar)
    highest = max(run.accuracy for run in comparison.compared)
    what = "model found" if leader.best.accuracy == highest else "setting's best model"
    text = f"The best {what} is {leader.best.name} at {percent(leader.best.accuracy)}"
    text += _correction(comparison)
    if not worse:
        others = "others" if comparison.about_networks else f"other {comparison.subject}"
        return f"{text}; no significant difference from the {others}' best models."
    limitation = max([rival.limitation for rival in worse], key=len)
    text += f"; it beats the best model of {_names(worse)}{limitation}"
    if similar:
        text += f", with no significant difference from {_names(similar)}"
    return f"{text}."


def title(comparison: "Comparison") -> str:
    """The headline, shortened to one sentence on the leader and on what is clearly worse."""
    if len(comparison.summaries) < 2:
        return headline(comparison)
    leader, *rivals = comparison.summaries
    reached = percent(leader.accuracy)
    ahead = [leader, *(rival for rival in rivals if percent(rival.accuracy) == reached)]
    names = leader.best.name if leader.group.setting and len(ahead) == 1 else _names(ahead)
    opening = f"{names} {'leads' if len(ahead) == 1 else 'lead'} with {reached}"
    significant = {
        d.second: d.significant for d in comparison.differences if d.first == str(leader.group)
    }
    compared = [rival for rival in rivals if str(rival.group) in significant]
    worse = [rival for rival in compared if significant[str(rival.group)]]
    if not worse:
        return f"{opening}, but no difference is significant"
    if len(worse) == len(compared):
        rest = "all others are" if len(worse) > 1 else f"{_names(worse)} is"
        return f"{opening}; {rest} clearly worse"
    return f"{opening}; only {_names(worse)} {'is' if len(worse) == 1 else 'are'} clearly worse"


def _alone(comparison: "Comparison", leader: StrategySummary) -> str:
    """About the settings of a single group."""
    num_settings, group = len({run.setting for run in comparison.compared}), leader.group.in_words
    others = {run.group for run in comparison.excluded if run.config} - {leader.group}
    only = f"Only {group} has finished runs: " * bool(others)
    if len(leader.chosen) > 1:
        mean = f"{percent(leader.accuracy)}, the mean of {len(leader.chosen)} fresh seeds"
        of = f", the best of {num_settings} settings in the search," if num_settings > 1 else ""
        return f"{only}{leader.best.name}{of} reaches {mean}."
    accuracy = percent(leader.best.accuracy) + _correction(comparison)
    if num_settings > 1:
        setting = f"{'the' if only else 'The'} best of {num_settings} settings of {group}"
        return f"{only}{setting} is {leader.best.name} at {accuracy}."
    return f"{only}{leader.best.name} reaches {accuracy}."


def _correction(comparison: "Comparison") -> str:
    if comparison.corrected is None:
        return ""
    corrected = percent(comparison.corrected.accuracy)
    return f" ({corrected} corrected for selection from {comparison.num_candidates} runs)"


def _names(summaries: Iterable[StrategySummary]) -> str:
    """The groups' names; of several settings only their number."""
    groups = [summary.group for summary in summaries]
    if len(groups) > 2 and groups[0].setting:
        return f"{len(groups)} settings"
    return listed([group.in_words for group in groups], at_most=_MAX_NAMED)


def _verdict(
    leader: StrategySummary,
    worse: Mapping[StrategySummary, Difference],
    similar: Sequence[StrategySummary],
) -> str:
    kind = "seeds" if leader.group.setting else "fresh seeds"
    if similar:
        seeds = min(len(summary.chosen) for summary in (leader, *worse, *similar))
        opening = f"{_tie([leader, *similar])} over {seeds} {kind}"
    else:
        won = "is best: " if leader.group.model or leader.group.setting else "wins with "
        mean = f"{percent(leader.accuracy)}, the mean of {len(leader.chosen)} {kind}"
        opening = f"{leader.group.in_words} {won}{mean}"
    losses = [
        f"{rival.group.in_words} is {points(abs(difference.estimate))} points "
        f"worse{rival.limitation}"
        for rival, difference in worse.items()
    ]
    if len(losses) > _MAX_NAMED:
        rest = {s: abs(d.estimate) for s, d in [*worse.items()][1:]}
        span = f"{points(min(rest.values()))} to {points(max(rest.values()))}"
        limitation = max([rival.limitation for rival in rest], key=len)
        losses[1:] = [f"the other {len(rest)} are {span} points worse{limitation}"]
    return f"{'; '.join([opening, *losses])}."


def _tie(best: Sequence[StrategySummary]) -> str:
    """Groups without a significant difference, and the network or the strategy that all have."""
    groups = [summary.group for summary in best]
    shared, names = "", [group.in_words for group in groups]
    if groups[0].setting:
        pass
    elif len({group.model for group in groups}) == 1 and groups[0].model:
        shared, names = groups[0].model, [group.strategy for group in groups]
    elif len({group.strategy for group in groups}) == 1:
        shared, names = groups[0].strategy, [group.model for group in groups]
    reached = [f"{n} ({percent(s.accuracy)})" for n, s in zip(names, best, strict=True)]
    tie = f"o significant difference between {listed(reached, _MAX_NAMED + 1)}"
    return f"{shared} is best, with n{tie}" if shared else f"N{tie}"
