"""The forms of a sweep file's parameters, as dimensions of a search.

    >>> read_parameter("batch_size", {"values": [32, 64]}).choices
    (32, 64)

Forms and meanings are W&B's (https://docs.wandb.ai/guides/sweeps/sweep-config-keys).
"""

import json
import math
from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from statistics import NormalDist
from typing import Any, NamedTuple

import yaml

from finetune.system.errors import ConfigError
from finetune.system.text import nearest

Value = str | int | float | bool | None
MAX_STEPS = 100_000
_FRACTIONS = (1e-9, 1 - 1e-9)  # a normal distribution's quantiles at 0 and 1 are infinite


@dataclass(frozen=True)
class Dimension:
    """One parameter that varies: choices, or points from low to high and the values they mean."""

    name: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    """Points are integers."""
    meaning: Callable[[Any], Value] = lambda point: point
    steps: tuple[Value, ...] | None = None
    """All values in order, where they are finitely many: the values of a grid."""
    note: str = ""
    """What a user should know about the values."""

    def examples(self) -> list[Value]:
        """Values to check a field with: all choices, or the range's ends and middle."""
        if self.choices:
            return list(self.choices)
        ends = (self.low, self.high)
        low, high = (0.001, 0.999) if ends == _FRACTIONS else ends
        points = (low, (low + high) / 2, high)
        return [self.meaning(int(p) if self.whole else p) for p in points]


@dataclass(frozen=True)
class Constant:
    """A parameter with one value."""

    value: Value


class _Form(NamedTuple):
    """A distribution: required keys, how to build it, and optional keys with their defaults."""

    needs: tuple[str, ...]
    build: Callable[[str, Mapping[str, Any]], Dimension | Constant]
    defaults: Mapping[str, float] = {}


def _categorical(name: str, given: Mapping[str, Any]) -> Dimension:
    values = given["values"]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{name}: values: got {values!r}; must be a list of values")
    texts = [json.dumps(value) for value in values]
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        raise ConfigError(f"{name}: values: {', '.join(twice)} is listed twice")
    return Dimension(name, choices=tuple(values), steps=tuple(values))


def _weighted(name: str, given: Mapping[str, Any]) -> Dimension:
    values, shares = _categorical(name, given).choices, given["probabilities"]
    numbers = isinstance(shares, list) and all(_is_number(p) and p >= 0 for p in shares)
    if not numbers or len(shares) != len(values) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        expected = f"{len(values)} numbers >= 0 that sum to 1, one for each of values"
        raise ConfigError(f"{name}: probabilities: got {shares!r}; must be {expected}")
    starts = list(accumulate(shares))[:-1]
    return Dimension(name, (), *_FRACTIONS, meaning=lambda p: values[bisect(starts, p)])


def _integers(name: str, given: Mapping[str, Any]) -> Dimension:
    low, high = given["min"], given["max"]
    if not (isinstance(low, int) and isinstance(high, int)):
        raise ConfigError(f"{name}: int_uniform: got {low!r} to {high!r}; must be integers")
    if high - low < MAX_STEPS:
        return Dimension(name, (), low, high, whole=True, steps=tuple(range(low, high + 1)))
    # Among many integers TPE's choice takes three times as long as among as many points.
    ends = (low - 0.5, high + 0.5)
    return Dimension(name, (), *ends, meaning=lambda p: min(max(round(p), low), high))


def _uniform(name: str, given: Mapping[str, Any]) -> Dimension:
    return Dimension(name, (), float(given["min"]), float(given["max"]))


def _log_values(name: str, given: Mapping[str, Any]) -> Dimension:
    if given["min"] <= 0:
        raise ConfigError(f"{name}: min: got {given['min']}; must be > 0 for a logarithm")
    return replace(_uniform(name, given), log=True)


def _log_exponents(name: str, given: Mapping[str, Any], sign: int = 1) -> Dimension:
    low, high = sorted((sign * given["min"], sign * given["max"]))
    if max(abs(low), abs(high)) > 700:
        raise ConfigError(
            f"{name}: min and max are exponents of e here and must be -700 to 700; "
            "log_uniform_values takes the values themselves"
        )
    return Dimension(name, (), math.exp(low), math.exp(high), log=True)


def _normal(name: str, given: Mapping[str, Any], of: Callable[[float], float] = float) -> Dimension:
    quantile = NormalDist(given["mu"], given["sigma"]).inv_cdf
    return Dimension(name, (), *_FRACTIONS, meaning=lambda p: of(quantile(p)))


def _quantized(form: _Form) -> _Form:
    """The same distribution, rounded to multiples of q."""

    def build(name: str, given: Mapping[str, Any]) -> Dimension:
        q, plain = given["q"], form.build(name, given)
        assert isinstance(plain, Dimension)

        def rounded(value: Any) -> Value:
            multiple: int | float = round(value / q) * q
            return multiple if isinstance(multiple, int) else float(f"{multiple:.12g}")

        steps = None
        if form.build is _uniform and (plain.high - plain.low) / q < MAX_STEPS:
            multiples = range(round(plain.low / q), round(plain.high / q) + 1)
            steps = tuple(rounded(i * q) for i in multiples)
        return replace(plain, meaning=lambda p: rounded(plain.meaning(p)), steps=steps)

    return _Form(form.needs, build, {**form.defaults, "q": 1})


_RANGE = ("min", "max")
_STANDARD = {"mu": 0, "sigma": 1}
_QUANTIZED = {
    "uniform": _Form(_RANGE, _uniform),
    "log_uniform": _Form(_RANGE, _log_exponents),
    "log_uniform_values": _Form(_RANGE, _log_values),
    "normal": _Form((), _normal, _STANDARD),
    "log_normal": _Form((), partial(_normal, of=math.exp), _STANDARD),
}

