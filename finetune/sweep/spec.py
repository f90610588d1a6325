"""What a sweep does, as a value: its dimensions, its grid's cells and its trials' configs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import annotated_types as at
from pydantic import AfterValidator, BaseModel, Field, model_validator

from finetune.config.field_types import Count, Integer, Number, one_of
from finetune.config.fields import RunConfig
from finetune.config.optimizers import OPTIMIZERS, ignored_fields
from finetune.config.strategies import STRATEGIES
from finetune.runs.result import METRICS, RATE
from finetune.sweep.distributions import Dimension, Value
from finetune.system.errors import ConfigError
from finetune.system.files import absolute
from finetune.system.text import nearest, num

DEFAULT_SEED = 42
UNLIMITED = sys.maxsize
"""The number of trials of a sweep that only the time limits."""
_GOALS = {"acc": "maximize", "f1": "maximize", "loss": "minimize"}
"""The goal for metrics whose names end so."""


def _logged(name: str) -> str:
    """Which parts have a rate depends on the network; the runner checks it at the first epoch."""
    if name not in METRICS and not name.startswith(RATE):
        names = ", ".join((*METRICS, f"{RATE}PART"))
        raise ValueError(f"must be one of {names}{nearest(name, METRICS)}")
    return name


class Metric(BaseModel, frozen=True, extra="forbid"):
    """What a sweep optimizes: the last value that a run logs under this name."""

    name: Annotated[str, AfterValidator(_logged)]
    goal: Annotated[str, one_of(("maximize", "minimize"))] = Field(
        description="maximize or minimize (W&B would minimize)"
    )
    target: Number | None = None

    @model_validator(mode="after")
    def _not_against_itself(self) -> Self:
        good = _GOALS.get(self.name.rpartition("_")[2], self.goal)
        if self.goal != good:
            raise ValueError(f"goal must be {good} for {self.name}")
        return self

    def reached(self, value: float | None) -> bool:
        if self.target is None or value is None:
            return False
        return value >= self.target if self.goal == "maximize" else value <= self.target


DEFAULT_METRIC = Metric(name="best_val_acc", goal="maximize")


class EarlyTermination(BaseModel, extra="forbid"):
    """Successive halving: judges at min_iter, min_iter*eta, ... iterations; 1 in eta continues.

    An iteration is one epoch. In W&B's sweeps all epochs count, here those in which every part that
    will train is training; iterations count from 1.
    `max_iter` and `s` are W&B's other way to give `min_iter`.
    """

    type: Literal["hyperband"]
    min_iter: Count = 0
    max_iter: Count = 0
    s: Count = 0
    eta: Annotated[Integer, at.Ge(2)] = 3
    strict: Literal[False] = False

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = self.model_fields_set & {"min_iter", "max_iter", "s"}
        if given not in ({"min_iter"}, {"max_iter", "s"}):
            raise ValueError("must have either min_iter, or max_iter and s")
        self.min_iter = self.min_iter or max(1, self.max_iter // self.eta**self.s)
        return self


@dataclass(frozen=True)
class Sweep:
    """One sweep: what varies, what is fixed, what is optimized and when it ends."""

    name: str
    method: str
    dimensions: tuple[Dimension, ...]
    fixed: Mapping[str, Value]
    metric: Metric = DEFAULT_METRIC
    run_cap: int | None = None
    early_termination: EarlyTermination | None = None
    listed: tuple[Mapping[str, Value], ...] | None = None
    """A grid's cells, where they are not the product of dimensions."""
    remarks: tuple[str, ...] = ()
    """What a user should know about the sweep as a whole."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Identifies the sweep: two sweeps with equal sources are the same."""

    @property
    def seed(self) -> int:
        """The seed of the search: the file's `seed`, or the default."""
        seed = self.fixed.get("seed")
        return seed if isinstance(seed, int) else DEFAULT_SEED

    @property
    def out_dir(self) -> Path:
        """Where the run directories go."""
        return absolute(Path(str(self.fixed.get("out") or "runs")))

    @property
    def slug(self) -> str:
        """The name with the characters that files and W&B's ids allow."""
        return re.sub(r"[^A-Za-z0-9_]+", "-", self.name).strip("-")[:60] or "sweep"

    def amended(
        self, name: str | None, defaults: Mapping[str, Any], overrides: Mapping[str, Any]
    ) -> Sweep:
        """The same sweep with another name, defaults for missing fields, and overrides."""
        below = {k: v for k, v in defaults.items() if k not in self.varied}
        return replace(
            self,
            name=name or self.name,
            fixed={**below, **self.fixed, **overrides},
            source={**self.source, **({"fields": below} if below else {})},
        )

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """The fields whose values differ between trials."""
        if self.listed is None:
            return tuple(dimension.name for dimension in self.dimensions)
        names = dict.fromkeys(name for cell in self.listed for name in cell)
        return tuple(n for n in names if len({cell[n] for cell in self.listed if n in cell}) > 1)

    @property
    def num_combinations(self) -> int | None:
        """The number of combinations of a grid's values; None for the other methods."""
        if self.method != "grid":
            return None
        if self.listed is not None:
            return len(self.listed)
        return math.prod(len(dimension.steps or ()) for dimension in self.dimensions)

    @cached_property
    def num_cells(self) -> int | None:
        """The number of a grid's cells; None for the other methods."""
        return None if self.num_combinations is None else sum(1 for _ in self.cells())

    @cached_property
    def cell_keys(self) -> frozenset[str]:
        return frozenset(map(cell_key, self.cells()))

    @property
    def has_repeats(self) -> bool:
        """Whether combinations of a grid differ only in fields that their strategy ignores."""
        return self.num_cells != self.num_combinations

    def summary(self) -> str:
        """What the sweep will do, in one line."""
        cells = num(self.num_cells, "cell") if self.num_cells is not None else "values drawn"
        words = [f"{self.name}: {self.method}, {cells}, {self.metric.goal} {self.metric.name}"]
        words += [f"at most {num(self.run_cap, 'run')}"] if self.run_cap else []
        if rule := self.early_termination:
            words.append(f"1 in {rule.eta} continues after {num(rule.min_iter, 'iteration')}")
        return ", ".join(words)

    @property
    def notes(self) -> list[str]:
        """What a user should know, one line each."""
        notes = [
            *(dimension.note for dimension in self.dimensions if dimension.note),
            *self.remarks,
        ]
        if self.has_repeats:
            notes.append(
                f"{self.num_combinations} combinations, {self.num_cells} of them different: fields "
                "that a strategy ignores are not varied for it (W&B's agents run all combinations)"
            )
        return notes

    def cells(self) -> Iterator[dict[str, Value]]:
        """A grid's cells in a fixed order; the first parameter changes most slowly.

        Of combinations that differ only in fields that their strategy ignores, the first is a cell.
        """
        found = set()
        for cell in self._combinations():
            ignored = self._ignored(cell)
            effective = tuple(item for item in cell.items() if item[0] not in ignored)
            if effective not in found:
                found.add(effective)
                yield cell

    def _ignored(self, cell: Mapping[str, Value]) -> frozenset[str]:
        """The fields that mean nothing to a cell's strategy and optimizer."""
        strategy, optimizer = (
            str(cell.get(name, self.fixed.get(name)) or RunConfig.model_fields[name].default)
            for name in ("strategy", "optimizer")
        )
        if strategy not in STRATEGIES or optimizer not in OPTIMIZERS:
            return frozenset()
        return STRATEGIES[strategy].ignores | ignored_fields(optimizer)

    def _combinations(self) -> Iterator[dict[str, Value]]:
        if self.listed is not None:
            yield from map(dict, self.listed)
            return
        names = [dimension.name for dimension in self.dimensions]
        for values in itertools.product(*(dimension.steps or () for dimension in self.dimensions)):
            yield dict(zip(names, values, strict=True))

    def num_trials(self, max_runs: int | None = None, is_timed: bool = False) -> int:
        """The number of trials in total, or `UNLIMITED` if only the time limits it.

        Raises `ConfigError` if nothing limits it.
        """
        limits = [n for n in (self.num_cells, self.run_cap, max_runs) if n is not None]
        if not limits and not is_timed:
            endless = f"{self.name}: method {self.method} has no end"
            raise ConfigError(f"{endless}: pass --max_runs N or --minutes N, or write run_cap: N")
        return min(limits, default=UNLIMITED)

    def config(self, values: Mapping[str, Value], **defaults: Any) -> RunConfig:
        """The config of a trial with these values. Raises `ConfigError`."""
        given = {**defaults, **self.fixed, **values}
        return RunConfig.from_fields({k: v for k, v in given.items() if v not in (None, "None")})


def cell_key(values: Mapping[str, Value]) -> str:
    """The key of a grid's cell: a digest of its values, whatever their order."""
    # A file that is edited from 1 to 1.0 describes the same cell.
    same = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in values.items()}
    return hashlib.blake2b(json.dumps(same, sort_keys=True).encode(), digest_size=8).hexdigest()
