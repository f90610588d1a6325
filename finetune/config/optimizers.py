"""Optimizers as data: the class of each and the fields that it uses."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Optimizer:
    """A class of torch.optim, and its keyword arguments by the config's fields."""

    name: str
    fields: frozenset[str]
    """The config's fields that are also its keyword arguments."""


OPTIMIZERS: Mapping[str, Optimizer] = {
    "sgd": Optimizer("SGD", frozenset({"momentum", "weight_decay"})),
    "adamw": Optimizer("AdamW", frozenset({"weight_decay"})),
}
"""AdamW: Loshchilov & Hutter 2019 (https://arxiv.org/abs/1711.05101)."""

OPTIMIZER_FIELDS = frozenset[str]().union(*(entry.fields for entry in OPTIMIZERS.values()))


def ignored_fields(optimizer: str) -> frozenset[str]:
    """The optimizers' fields that this one doesn't use."""
    return OPTIMIZER_FIELDS - OPTIMIZERS[optimizer].fields
