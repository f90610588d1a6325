"""Reads and checks W&B sweep files: what passes here is valid for W&B's agents too."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import annotated_types as at
import yaml
from pydantic import BaseModel, Field, ValidationError

from finetune.config.aliases import field_of, unknown_field
from finetune.config.field_tables import NUMERIC_FIELDS, TIMING_FIELDS
from finetune.config.field_types import Count, one_of
from finetune.config.fields import RunConfig
from finetune.config.given_values import read_mapping
from finetune.sweep.command import PROGRAM, Values, fields_of_command
from finetune.sweep.distributions import Constant, Dimension, Value, read_parameter
from finetune.sweep.spec import DEFAULT_METRIC, EarlyTermination, Metric, Sweep
from finetune.system.errors import ConfigError
from finetune.system.files import load_yaml
from finetune.system.text import brief, nearest

_MAX_CELLS = 100_000
_MAX_CHECKED = 2_000
# Keys that may change before a sweep is resumed:
_NOT_IN_SOURCE = ("run_cap", "name", "description", "project", "entity")
_UNSUPPORTED = {
    "controller": "the local sweep is its own controller",
    **dict.fromkeys(("job", "image_uri", "scheduler", "launch"), "it belongs to W&B Launch"),
    "prior_runs": "runs of a W&B project can't be read here",
}

_EXAMPLE = "{type: hyperband, min_iter: 4}"
_ENDS_EARLY = ("hyperband", "asha", "sha", "bohb", "successive_halving", "median", "pruning")
_EARLY_TERMINATION = f"""method: got {{found!r}}, which ends runs early and doesn't choose values; \
write it beside a method:
    method: random
    early_terminate: {_EXAMPLE.replace("{", "{{").replace("}", "}}")}"""


class _SweepFile(BaseModel, extra="forbid"):
    program: str | None = None
    method: Annotated[str, one_of(("grid", "random", "bayes"))]
    metric: Metric | None = None
    parameters: Annotated[dict[str, Any], at.MinLen(1)] = Field(
        description="a mapping of fields to values"
    )
    run_cap: Count | None = None
    early_terminate: EarlyTermination | None = None
    command: list[str | int] | None = None
    name: Any = None
    description: Any = None
    project: Any = None
    entity: Any = None


def read_sweep(source: Path | Mapping[str, Any], fields: Mapping[str, Any] | None = None) -> Sweep:
    """The sweep that a file or a mapping describes; `fields` hold for all trials instead of its
    own values.

    Raises `ConfigError`, which lists everything that is wrong with it.
    """
    if isinstance(source, Mapping):
        return _Reader(source, "sweep", fields or {}).read("sweep")
    content = load_yaml(source, "a sweep file")
    if not isinstance(content, dict):
        raise ConfigError(f"{source} is not a sweep file: it must have method and parameters")
    reader = _Reader(content, str(source), fields or {})
    command = content.get("command")
    is_needed = not command or (isinstance(command, list) and "${program}" in command)
    if content.get("program") is None and is_needed:
        reader.faults.append(f"program: missing; W&B's agents need 'program: {PROGRAM}'")
    return reader.read(source.stem)


class _Reader:
    """Reads the mapping of one sweep and collects its faults."""

    def __init__(self, content: Mapping[str, Any], where: str, given: Mapping[str, Any]) -> None:
        if "resume" in given:
            raise ConfigError("resume: a sweep starts new runs; remove it")
        own = content.get("parameters")
        self.given = given
        self.content = content
        if given and isinstance(own, dict):
            fixed = {name: {"value": _parsed(name, value)} for name, value in given.items()}
            self.content = {**content, "parameters": {**own, **fixed}}
        self.where = where
        self.faults: list[str] = []

    def read(self, default_name: str) -> Sweep:
        content = self.content
        file = self._validated()
        dimensions, constants = self._parameters()
        fixed = self._with_config_file(self._command(dimensions, constants) | constants)
        self._raise_faults()
        assert file is not None
        labels = {key: content[key] for key in ("project", "entity") if content.get(key)}
        sweep = Sweep(
            name=str(file.name or default_name),
            method=file.method,
            dimensions=dimensions,
            fixed=labels | fixed,
            metric=file.metric or DEFAULT_METRIC,
            run_cap=file.run_cap,
            early_termination=file.early_terminate,
            source={key: content[key] for key in content if key not in _NOT_IN_SOURCE},
        )
        self._check_grid(sweep)
        self._raise_faults(sweep.notes)
        configs = self._check_configs(sweep)
        self._raise_faults(sweep.notes)
        return replace(sweep, remarks=_remarks(sweep, configs))

    def _raise_faults(self, notes: Iterable[str] = ()) -> None:
        if faults := list(dict.fromkeys(self.faults)):
            count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
            raise ConfigError("\n  ".join([f"{self.where}: {count}:", *faults, *notes]))

    def _validated(self) -> _SweepFile | None:
        given = {key: value for key, value in self.content.items() if value is not None}
        needs_metric = given.get("method") == "bayes" or "early_terminate" in given
        if needs_metric and "metric" not in given:
            example = f"{{name: {DEFAULT_METRIC.name}, goal: {DEFAULT_METRIC.goal}}}"
            self.faults.append(f"metric: missing; bayes and early_terminate need one: {example}")
        program = given.get("program")
        if isinstance(program, str) and Path(program).name != PROGRAM:
            self.faults.append(f"program: got {program!r}; must be {PROGRAM}")
        try:
            return _SweepFile.model_validate(self.content)
        except ValidationError as error:
            self.faults += map(_fault, error.errors())
            return None

    def _command(self, dimensions: Iterable[Dimension], constants: Values) -> dict[str, Value]:
        """The fields that a custom command sets."""
        command = self.content.get("command")
        if not isinstance(command, list):
            return {}
        examples = {dimension.name: dimension.examples()[0] for dimension in dimensions}
        values = {**examples, **constants}
        try:
            return fields_of_command(
                command, {name: value for name, value in values.items() if name not in self.given}
            )
        except ConfigError as error:
            self.faults.append(f"command: {error}")
            return {}

    def _parameters(self) -> tuple[tuple[Dimension, ...], dict[str, Value]]:
        given = self.content.get("parameters")
        dimensions, constants = [], {}
        for name, entry in given.items() if isinstance(given, dict) else ():
            try:
                read = _read_field(str(name), entry)
            except ConfigError as error:
                self.faults.append(f"parameters: {error}")
                continue
            if isinstance(read, Constant):
                constants[str(name)] = read.value
            else:
                dimensions.append(read)
        return tuple(dimensions), constants

    def _with_config_file(self, given: dict[str, Value]) -> dict[str, Value]:
        """The given fields, and for others those of the file `config`, as agent.py reads it."""
        try:
            file = given.pop("config", None)
            return given if file is None else read_mapping(Path(str(file))) | given
        except ConfigError as error:
            self.faults.append(str(error))
            return {}

    def _check_grid(self, sweep: Sweep) -> None:
        self.faults += [
            f"parameters: {dimension.name}: its distribution has no finite list of values, which "
            "a grid needs; use values, integers for min and max, or q_uniform"
            for dimension in sweep.dimensions
            if dimension.steps is None and sweep.method == "grid"
        ]
        if (num_cells := sweep.num_combinations or 0) > _MAX_CELLS:
            self.faults.append(f"parameters: got {num_cells} cells; must be at most {_MAX_CELLS}")

    def _check_configs(self, sweep: Sweep) -> list[RunConfig]:
        """The configs of some or all values, all of which must be valid."""
        configs = []
        for values in sample_values(sweep):
            try:
                configs.append(sweep.config(values))
            except ConfigError as error:
                self.faults.append(f"parameters: {error}")
        return configs


def _remarks(sweep: Sweep, configs: Iterable[RunConfig]) -> tuple[str, ...]:
    """Where W&B's early termination judges other epochs than the local one, one line."""
    rule = sweep.early_termination
    if rule is None:
        return ()
    latest = max(configs, key=lambda config: config.plan.all_open_epoch)
    last_start = latest.plan.all_open_epoch
    if not last_start:
        return ()
    varied = [name for name in TIMING_FIELDS if name == "strategy" or name in sweep.varied]
    setting = ", ".join(f"{name} {getattr(latest, name)}" for name in varied)
    if rule.min_iter <= last_start:
        judged = f"judges after {rule.min_iter} of all epochs, before that; min_iter must be >= "
        judged += f"{last_start + 1} for it"
    else:
        judged = "counts all epochs"
    return (
        f"early_terminate: with {setting} the last part starts to train at epoch {last_start}, and "
        f"epochs count from there; W&B {judged}",
    )


