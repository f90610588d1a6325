"""Names that other programs use: every way to give fields says what they are called here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config.aliases import ALIASES, NO_FIELD, hint
from finetune.config.fields import RunConfig
from finetune.config.flags import given_fields, parser
from finetune.config.given_values import read_mapping
from finetune.sweep.sweep_file import read_sweep
from finetune.system.errors import ConfigError
from finetune.training.train import train_and_finetune

FLAGS = {*RunConfig.model_fields, "config", "resume"}
NAMES = {
    "lr": "learning_rate",
    "LR": "learning_rate",
    "bs": "batch_size",
    "batchSize": "batch_size",
    "wd": "weight_decay",
    "n_epochs": "epochs",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "augmentation": "data_aug",
    "augment": "data_aug",
    "dataset": "data_dir",
    "data_path": "data_dir",
    "data": "data_dir",
    "img_size": "image_size",
    "scheduler": "lr_schedule",
    "pretrained": "weights",
    "early_stopping": "patience",
    "output_dir": "out",
    "device": "accelerator",
    "run_name": "name",
    "model_type": "model",
    "arch": "model",
    "backbone": "model",
    "optim": "optimizer",
}
WITHOUT_FIELD = {
    "num_filters": "the layers are those of the network, which `model` names",
    "dropout": "dropout is what the network has",
    "num_classes": "the classes are the folders in data_dir",
    "beta1": "the optimizers are used with learning_rate, momentum and weight_decay",
    "num_workers": "a run reads pictures from its cache",
}
SHORT_FLAGS = ("lr", "bs", "wd")
MESSAGES = {
    **{name: f"unknown field {name!r}: the field is {field}" for name, field in NAMES.items()},
    **{n: f"unknown field {n!r}: there is no such field; {r}" for n, r in WITHOUT_FIELD.items()},
}


def from_a_file(fields: dict[str, Any]) -> object:
    Path("config.yaml").write_text("".join(f"{k}: {v}\n" for k, v in fields.items()))
    return RunConfig.from_fields(read_mapping(Path("config.yaml")))


def from_a_sweep(fields: dict[str, Any]) -> object:
    parameters = {name: {"value": value} for name, value in fields.items()}
    return read_sweep({"method": "grid", "parameters": parameters})


WAYS = {
    "flags": lambda fields: given_fields([f"--{k}={v}" for k, v in fields.items()]),
    "flags and values": lambda fields: given_fields([w for k in fields for w in (f"--{k}", "3")]),
    "words": lambda fields: given_fields([f"{k}={v}" for k, v in fields.items()]),
    "file": from_a_file,
    "sweep": from_a_sweep,
    "call": lambda fields: train_and_finetune(**fields),
}


REFUSED = [(n, w) for n in MESSAGES for w in WAYS if n not in SHORT_FLAGS or "flags" not in w]


@pytest.mark.parametrize(("name", "way"), REFUSED)
def test_a_name_of_other_programs_is_refused_with_the_field(
    name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        WAYS[way]({name: 3})
    assert MESSAGES[name] in str(refused.value)


@pytest.mark.parametrize("way", ["file", "sweep", "call"])
def test_a_field_with_a_hyphen_is_named(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="'weight-decay': the field is weight_decay"):
        WAYS[way]({"weight-decay": 0.1})


def test_the_help_groups_the_fields_and_shows_their_choices() -> None:
    text = parser("agent.py").format_help()
    assert "--optimizer sgd|adamw" in text
    assert "--learning_rate VALUE, --lr VALUE" in " ".join(text.split())
    titles = ["the network and what of it trains:", "the pictures:", "the training:"]
    places = [text.index(title) for title in titles]
    assert places[0] < text.index("  --strategy") < max(places)
    for name in RunConfig.model_fields:
        assert text.count(f"\n  --{name} ") == 1, name


def test_flags_may_have_hyphens() -> None:
    assert given_fields(["--lr", "0.1", "--bs=4"]) == {"learning_rate": "0.1", "batch_size": "4"}
    words = ["--weight-decay=0.1", "--batch-size", "3", "--skip-unreadable", "--lr-schedule=cosine"]
    assert given_fields(words) == {
        "weight_decay": "0.1",
        "batch_size": "3",
        "skip_unreadable": "true",
        "lr_schedule": "cosine",
    }


def test_every_alias_means_one_field_and_is_none() -> None:
    assert ALIASES.keys() <= FLAGS
    aliases = " ".join([*ALIASES.values(), *NO_FIELD.values()]).split()
    assert len(set(aliases)) == len(aliases)
    assert not FLAGS & set(aliases)
    assert all(hint(alias) for alias in aliases)
    assert not any(hint(field) for field in FLAGS)
