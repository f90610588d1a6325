"""W&B's parameter forms -> dimensions of a search.

Turns one entry of a sweep file's `parameters` into a constant or a `Dimension`: a choice, or a
range with a function from the point drawn to the value meant. Knows nothing about runs or Optuna.

    >>> read_parameter("batch_size", {"values": [32, 64]}).choices
    (32, 64)

The forms and their meaning are W&B's (https://docs.wandb.ai/guides/sweeps/sweep-config-keys).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

from finetune.system.errors import ConfigError
from finetune.system.text import nearest

Value = str | int | float | bool | None
MAX_STEPS = 100_000
_EDGE = 1e-9  # a normal's quantiles at 0 and 1 are infinite


@dataclass(frozen=True)
class Dimension:
    """One parameter that varies: choices, or the points from low to high and what they mean."""

    name: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    meaning: Callable[[Any], Value] = lambda point: point
    steps: tuple[Value, ...] | None = None
    """Every value, in order, where there are finitely many: what a grid goes through."""

    def examples(self) -> list[Value]:
        """Values to check the field with: all choices, or the ends and middle of the range."""
        if self.choices:
            return list(self.choices)
        if (self.low, self.high) == (_EDGE, 1 - _EDGE):
            points: list[float] = [0.001, 0.5, 0.999]
        else:
            points = [self.low, (self.low + self.high) / 2, self.high]
        return [self.meaning(int(p) if self.whole else p) for p in points]


@dataclass(frozen=True)
class Constant:
    """A parameter with one value."""

    value: Value


@dataclass(frozen=True)
class _Form:
    """A distribution: the keys it needs, those it may have with their defaults, and its meaning."""

    needs: tuple[str, ...]
    build: Callable[[str, Mapping[str, Any]], Dimension | Constant]
    defaults: Mapping[str, float]


def _categorical(name: str, given: Mapping[str, Any]) -> Dimension:
    values = given["values"]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{name}: values: got {values!r}; a list of values is needed")
    for value in values:
        _check_scalar(name, value)
    texts = [json.dumps(value) for value in values]
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        raise ConfigError(f"{name}: values: {', '.join(twice)} stands there more than once")
    return Dimension(name, choices=tuple(values), steps=tuple(values))


def _weighted(name: str, given: Mapping[str, Any]) -> Dimension:
    values, shares = _categorical(name, given).choices, given["probabilities"]
    numbers = isinstance(shares, list) and all(_is_number(p) and p >= 0 for p in shares)
    if not numbers or len(shares) != len(values) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ConfigError(
            f"{name}: probabilities: got {shares!r}; {len(values)} numbers from 0 on that sum to 1 "
            "are needed, one for each of values"
        )
    ends = [sum(shares[: i + 1]) for i in range(len(shares))]

    def meaning(point: float) -> Value:
        return next((v for v, end in zip(values, ends, strict=True) if point < end), values[-1])

    return Dimension(name, low=_EDGE, high=1 - _EDGE, meaning=meaning)


def _whole(name: str, given: Mapping[str, Any]) -> Dimension:
    low, high = given["min"], given["max"]
    if not (isinstance(low, int) and isinstance(high, int)):
        raise ConfigError(f"{name}: int_uniform: got {low!r} to {high!r}; whole numbers are needed")
    if high - low < MAX_STEPS:
        steps = tuple(range(low, high + 1))
        return Dimension(name, low=low, high=high, whole=True, steps=steps)
    # Among many whole numbers TPE's choice takes three times as long as among as many points.
    nearest_whole = partial(_nearest_whole, low, high)
    return Dimension(name, low=low - 0.5, high=high + 0.5, meaning=nearest_whole)


def _nearest_whole(low: int, high: int, point: float) -> int:
    return min(max(round(point), low), high)


def _uniform(name: str, given: Mapping[str, Any]) -> Dimension:
    return Dimension(name, low=float(given["min"]), high=float(given["max"]))


def _log_values(name: str, given: Mapping[str, Any]) -> Dimension:
    if given["min"] <= 0:
        raise ConfigError(f"{name}: min: got {given['min']}; a logarithm needs it above 0")
    return Dimension(name, low=float(given["min"]), high=float(given["max"]), log=True)


def _log_exponents(sign: int) -> Callable[[str, Mapping[str, Any]], Dimension]:
    def build(name: str, given: Mapping[str, Any]) -> Dimension:
        low, high = sorted((sign * given["min"], sign * given["max"]))
        if max(abs(low), abs(high)) > 700:
            raise ConfigError(
                f"{name}: min and max are exponents of e here, and e to the {high} is too large; "
                "log_uniform_values takes the values themselves"
            )
        return Dimension(name, low=math.exp(low), high=math.exp(high), log=True)

    return build


def _normal(name: str, given: Mapping[str, Any]) -> Dimension:
    if given["sigma"] <= 0:
        raise ConfigError(f"{name}: sigma: got {given['sigma']}; it must be above 0")
    quantile = NormalDist(given["mu"], given["sigma"]).inv_cdf
    return Dimension(name, low=_EDGE, high=1 - _EDGE, meaning=quantile)


def _log_normal(name: str, given: Mapping[str, Any]) -> Dimension:
    quantile = NormalDist(given["mu"], given["sigma"]).inv_cdf if given["sigma"] > 0 else None
    if quantile is None:
        raise ConfigError(f"{name}: sigma: got {given['sigma']}; it must be above 0")
    return Dimension(name, low=_EDGE, high=1 - _EDGE, meaning=lambda p: math.exp(quantile(p)))


def _in_steps(form: _Form) -> _Form:
    """The same distribution, rounded to multiples of q."""

    def build(name: str, given: Mapping[str, Any]) -> Dimension:
        q = given["q"]
        if q <= 0:
            raise ConfigError(f"{name}: q: got {q}; it must be above 0")
        plain = form.build(name, given)
        assert isinstance(plain, Dimension)

        def rounded(value: Any) -> Value:
            multiple: int | float = round(value / q) * q
            return multiple if isinstance(multiple, int) else float(f"{multiple:.12g}")

        steps = None
        if form is _UNIFORM and (plain.high - plain.low) / q < MAX_STEPS:
            first, last = round(plain.low / q), round(plain.high / q)
            steps = tuple(rounded(i * q) for i in range(first, last + 1))
        meaning = plain.meaning
        return Dimension(
            name, (), plain.low, plain.high, plain.log, False, lambda p: rounded(meaning(p)), steps
        )

    return _Form(form.needs, build, {**form.defaults, "q": 1})


_RANGE = ("min", "max")
_STANDARD = {"mu": 0, "sigma": 1}
_UNIFORM = _Form(_RANGE, _uniform, {})
_LOG_UNIFORM = _Form(_RANGE, _log_exponents(1), {})
_LOG_UNIFORM_VALUES = _Form(_RANGE, _log_values, {})
_NORMAL = _Form((), _normal, _STANDARD)
_LOG_NORMAL = _Form((), _log_normal, _STANDARD)

DISTRIBUTIONS: Mapping[str, _Form] = {
    "constant": _Form(("value",), lambda name, given: Constant(given["value"]), {}),
    "categorical": _Form(("values",), _categorical, {}),
    "categorical_w_probabilities": _Form(("values", "probabilities"), _weighted, {}),
    "int_uniform": _Form(_RANGE, _whole, {}),
    "uniform": _UNIFORM,
    "q_uniform": _in_steps(_UNIFORM),
    "log_uniform": _LOG_UNIFORM,
    "q_log_uniform": _in_steps(_LOG_UNIFORM),
    "inv_log_uniform": _Form(_RANGE, _log_exponents(-1), {}),
    "log_uniform_values": _LOG_UNIFORM_VALUES,
    "q_log_uniform_values": _in_steps(_LOG_UNIFORM_VALUES),
    # 1/X log-uniform between 1/max and 1/min is X log-uniform between min and max
    "inv_log_uniform_values": _LOG_UNIFORM_VALUES,
    "normal": _NORMAL,
    "q_normal": _in_steps(_NORMAL),
    "log_normal": _LOG_NORMAL,
    "q_log_normal": _in_steps(_LOG_NORMAL),
}

_UNMAPPED = {"beta": "its quantiles have no closed form", "q_beta": "see beta"}
_KEYS = ("value", "values", "probabilities", "distribution", "min", "max", "mu", "sigma", "q")


def read_parameter(name: str, given: object) -> Dimension | Constant:
    """What one entry of `parameters` means. Raises `ConfigError`, naming the parameter."""
    if not isinstance(given, dict) or not given:
        raise ConfigError(
            f"{name}: got {given!r}; W&B wants a mapping, such as 'value: 1' or 'values: [1, 2]'"
        )
    if "parameters" in given:
        raise ConfigError(f"{name}: nested parameters can't be mapped; a run's fields are flat")
    for key in given:
        if key not in (*_KEYS, "a", "b"):
            raise ConfigError(f"{name}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    distribution = given.get("distribution") or _implied(name, given)
    if distribution in _UNMAPPED:
        raise ConfigError(
            f"{name}: distribution {distribution} can't be mapped: {_UNMAPPED[distribution]}; "
            "use uniform, normal or values"
        )
    form = DISTRIBUTIONS.get(str(distribution))
    if form is None:
        near = nearest(str(distribution), DISTRIBUTIONS)
        raise ConfigError(f"{name}: unknown distribution {distribution!r}{near}")
    return _built(name, str(distribution), form, given)


def _built(
    name: str, distribution: str, form: _Form, given: Mapping[str, Any]
) -> Dimension | Constant:
    missing = [key for key in form.needs if key not in given]
    allowed = {*form.needs, *form.defaults, "distribution"}
    foreign = [key for key in given if key not in allowed]
    if missing or foreign:
        words = [f"needs {', '.join(missing)}"] * bool(missing)
        words += [f"has no meaning for {', '.join(foreign)}"] * bool(foreign)
        raise ConfigError(f"{name}: distribution {distribution} {' and '.join(words)}")
    settings = {**form.defaults, **given}
    for key in ("min", "max", "mu", "sigma", "q"):
        if key in settings and key in allowed:
            _check_number(name, key, settings[key])
    if "min" in form.needs and not settings["min"] < settings["max"]:
        raise ConfigError(
            f"{name}: min: got {settings['min']}; it must be below max, {settings['max']}"
        )
    if "value" in form.needs:
        _check_scalar(name, settings["value"])
    return form.build(name, settings)


def _implied(name: str, given: Mapping[str, Any]) -> str:
    """The distribution that W&B takes when none is named."""
    if "value" in given:
        return "constant"
    if "values" in given:
        return "categorical_w_probabilities" if "probabilities" in given else "categorical"
    if "min" in given and "max" in given:
        whole = [isinstance(given[key], int) for key in _RANGE]
        if any(whole) and not all(whole):
            raise ConfigError(
                f"{name}: min is {given['min']!r} and max is {given['max']!r}: one is a whole "
                "number and one isn't; write both alike, or name the distribution"
            )
        return "int_uniform" if all(whole) else "uniform"
    if "mu" in given or "sigma" in given:
        return "normal"
    raise ConfigError(f"{name}: got {given!r}; value, values, or min and max are needed")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_number(name: str, key: str, value: object) -> None:
    if _is_number(value):
        return
    if isinstance(value, str) and (text := number_as_text(value)):
        raise ConfigError(f"{name}: {key}: {text}")
    raise ConfigError(f"{name}: {key}: got {value!r}; a number is needed")


def _check_scalar(name: str, value: object) -> None:
    if not isinstance(value, str | int | float | bool | None):
        raise ConfigError(f"{name}: got {value!r}; a field holds a single value")


def number_as_text(text: str) -> str | None:
    """What to say of a number that YAML made a text, such as 1e-3; None for other texts."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    dotted = text if "." in text else text.replace("e", ".0e", 1).replace("E", ".0E", 1)
    advice = f"{dotted} or {number:.12g}" if dotted not in (text, f"{number:g}") else f"{number:g}"
    return f"YAML reads {text} as a text, not as a number; write {advice}, without quotes"