def _fault(error: Any) -> str:
    """One of pydantic's errors: where, what was found, what is allowed."""
    *parents, key = where = [str(part) for part in error["loc"]]
    models: dict[str, type[BaseModel]] = {"metric": Metric, "early_terminate": EarlyTermination}
    fields = models.get(where[0], _SweepFile).model_fields
    text = error["input"] if isinstance(error["input"], str) else ""
    if where == ["method"] and text.lower() in _ENDS_EARLY:
        return _EARLY_TERMINATION.format(found=text)
    if where == ["early_terminate"] and text:
        return f"{key}: got {text!r}; must be a mapping, such as {_EXAMPLE}"
    if key in _UNSUPPORTED and not parents:
        return f"{key}: not supported: {_UNSUPPORTED[key]}"
    if error["type"] == "extra_forbidden":
        return ": ".join([*parents, f"unknown key {key!r}{nearest(key, fields)}"])
    if error["type"] == "missing":
        hint = fields[key].description
        return f"{'.'.join(where)}: missing{f'; must be {hint}' if hint else ''}"
    message = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{'.'.join(where)}: got {brief(error['input'])}; {message}"


def _read_field(name: str, entry: object) -> Dimension | Constant:
    """One entry of `parameters`. Raises `ConfigError`."""
    if isinstance(entry, dict) and "parameters" in entry:
        raise ConfigError(f"{name}: {_nested(entry)}")
    if name not in RunConfig.model_fields and name != "config":
        raise ConfigError(unknown_field(name, RunConfig.model_fields))
    read = read_parameter(name, entry, name in NUMERIC_FIELDS)
    if isinstance(read, Dimension) and name in ("config", "out", "group"):
        raise ConfigError(f"{name}: must have the same value in all trials")
    return read


