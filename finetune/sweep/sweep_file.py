"""A W&B sweep file -> a checked `Sweep`.

Turns sweep.yaml, or the same as a mapping, into everything that a local sweep does, and names all
that is wrong with it before anything runs. The verdict is the same for W&B's agents. Knows nothing
about Optuna, processes or W&B's client.

    >>> read_sweep(Path("sweep.yaml")).num_cells  # doctest: +SKIP
    48
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.config.fields import RunConfig, read_mapping, unknown_field
from finetune.config.flags import given_fields
from finetune.runs.result import METRICS
from finetune.sweep.distributions import Constant, Dimension, Value, number_as_text, read_parameter
from finetune.sweep.spec import DEFAULT_METRIC, EarlyTermination, Metric, Sweep
from finetune.system.errors import ConfigError
from finetune.system.files import load_yaml
from finetune.system.text import nearest

METHODS = ("grid", "random", "bayes")
GOALS = ("maximize", "minimize")
PROGRAM = "agent.py"
DEFAULT_ETA = 3
_MAX_CELLS = 100_000
_MAX_CHECKED = 2_000

_MAPPED = ("program", "method", "metric", "parameters", "run_cap", "early_terminate", "command")
_NOTED = ("name", "description", "project", "entity")
_UNMAPPED = {
    "controller": "the local sweep is its own controller",
    "job": "it belongs to W&B Launch",
    "image_uri": "it belongs to W&B Launch",
    "scheduler": "it belongs to W&B Launch",
    "launch": "it belongs to W&B Launch",
    "prior_runs": "runs of a W&B project can't be read here",
}


def read_sweep(source: Path | Mapping[str, Any]) -> Sweep:
    """The sweep that a file or a mapping describes. Raises `ConfigError` with all its faults."""
    if isinstance(source, Mapping):
        content, where, plain_name = dict(source), "sweep", "sweep"
    else:
        content, where, plain_name = _load(source), str(source), source.stem
    reader = _Reader(content)
    sweep = reader.read(str(content.get("name") or plain_name), isinstance(source, Path))
    if reader.problems:
        count = f"{len(reader.problems)} fault{'s' * (len(reader.problems) > 1)}"
        raise ConfigError("\n  ".join([f"{where}: {count}:", *reader.problems]))
    assert sweep is not None
    return sweep


def _load(path: Path) -> dict[str, Any]:
    content = load_yaml(path, "a sweep file")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no sweep file: it holds no mapping with method, parameters")
    return content


class _Reader:
    """Reads one sweep's mapping and gathers everything that is wrong with it."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.problems: list[str] = []

    def _fault(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def read(self, name: str, needs_program: bool) -> Sweep | None:
        self._check_keys(needs_program)
        method = self._method()
        metric = self._metric(method)
        early_termination = self._early_termination()
        fixed = self._command() | {
            key: self.content[key] for key in ("project", "entity") if self.content.get(key)
        }
        dimensions, constants = self._parameters()
        run_cap = self._run_cap()
        fixed |= constants
        source = {key: self.content[key] for key in self.content if key not in ("run_cap", *_NOTED)}
        if self.problems:
            return None
        sweep = Sweep(
            name, method, dimensions, fixed, metric, run_cap, early_termination, source=source
        )
        if method == "grid":
            self._check_grid(sweep)
        if not self.problems:
            self._check_configs(sweep)
        if not self.problems and early_termination is not None:
            self._check_early_termination(sweep, early_termination)
        return sweep

    def _check_keys(self, needs_program: bool) -> None:
        known = (*_MAPPED, *_NOTED)
        for key in self.content:
            if key in _UNMAPPED:
                self._fault(f"{key}: can't be mapped: {_UNMAPPED[key]}")
            elif key not in known:
                self._fault(f"unknown key {key!r}{nearest(str(key), known)}")
        program = self.content.get("program")
        if program is None and needs_program and "command" not in self.content:
            self._fault(f"program: missing; W&B's agents need 'program: {PROGRAM}'")
        elif program is not None and Path(str(program)).name != PROGRAM:
            self._fault(f"program: got {program!r}; only {PROGRAM} can be run")

    def _method(self) -> str:
        method = self.content.get("method")
        if method not in METHODS:
            self._fault(
                f"method: got {method!r}; must be one of {', '.join(METHODS)}"
                f"{nearest(str(method), METHODS)}"
            )
        return str(method)

    def _metric(self, method: str) -> Metric:
        given = self.content.get("metric")
        if given is None:
            if method == "bayes" or "early_terminate" in self.content:
                self._fault(
                    f"metric: missing; method bayes and early_terminate need 'metric: {{name: "
                    f"{DEFAULT_METRIC}, goal: maximize}}'"
                )
            return Metric()
        if not isinstance(given, dict):
            self._fault(f"metric: got {given!r}; a mapping with name and goal is needed")
            return Metric()
        for key in given:
            if key not in ("name", "goal", "target"):
                self._fault(
                    f"metric: unknown key {key!r}{nearest(str(key), ('name', 'goal', 'target'))}"
                )
        name, goal, target = given.get("name"), given.get("goal"), given.get("target")
        if name not in METRICS:
            self._fault(
                f"metric.name: got {name!r}, which no run logs; the metrics are "
                f"{', '.join(METRICS[:8])}{nearest(str(name), METRICS)}"
            )
        if goal not in GOALS:
            found = "is missing (W&B would minimize)" if goal is None else f"got {goal!r}"
            self._fault(f"metric.goal: {found}; write maximize or minimize")
        if target is not None and (isinstance(target, bool) or not isinstance(target, int | float)):
            self._fault(f"metric.target: got {target!r}; a number is needed")
            target = None
        return Metric(str(name), str(goal), target)

    def _run_cap(self) -> int | None:
        cap = self.content.get("run_cap")
        if cap is None or (isinstance(cap, int) and not isinstance(cap, bool) and cap > 0):
            return cap
        self._fault(f"run_cap: got {cap!r}; a whole number from 1 on is needed")
        return None

    def _early_termination(self) -> EarlyTermination | None:
        given = self.content.get("early_terminate")
        if given is None:
            return None
        known = ("type", "min_iter", "max_iter", "s", "eta", "strict")
        if not isinstance(given, dict) or given.get("type") != "hyperband":
            self._fault(f"early_terminate: got {given!r}; only 'type: hyperband' can be mapped")
            return None
        for key in given:
            if key not in known:
                self._fault(f"early_terminate: unknown key {key!r}{nearest(str(key), known)}")
        if given.get("strict"):
            self._fault("early_terminate.strict: can't be mapped; leave it out")
        numbers = {}
        for key, default, least in (
            ("eta", DEFAULT_ETA, 2), ("min_iter", None, 1), ("max_iter", None, 1), ("s", None, 1),
        ):  # fmt: skip
            number = given.get(key, default)
            whole = isinstance(number, int) and not isinstance(number, bool) and number >= least
            if number is not None and not whole:
                self._fault(
                    f"early_terminate.{key}: got {number!r}; a whole number from {least} on is "
                    "needed"
                )
                return None
            numbers[key] = number
        eta, min_iter, max_iter, s = (numbers[k] for k in ("eta", "min_iter", "max_iter", "s"))
        assert eta is not None
        if (min_iter is None) == (max_iter is None) or (max_iter is None) != (s is None):
            self._fault("early_terminate: either min_iter, or max_iter and s, is needed")
            return None
        if min_iter is None:
            assert max_iter is not None and s is not None
            min_iter = max(1, max_iter // eta**s)
        return EarlyTermination(min_iter, eta)

    def _command(self) -> dict[str, Value]:
        """The fields that a custom command fixes, besides what W&B fills in."""
        command = self.content.get("command")
        if command is None:
            return {}
        if not isinstance(command, list) or not all(isinstance(w, str | int) for w in command):
            self._fault(f"command: got {command!r}; a list of words is needed")
            return {}
        words = [str(word) for word in command if not re.fullmatch(r"\$\{\w+\}", str(word))]
        starts = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        for word in words[:starts]:
            plain = Path(word).name
            if not (re.fullmatch(r"python[\d.]*", plain) or plain in ("env", "-u", PROGRAM)):
                self._fault(f"command: {word!r} can't be mapped; {PROGRAM} and its flags can")
        try:
            given = given_fields(words[starts:])
        except ConfigError as error:
            self._fault(f"command: {error}")
            return {}
        return self._read_config_file(given)

    def _read_config_file(self, given: dict[str, Value]) -> dict[str, Value]:
        """Replace `config`, a file of fields, by the fields; given ones win."""
        if "resume" in given:
            self._fault("resume: a sweep starts its own runs; leave it out")
        file = given.pop("config", None)
        if file is None:
            return given
        try:
            return read_mapping(Path(str(file))) | given
        except ConfigError as error:
            self._fault(str(error))
            return given

    def _parameters(self) -> tuple[tuple[Dimension, ...], dict[str, Value]]:
        given = self.content.get("parameters")
        if not isinstance(given, dict) or not given:
            self._fault(f"parameters: got {given!r}; a mapping from fields to values is needed")
            return (), {}
        dimensions, constants = [], {}
        for name, entry in given.items():
            if name not in RunConfig.model_fields and name != "config":
                self._fault(f"parameters: {unknown_field(str(name))}")
                continue
            try:
                read = read_parameter(str(name), entry)
                for value in [read.value] if isinstance(read, Constant) else read.examples():
                    self._check_text(str(name), value)
            except ConfigError as error:
                self._fault(f"parameters: {error}")
                continue
            if isinstance(read, Constant):
                constants[str(name)] = read.value
            elif name in ("config", "out", "group"):
                self._fault(f"parameters: {name}: it can't vary; give it one value")
            else:
                dimensions.append(read)
        return tuple(dimensions), self._read_config_file(constants)

    def _check_text(self, name: str, value: Value) -> None:
        """A number that YAML made a text is a different value to W&B."""
        if name in _NUMBERS and isinstance(value, str) and (said := number_as_text(value)):
            raise ConfigError(f"{name}: {said}")

    def _check_grid(self, sweep: Sweep) -> None:
        for dimension in sweep.dimensions:
            if dimension.steps is None:
                self._fault(
                    f"parameters: {dimension.name}: a grid can't go through its distribution; "
                    "write values, whole min and max, or q_uniform"
                )
        if not self.problems and (sweep.num_cells or 0) > _MAX_CELLS:
            self._fault(f"parameters: the grid has {sweep.num_cells} cells; {_MAX_CELLS} at most")

    def _check_configs(self, sweep: Sweep) -> None:
        """Each value must make a config, with each strategy."""
        for values in _samples(sweep):
            try:
                sweep.config(values)
            except ConfigError as error:
                self._fault(f"parameters: {error}")

    def _check_early_termination(self, sweep: Sweep, rule: EarlyTermination) -> None:
        """No run may be judged before everything that will train has trained for an epoch."""
        timing = [d for d in sweep.dimensions if d.name in _TIMING]
        names = [d.name for d in timing]
        for values in itertools.product(*(d.examples() for d in timing)):
            config = sweep.config(dict(zip(names, values, strict=True)))
            least = config.plan.all_open_epoch + 1
            if rule.min_iter < least:
                said = ", ".join(
                    f"{name} {getattr(config, name)}"
                    for name in dict.fromkeys(("strategy", *names))
                )
                self._fault(
                    f"early_terminate: it would judge after epoch {rule.min_iter - 1} "
                    f"(iteration {rule.min_iter}), but with {said} the last part opens at epoch "
                    f"{config.plan.all_open_epoch}; min_iter must be {least} or more"
                )
                return


_TIMING = ("strategy", "unfreeze_from", "unfreeze_every", "lr_decay")
_NUMBERS = frozenset(
    {"epochs", "batch_size", "learning_rate", "lr_decay", "momentum", "weight_decay"}
    | {"label_smoothing", "unfreeze_every", "image_size", "val_fraction", "patience", "seed"}
    | {"cache_gb"}
)


def _samples(sweep: Sweep) -> Iterator[dict[str, Value]]:
    """Values to check: every cell of a grid that isn't huge, else each value by each strategy."""
    if sweep.num_cells is not None and sweep.num_cells <= _MAX_CHECKED:
        yield from sweep.cells()
        return
    first = {d.name: d.examples()[0] for d in sweep.dimensions}
    strategies = [d.examples() for d in sweep.dimensions if d.name == "strategy"]
    for strategy in strategies[0] if strategies else [None]:
        base = first | ({"strategy": strategy} if strategies else {})
        for dimension in sweep.dimensions:
            if dimension.name != "strategy" or len(sweep.dimensions) == 1:
                for value in dimension.examples():
                    yield base | {dimension.name: value}
