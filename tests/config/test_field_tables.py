"""What each config field says about itself."""

from __future__ import annotations

from typing import get_args

import pytest

from finetune.config.field_tables import (
    NUMERIC_FIELDS,
    TIMING_FIELDS,
    fields_with_role,
    in_order,
    shown,
    title,
)
from finetune.config.field_types import Role
from finetune.config.fields import RunConfig
from finetune.system.errors import ConfigError


def test_every_field_has_one_role() -> None:
    names = [name for role in get_args(Role) for name in fields_with_role(role)]
    assert sorted(names) == sorted(RunConfig.model_fields)
    assert fields_with_role("repeat") == ("fold", "seed")
    assert {"data_dir", "cache_dir", "cache_gb", "accelerator", "precision", "out"} <= set(
        fields_with_role("environment")
    )


@pytest.mark.parametrize("name", RunConfig.model_fields)
def test_numeric_fields_are_those_that_read_text_as_a_number(name: str) -> None:
    def reads(text: str) -> bool:
        try:
            value = getattr(RunConfig.from_fields({"strategy": "gradual", name: text}), name)
        except ConfigError:
            return False
        return isinstance(value, int | float) and not isinstance(value, bool)

    assert any(map(reads, ("1", "0.5", "64"))) == (name in NUMERIC_FIELDS)


def test_timing_fields_are_those_that_change_the_plan() -> None:
    strategy = RunConfig(strategy="gradual")
    timing = {"model", "strategy", "unfreeze_from", "unfreeze_every", "lr_decay"}
    assert set(TIMING_FIELDS) == timing
    for name, value in {"strategy": "freeze", "unfreeze_from": "stem", "unfreeze_every": 3}.items():
        other = RunConfig.from_fields({"strategy": "gradual", name: value})
        assert other.plan.start_epochs != strategy.plan.start_epochs


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("data_aug", "y", "flip"),
        ("data_aug", "strong", "strong"),
        ("learning_rate", 1e-3, "0.001"),
        ("batch_size", 1_000_000, "1000000"),
        ("cache", False, "off"),
        ("unfreeze_from", None, "–"),
        ("from_a_newer_version", "x", "x"),
    ],
)
def test_values_are_shown_as_words(name: str, value: object, words: str) -> None:
    assert shown(name, value) == words


def test_titles_are_words() -> None:
    names = ("learning_rate", "data_aug", "lr_schedule", "from_a_newer_version")
    expected = ["learning rate", "augmentation", "schedule", "from a newer version"]
    assert [title(name) for name in names] == expected


def test_values_are_ordered_by_size_or_as_the_field_lists_them() -> None:
    assert in_order("learning_rate", [0.1, 0.001, 0.01]) == [0.001, 0.01, 0.1]
    assert in_order("data_aug", ["strong", "y", "n"]) == ["n", "y", "strong"]
    assert in_order("strategy", ["scratch", "freeze"]) == ["freeze", "scratch"]
    assert in_order("lr_schedule", ["onecycle", "constant", "zigzag"])[0] == "constant"