def _nested(entry: Mapping[str, Any]) -> str:
    """The message for W&B's nested parameters, with the lines to write instead."""
    message = "nested parameters aren't supported, as a run's fields are flat"
    lines, names = [], [*RunConfig.model_fields, "config"]
    for name, inner in _leaves(entry):
        if field := field_of(name, names):
            text = yaml.dump(inner, default_flow_style=True, width=200, sort_keys=False)
            lines.append(f"    {field}: {text.strip()}")
        else:
            message += f"; {unknown_field(name, RunConfig.model_fields)}"
    if not lines:
        return message
    return "\n    ".join([f"{message}; write instead:", "parameters:", *lines])


def _leaves(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The parameters that are not nested further, at any depth."""
    inner = entry["parameters"]
    for name, given in inner.items() if isinstance(inner, Mapping) else ():
        if isinstance(given, Mapping) and "parameters" in given:
            yield from _leaves(given)
        else:
            yield str(name), given


def _parsed(name: str, value: Any) -> Any:
    """The value of a flag; a number's text as YAML would read it."""
    if isinstance(value, str) and name in NUMERIC_FIELDS:
        with suppress(ValueError):
            return int(value) if value.lstrip("-").isdecimal() else float(value)
    return str(value) if isinstance(value, Path) else value


def sample_values(sweep: Sweep) -> Iterator[dict[str, Value]]:
    """All cells of a grid, up to `_MAX_CHECKED`; else each value with all values that decide when
    parts train, the strategy among them."""
    if sweep.num_cells is not None and sweep.num_cells <= _MAX_CHECKED:
        yield from sweep.cells()
        return
    examples = {dimension.name: dimension.examples() for dimension in sweep.dimensions}
    first = {name: values[0] for name, values in examples.items()}
    timing = [name for name in TIMING_FIELDS if name in examples]
    for combined in itertools.product(*(examples.pop(name) for name in timing)):
        base = first | dict(zip(timing, combined, strict=True))
        yield base
        for name, values in examples.items():
            yield from (base | {name: value} for value in values)
