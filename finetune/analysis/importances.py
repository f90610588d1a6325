"""How much each searched field affects the accuracy, for searches that are not a grid.

The importances are Optuna's PED-ANOVA (Watanabe, Bansal & Hutter 2023,
https://arxiv.org/abs/2304.10255), with one trial per setting. For a grid the marginal means show
the same.
"""

import itertools
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from finetune.analysis.by_strategy import by_setting, mean_accuracy, value_of, varied_fields
from finetune.analysis.read_runs import RunRecord

MIN_SETTINGS = 10


def field_importances(runs: Sequence[RunRecord]) -> dict[str, float]:
    """The importance of each varied field, as shares that sum to 1, the largest first.

    Empty for a grid, for fewer than `MIN_SETTINGS` settings, or without Optuna.
    """
    compared = [run for run in runs if run.result is not None]
    finished = by_setting(compared)
    fields = ["strategy", *varied_fields(compared)]
    values = {name: {value_of(run, name) for run in compared} for name in fields}
    values = {name: found for name, found in values.items() if len(found) > 1}
    # a diverged or pruned run is part of its grid too
    tried = {tuple(value_of(run, name) for name in values) for run in runs if run.config}
    is_grid = tried.issuperset(itertools.product(*values.values()))
    if len(finished) < MIN_SETTINGS or not values or is_grid:
        return {}
    try:
        import optuna
    except ImportError:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {name: _distribution(optuna, found) for name, found in values.items()}
    study = optuna.create_study(direction="maximize")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for repeats in finished.values():
            params = {name: value_of(repeats[0], name) for name in values}
            trial: dict[str, Any] = {"params": params, "distributions": distributions}
            study.add_trial(optuna.trial.create_trial(value=mean_accuracy(repeats), **trial))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _distribution(optuna: Any, values: Collection[Any]) -> Any:
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values) or len(numbers) <= 4:
        return optuna.distributions.CategoricalDistribution(sorted(values, key=str))
    low, high = float(min(numbers)), float(max(numbers))
    return optuna.distributions.FloatDistribution(low, high, log=low > 0 and high / low > 20)