DISTRIBUTIONS: Mapping[str, _Form] = {
    "constant": _Form(("value",), lambda name, given: Constant(given["value"])),
    "categorical": _Form(("values",), _categorical),
    "categorical_w_probabilities": _Form(("values", "probabilities"), _weighted),
    "int_uniform": _Form(_RANGE, _integers),
    "inv_log_uniform": _Form(_RANGE, partial(_log_exponents, sign=-1)),
    # 1/X log-uniform between 1/max and 1/min is X log-uniform between min and max
    "inv_log_uniform_values": _Form(_RANGE, _log_values),
    **_QUANTIZED,
    **{f"q_{name}": _quantized(form) for name, form in _QUANTIZED.items()},
}

# Those whose bounds are exponents of e, and what takes values:
_OF_VALUES = {
    "log_uniform": "log_uniform_values",
    "inv_log_uniform": "inv_log_uniform_values",
    "log_normal": "normal",
    "q_log_uniform": "q_log_uniform_values",
    "q_log_normal": "q_normal",
}
_UNSUPPORTED = ("beta", "q_beta")  # their quantiles have no closed form
_NUMBERS = ("min", "max", "mu", "sigma", "q")
_KEYS = ("value", "values", "probabilities", "distribution", *_NUMBERS)


def read_parameter(name: str, given: object, is_numeric: bool = False) -> Dimension | Constant:
    """The meaning of one entry of `parameters`. Raises `ConfigError`, which names the parameter.

    A numeric parameter can't have numbers that YAML reads as strings: W&B would pass strings on.
    """
    distribution = _distribution(name, given)
    form = DISTRIBUTIONS[distribution]
    assert isinstance(given, dict)
    settings = {**form.defaults, **given}
    _check_numbers(name, settings)
    values = given.get("values")
    for value in [given.get("value"), *(values if isinstance(values, list) else ())]:
        if not isinstance(value, str | int | float | bool | None):
            raise ConfigError(f"{name}: got {value!r}; must be a single value")
        if is_numeric and isinstance(value, str) and (advice := _number_as_text(value)):
            raise ConfigError(f"{name}: {advice}")
    read = form.build(name, settings)
    if isinstance(read, Dimension) and distribution in _OF_VALUES:
        return replace(read, note=_range_note(read, distribution, settings))
    return read


def _range_note(dimension: Dimension, distribution: str, settings: Mapping[str, Any]) -> str:
    """The values that a distribution with exponents draws; a warning if values may be meant."""
    low, *_, high = dimension.examples()
    lowest, keys = (
        (settings["min"], "min and max") if "min" in settings else (settings["mu"], "mu and sigma")
    )
    return (
        f"{'warning: ' if lowest > 0 else ''}{dimension.name}: {distribution} draws {low:.5g} to "
        f"{high:.5g}, as its {keys} are exponents of e; {_OF_VALUES[distribution]} takes the "
        "values themselves"
    )


def _distribution(name: str, given: object) -> str:
    """The distribution of an entry with the right keys. Raises `ConfigError`."""
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"{name}: got {given!r}; must be a mapping, such as 'values: [1, 2]'")
    for key in given:
        if key not in (*_KEYS, "a", "b"):
            raise ConfigError(f"{name}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    distribution = str(given.get("distribution") or _implied(name, given))
    where = f"{name}: distribution {distribution}"
    if distribution in _UNSUPPORTED:
        raise ConfigError(f"{where} isn't supported; use uniform, normal or values")
    if distribution not in DISTRIBUTIONS:
        near = nearest(distribution, DISTRIBUTIONS)
        raise ConfigError(f"{name}: unknown distribution {distribution!r}{near}")
    form = DISTRIBUTIONS[distribution]
    if missing := [key for key in form.needs if key not in given]:
        raise ConfigError(f"{where} needs {', '.join(missing)}")
    if foreign := given.keys() - {*form.needs, *form.defaults, "distribution"}:
        raise ConfigError(f"{where} doesn't use {', '.join(sorted(foreign))}")
    return distribution


def _check_numbers(name: str, settings: Mapping[str, Any]) -> None:
    for key in _NUMBERS:
        value = settings.get(key, 1)
        if not _is_number(value):
            advice = _number_as_text(value) if isinstance(value, str) else None
            raise ConfigError(f"{name}: {key}: {advice or f'got {value!r}; must be a number'}")
        if key in ("sigma", "q") and value <= 0:
            raise ConfigError(f"{name}: {key}: got {value}; must be > 0")
    if "min" in settings and settings["min"] >= (high := settings["max"]):
        raise ConfigError(f"{name}: min: got {settings['min']}; must be less than max, {high}")


def _implied(name: str, given: Mapping[str, Any]) -> str:
    """The distribution that W&B assumes when none is named."""
    if "value" in given:
        return "constant"
    if "values" in given:
        return "categorical_w_probabilities" if "probabilities" in given else "categorical"
    if "min" in given and "max" in given:
        low, high = (isinstance(given[key], int) for key in _RANGE)
        if low != high:
            raise ConfigError(
                f"{name}: got min {given['min']!r} and max {given['max']!r}, of which one is an "
                "integer and the other isn't; write both alike, or name the distribution"
            )
        return "int_uniform" if low else "uniform"
    if "mu" in given or "sigma" in given:
        return "normal"
    raise ConfigError(f"{name}: got {given!r}; must have value, values, or min and max")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number_as_text(text: str) -> str | None:
    """The message for a number that YAML reads as a string, such as 1e-3; else None."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    advice = yaml.safe_dump(int(text) if text.isdecimal() else number).split()[0]
    return f"YAML reads {text} as a string, not as a number; write {advice}, without quotes"
