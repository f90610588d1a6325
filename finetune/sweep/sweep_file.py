"""Reads and checks W&B sweep files: what passes here is valid for W&B's agents too."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.config.field_tables import NUMERIC_FIELDS, TIMING_FIELDS
from finetune.config.fields import RunConfig, read_mapping, unknown_field
from finetune.config.flags import given_fields
from finetune.runs.result import METRICS
from finetune.sweep.distributions import Constant, Dimension, Value, is_number, read_parameter
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

_KEYS = (
    *("program", "method", "metric", "parameters", "run_cap", "early_terminate", "command"),
    *("name", "description", "project", "entity"),
)
_NOT_IN_SOURCE = ("run_cap", "name", "description", "project", "entity")
"""Keys that may change before a sweep is resumed."""
_UNSUPPORTED = {
    "controller": "the local sweep is its own controller",
    **dict.fromkeys(("job", "image_uri", "scheduler", "launch"), "it belongs to W&B Launch"),
    "prior_runs": "runs of a W&B project can't be read here",
}


def read_sweep(source: Path | Mapping[str, Any]) -> Sweep:
    """The sweep that a file or a mapping describes.

    Raises `ConfigError`, which lists everything that is wrong with it.
    """
    if isinstance(source, Mapping):
        return _Reader(source, "sweep").read("sweep", needs_program=False)
    content = load_yaml(source, "a sweep file")
    if not isinstance(content, dict):
        raise ConfigError(
            f"{source} is not a sweep file: it must be a mapping with method and parameters"
        )
    return _Reader(content, str(source)).read(source.stem, needs_program=True)


def check_command(sweep: Path, **_: object) -> int:
    """`python -m finetune sweep --check`: read a sweep file and say what it does."""
    print(f"{sweep} is valid. {read_sweep(sweep).summary()}")
    return 0


class _Reader:
    """Reads the mapping of one sweep and collects its faults."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content = content
        self.where = where
        self.faults: list[str] = []

    def read(self, default_name: str, needs_program: bool) -> Sweep:
        content = self.content
        self._check_top_level(needs_program)
        if content.get("method") not in METHODS:
            self._unknown("method", content.get("method"), METHODS)
        metric = self._metric()
        early_termination = self._early_termination()
        fixed = self._command()
        fixed |= {key: content[key] for key in ("project", "entity") if content.get(key)}
        dimensions, constants = self._parameters()
        run_cap = self._integer("run_cap", content.get("run_cap"), 1)
        self._raise_faults()
        sweep = Sweep(
            name=str(content.get("name") or default_name),
            method=content["method"],
            dimensions=dimensions,
            fixed=fixed | constants,
            metric=metric,
            run_cap=run_cap,
            early_termination=early_termination,
            source={key: content[key] for key in content if key not in _NOT_IN_SOURCE},
        )
        for check in (self._check_grid, self._check_configs, self._check_early_termination):
            check(sweep)
            self._raise_faults()
        return sweep

    def _raise_faults(self) -> None:
        if faults := list(dict.fromkeys(self.faults)):
            count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
            raise ConfigError("\n  ".join([f"{self.where}: {count}:", *faults]))

    def _unknown(self, where: str, found: object, choices: Iterable[str]) -> None:
        near = nearest(str(found), choices)
        self.faults.append(f"{where}: got {found!r}; must be one of {', '.join(choices)}{near}")

    def _check_keys(self, where: str, given: Iterable[object], known: tuple[str, ...]) -> None:
        self.faults += [
            f"{where}unknown key {key!r}{nearest(str(key), known)}"
            for key in given
            if key not in known
        ]

    def _integer(self, where: str, value: object, least: int) -> int | None:
        if value is None or (type(value) is int and value >= least):  # no booleans
            return value
        self.faults.append(f"{where}: got {value!r}; must be an integer >= {least}")
        return None

    def _check_top_level(self, needs_program: bool) -> None:
        self._check_keys("", self.content.keys() - _UNSUPPORTED.keys(), _KEYS)
        for key in self.content.keys() & _UNSUPPORTED.keys():
            self.faults.append(f"{key}: not supported: {_UNSUPPORTED[key]}")
        program = self.content.get("program")
        if program is None and needs_program and "command" not in self.content:
            self.faults.append(f"program: missing; W&B's agents need 'program: {PROGRAM}'")
        elif program is not None and Path(str(program)).name != PROGRAM:
            self.faults.append(f"program: got {program!r}; must be {PROGRAM}")

    def _metric(self) -> Metric:
        given = self.content.get("metric")
        if given is None:
            if self.content.get("method") == "bayes" or "early_terminate" in self.content:
                self.faults.append(
                    "metric: missing; method bayes and early_terminate need 'metric: {name: "
                    f"{DEFAULT_METRIC}, goal: maximize}}'"
                )
            return Metric()
        if not isinstance(given, dict):
            self.faults.append(f"metric: got {given!r}; must be a mapping with name and goal")
            return Metric()
        self._check_keys("metric: ", given, ("name", "goal", "target"))
        name, goal, target = given.get("name"), given.get("goal"), given.get("target")
        if name not in METRICS:
            self.faults.append(
                f"metric.name: got {name!r}, which no run logs; the metrics are "
                f"{', '.join(m for m in METRICS if '/' not in m)}{nearest(str(name), METRICS)}"
            )
        if goal is None:
            self.faults.append(
                "metric.goal: missing (W&B would minimize); pass maximize or minimize"
            )
        elif goal not in GOALS:
            self._unknown("metric.goal", goal, GOALS)
        if target is not None and not is_number(target):
            self.faults.append(f"metric.target: got {target!r}; must be a number")
        return Metric(str(name), str(goal), target)

    def _early_termination(self) -> EarlyTermination | None:
        given = self.content.get("early_terminate")
        if given is None:
            return None
        where = "early_terminate"
        if not isinstance(given, dict) or given.get("type") != "hyperband":
            self.faults.append(f"{where}: got {given!r}; only 'type: hyperband' is supported")
            return None
        known = ("type", "min_iter", "max_iter", "s", "eta", "strict")
        self._check_keys(f"{where}: ", given, known)
        if given.get("strict"):
            self.faults.append(f"{where}.strict: not supported; remove it")
        eta = self._integer(f"{where}.eta", given.get("eta", DEFAULT_ETA), 2) or DEFAULT_ETA
        numbers = {
            key: self._integer(f"{where}.{key}", given[key], 1)
            for key in ("min_iter", "max_iter", "s")
            if given.get(key) is not None
        }
        if numbers.keys() not in ({"min_iter"}, {"max_iter", "s"}):
            self.faults.append(f"{where}: must have either min_iter, or max_iter and s")
        max_iter, s = numbers.get("max_iter") or 1, numbers.get("s") or 0
        return EarlyTermination(numbers.get("min_iter") or max(1, max_iter // eta**s), eta)

    def _command(self) -> dict[str, Value]:
        """The fields that a custom command sets, apart from W&B's own placeholders."""
        command = self.content.get("command", [])
        if not isinstance(command, list) or not all(isinstance(w, str | int) for w in command):
            self.faults.append(f"command: got {command!r}; must be a list of words")
            return {}
        words = [str(word) for word in command if not re.fullmatch(r"\$\{\w+\}", str(word))]
        program = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
        for word in program:
            if not re.fullmatch(rf"python[\d.]*|env|-u|{re.escape(PROGRAM)}", Path(word).name):
                self.faults.append(
                    f"command: {word!r} is not supported; use {PROGRAM} and its flags"
                )
        try:
            return self._read_config_file(given_fields(words[len(program) :]))
        except ConfigError as error:
            self.faults.append(f"command: {error}")
            return {}

    def _read_config_file(self, given: dict[str, Value]) -> dict[str, Value]:
        """Replace `config`, a file of fields, by these fields; other given values win."""
        if "resume" in given:
            self.faults.append("resume: a sweep starts new runs; remove it")
        file = given.pop("config", None)
        if file is None:
            return given
        return read_mapping(Path(str(file))) | given

    def _parameters(self) -> tuple[tuple[Dimension, ...], dict[str, Value]]:
        given = self.content.get("parameters")
        if not isinstance(given, dict) or not given:
            self.faults.append(f"parameters: got {given!r}; must map fields to values")
            return (), {}
        dimensions, constants = [], {}
        for name, entry in given.items():
            try:
                read = _read_field(str(name), entry)
            except ConfigError as error:
                self.faults.append(f"parameters: {error}")
                continue
            if isinstance(read, Constant):
                constants[str(name)] = read.value
            else:
                dimensions.append(read)
        try:
            return tuple(dimensions), self._read_config_file(constants)
        except ConfigError as error:
            self.faults.append(str(error))
            return (), {}

    def _check_grid(self, sweep: Sweep) -> None:
        if sweep.method != "grid":
            return
        self.faults += [
            f"parameters: {dimension.name}: its distribution has no finite list of values, which "
            "a grid needs; use values, integers for min and max, or q_uniform"
            for dimension in sweep.dimensions
            if dimension.steps is None
        ]
        if not self.faults and (sweep.num_cells or 0) > _MAX_CELLS:
            self.faults.append(
                f"parameters: got a grid of {sweep.num_cells} cells; must be at most {_MAX_CELLS}"
            )

    def _check_configs(self, sweep: Sweep) -> None:
        """Each value must give a valid config, with each strategy."""
        for values in _samples(sweep):
            try:
                sweep.config(values)
            except ConfigError as error:
                self.faults.append(f"parameters: {error}")

    def _check_early_termination(self, sweep: Sweep) -> None:
        """No run may be judged before all parts that will train have trained for one epoch."""
        rule = sweep.early_termination
        if rule is None:
            return
        timing = [d for d in sweep.dimensions if d.name in TIMING_FIELDS]
        names = [d.name for d in timing]
        for values in itertools.product(*(d.examples() for d in timing)):
            config = sweep.config(dict(zip(names, values, strict=True)))
            last_start = config.plan.all_open_epoch
            if rule.min_iter <= last_start:
                fields = dict.fromkeys(("strategy", *names))
                setting = ", ".join(f"{name} {getattr(config, name)}" for name in fields)
                self.faults.append(
                    f"early_terminate: it would judge after epoch {rule.min_iter - 1} (iteration "
                    f"{rule.min_iter}), but with {setting} the last part starts to train at epoch "
                    f"{last_start}; min_iter must be >= {last_start + 1}"
                )
                return


def _read_field(name: str, entry: object) -> Dimension | Constant:
    """One entry of `parameters`. Raises `ConfigError`."""
    if name not in RunConfig.model_fields and name != "config":
        raise ConfigError(unknown_field(name))
    read = read_parameter(name, entry, name in NUMERIC_FIELDS)
    if isinstance(read, Dimension) and name in ("config", "out", "group"):
        raise ConfigError(f"{name}: must have the same value in all trials")
    return read


def _samples(sweep: Sweep) -> Iterator[dict[str, Value]]:
    """All cells of a grid, up to `_MAX_CHECKED`; else each value combined with each strategy."""
    if sweep.num_cells is not None and sweep.num_cells <= _MAX_CHECKED:
        yield from sweep.cells()
        return
    examples = {dimension.name: dimension.examples() for dimension in sweep.dimensions}
    first = {name: values[0] for name, values in examples.items()}
    strategies = examples.pop("strategy", [])
    for base in [first | {"strategy": strategy} for strategy in strategies] or [first]:
        yield base
        for name, values in examples.items():
            yield from (base | {name: value} for value in values)
