"""What is checked of a sweep before its first trial: what its trials find, and what it may miss."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.config.fields import RunConfig
from finetune.config.given_values import advice
from finetune.data.layout import find_layout
from finetune.sweep.spec import Sweep
from finetune.sweep.sweep_file import read_sweep, sample_values
from finetune.system.errors import ConfigError, DataError, FinetuneError, WeightsError

_MAX_CONFIGS = 2_000


def check_command(sweep: Path, fields: Mapping[str, Any] | None = None, **_: object) -> int:
    """`python -m finetune sweep --check`: read a sweep file and say what it does.

    What is missing on this machine is a warning, because agents may run on others.
    """
    read = read_sweep(sweep, fields)
    print("\n".join([f"{sweep} is valid. {read.summary()}", *read.notes]))
    for line in (*_advice(read), *_missing(read)):
        print(f"warning: {line}")
    return 0


def check_places(sweep: Sweep) -> None:
    """Raises `DataError` or `WeightsError` if all trials would: for data and weights that are
    missing."""
    for error in _missing(sweep):
        raise error


def _missing(sweep: Sweep) -> Iterator[FinetuneError]:
    """What the trials' fixed fields name and is not here."""
    configs = _configs(sweep)
    if configs and not {"data_dir", "labels"} & {*sweep.varied}:
        try:
            _check_data(configs[0].data_dir, configs[0].labels)
        except DataError as error:
            yield error
    if "weights" in sweep.varied:
        return
    for weights in sorted({config.weights or "imagenet" for config in configs} - {"imagenet"}):
        if not Path(weights).exists():
            allowed = "imagenet, a state-dict file or a run directory"
            yield WeightsError(f"weights: {weights} does not exist; pass {allowed}")


def _check_data(data_dir: Path, labels: Path | None) -> None:
    if labels is None:
        find_layout(data_dir)
    elif not labels.is_file():
        raise DataError(f"labels: {labels} does not exist; pass a CSV or metadata.jsonl")


def _advice(sweep: Sweep) -> list[str]:
    """Too few epochs to unfreeze every part, said once for each strategy and number of epochs."""
    lines = dict[str, None]()
    for config in _configs(sweep):
        with suppress(ConfigError):  # a network of timm, which may be installed elsewhere
            lines |= {f"strategy {config.strategy}: {line}": None for line in advice({}, config)}
    return list(lines)


def _configs(sweep: Sweep) -> list[RunConfig]:
    return [sweep.config(values) for values in islice(sample_values(sweep), _MAX_CONFIGS)]
