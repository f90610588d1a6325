"""A sweep -> Optuna's terms.

Turns methods, dimensions and early termination into a sampler, distributions and a pruner, through
small tables. Runs nothing and stores nothing.

    >>> search.pruner(EarlyTermination(min_iter=4, eta=3))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from finetune.sweep.distributions import Dimension, Value
from finetune.sweep.spec import EarlyTermination, Sweep

optuna.logging.set_verbosity(optuna.logging.WARNING)

NUM_STARTUP_TRIALS = 10
"""Random trials before bayes follows what it has seen."""

SAMPLERS: Mapping[str, Callable[[int], BaseSampler]] = {
    "grid": RandomSampler,  # never asked: cells are enqueued whole
    "random": RandomSampler,
    "bayes": lambda seed: TPESampler(seed=seed, n_startup_trials=NUM_STARTUP_TRIALS),
}
"""W&B's method -> sampler. Its bayes is a Gaussian process; here it is TPE, whose choices need no
further package and mix with numbers (https://papers.nips.cc/paper/4443)."""


def sampler(sweep: Sweep, draw: int) -> BaseSampler:
    """The sampler of one draw. Its seed follows from the sweep's and the draw's number, so that a
    sweep that was interrupted draws what it would have drawn."""
    return SAMPLERS[sweep.method]((sweep.seed * 1_000_003 + draw) % 2**32)


def distribution(dimension: Dimension) -> BaseDistribution:
    """Where a dimension's points are drawn from."""
    if dimension.choices:
        return CategoricalDistribution(dimension.choices)
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high))
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def cell_distribution(dimension: Dimension) -> BaseDistribution:
    """A grid's dimension as a choice among its steps."""
    return CategoricalDistribution(dimension.steps or ())


def pruner(early_termination: EarlyTermination | None) -> BasePruner:
    """W&B's hyperband is a single series of brackets, which is successive halving.

    Optuna's own hyperband spreads trials over several (https://arxiv.org/abs/1810.05934).
    """
    if early_termination is None:
        return NopPruner()
    return SuccessiveHalvingPruner(
        min_resource=early_termination.min_iter, reduction_factor=early_termination.eta
    )


def draw(trial: optuna.trial.Trial, dimensions: tuple[Dimension, ...]) -> dict[str, Value]:
    """Each dimension's value for this trial; what was drawn before stays."""
    return meaning({d.name: _suggest(trial, d) for d in dimensions}, dimensions)


def meaning(points: Mapping[str, Any], dimensions: tuple[Dimension, ...]) -> dict[str, Value]:
    """The fields that drawn points stand for."""
    return {d.name: points[d.name] if d.choices else d.meaning(points[d.name]) for d in dimensions}


def _suggest(trial: optuna.trial.Trial, dimension: Dimension) -> Any:
    name = dimension.name
    if dimension.choices:
        return trial.suggest_categorical(name, dimension.choices)
    if dimension.whole:
        return trial.suggest_int(name, int(dimension.low), int(dimension.high))
    return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
