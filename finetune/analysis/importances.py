"""How much each searched parameter matters, where the search was not a grid.

Turns outcomes into shares by Optuna's PED-ANOVA (Watanabe, Bansal & Hutter 2023,
https://arxiv.org/abs/2304.10255), a setting counted once however many seeds it had. A grid needs
none: its marginal means say it.

    >>> importances(outcomes)  # doctest: +SKIP
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from finetune.analysis.by_strategy import by_setting, mean_accuracy
from finetune.analysis.read_runs import RunRecord

FEWEST_SETTINGS = 10
_PARAMETERS = (
    *("strategy", "learning_rate", "batch_size", "data_aug", "weight_decay", "label_smoothing"),
    *("momentum", "lr_schedule", "image_size", "epochs"),
)


def importances(outcomes: Sequence[RunRecord]) -> dict[str, float]:
    """Share of each parameter, the largest first; nothing for a grid, few runs, or no Optuna."""
    finished = by_setting([one for one in outcomes if one.result is not None])
    tried = [one for one in outcomes if one.config]  # a diverged run is a point of its grid too
    values = {name: {one.config.get(name) for one in tried} for name in _PARAMETERS}
    searched = {name: found for name, found in values.items() if len(found) > 1}
    settings = {tuple(one.config.get(name) for name in searched) for one in tried}
    is_grid = len(settings) == math.prod(map(len, searched.values()))
    if len(finished) < FEWEST_SETTINGS or not searched or is_grid:
        return {}
    try:
        import optuna
    except ImportError:
        return {}
    return _shares(optuna, finished, searched)


def _shares(
    optuna: Any, finished: Sequence[Sequence[RunRecord]], searched: dict[str, set[Any]]
) -> dict[str, float]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {name: _distribution(optuna, found) for name, found in searched.items()}
    study = optuna.create_study(direction="maximize")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for runs in finished:
            study.add_trial(
                optuna.trial.create_trial(
                    params={name: runs[0].config.get(name) for name in searched},
                    distributions=distributions,
                    value=mean_accuracy(runs),
                )
            )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found: dict[str, float] = optuna.importance.get_param_importances(
            study, evaluator=evaluator
        )
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _distribution(optuna: Any, values: set[Any]) -> Any:
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values) or len(numbers) <= 4:
        return optuna.distributions.CategoricalDistribution(sorted(values, key=str))
    low, high = float(min(numbers)), float(max(numbers))
    return optuna.distributions.FloatDistribution(low, high, log=low > 0 and high / low > 20)
