"""A sweep's method, dimensions and early termination as Optuna's samplers and pruners."""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from finetune.sweep.distributions import Dimension, Value
from finetune.sweep.spec import EarlyTermination, Sweep

optuna.logging.set_verbosity(optuna.logging.WARNING)

NUM_STARTUP_TRIALS = 10
"""The number of random trials before bayes uses earlier results."""


def sampler(sweep: Sweep, draw: int) -> BaseSampler:
    """The sampler of one draw, seeded by the sweep's seed and the number of the draw, so that an
    interrupted sweep draws the same values.

    W&B's bayes is a Gaussian process; TPE needs no further package and handles choices and numbers
    together (https://papers.nips.cc/paper/4443).
    """
    seed = (sweep.seed * 1_000_003 + draw) % 2**32
    if sweep.method == "bayes":
        return TPESampler(seed=seed, n_startup_trials=NUM_STARTUP_TRIALS)
    return RandomSampler(seed)


def pruner(early_termination: EarlyTermination | None) -> BasePruner:
    """Successive halving: W&B's hyperband has a single series of brackets.

    Optuna's own hyperband distributes trials over several (https://arxiv.org/abs/1810.05934).
    """
    if early_termination is None:
        return NopPruner()
    return SuccessiveHalvingPruner(
        min_resource=early_termination.min_iter, reduction_factor=early_termination.eta
    )


def draw(trial: optuna.trial.Trial, dimensions: tuple[Dimension, ...]) -> dict[str, Value]:
    """Each dimension's value for this trial; values that were drawn before are kept."""
    return meaning({d.name: _suggest(trial, d) for d in dimensions}, dimensions)


def meaning(points: Mapping[str, Any], dimensions: tuple[Dimension, ...]) -> dict[str, Value]:
    """The values of the fields for points as Optuna draws them."""
    return {d.name: points[d.name] if d.choices else d.meaning(points[d.name]) for d in dimensions}


def _suggest(trial: optuna.trial.Trial, dimension: Dimension) -> Any:
    name = dimension.name
    if dimension.choices:
        return trial.suggest_categorical(name, dimension.choices)
    if dimension.whole:
        return trial.suggest_int(name, int(dimension.low), int(dimension.high))
    return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
