"""Runs that train their heads together: each is, to the bit, what it is alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.fields import RunConfig
from finetune.model.weights import read_checkpoint
from finetune.runs.result import RunResult, read_failure
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.runs.settings import head_group
from finetune.system.errors import FinetuneError, Pruned
from finetune.training.together import run_together
from finetune.training.train import run

Fields = dict[str, Any]
CHANGES: list[Fields] = [
    {"learning_rate": 0.1},
    {"learning_rate": 0.01, "label_smoothing": 0.1},
    {"learning_rate": 0.03, "weight_decay": 0.01, "lr_schedule": "cosine"},
    {"learning_rate": 0.3, "momentum": 0.0, "patience": 1},
]
TIMES = {"images_per_second", "train_seconds", "cache_seconds", "cache_gb"}


def together(configs: Sequence[RunConfig], folder: Path) -> list[Exception | None]:
    """How each of the runs ends; they are carried out in folder/0, folder/1 ..."""
    ends: dict[int, Exception | None] = {}
    run_dirs = [RunDir(folder / str(i)) for i in range(len(configs))]
    logs = [print for _ in configs]
    run_together(configs, run_dirs, logs, lambda index, row: None, ends.__setitem__)
    return [ends[i] for i in range(len(configs))]


def rows(folder: Path) -> list[dict[str, float]]:
    found = read_metrics(folder / "metrics.csv")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def result(folder: Path) -> Fields:
    found = RunResult.load(folder).model_dump(exclude=TIMES | {"run_id"})
    found["config"] = {k: v for k, v in found["config"].items() if k not in TIMES}
    return found


@pytest.mark.parametrize(
    "shared",
    [
        {},
        {"data_aug": "y", "class_weights": "balanced"},
        {"mixup": 0.4, "epochs": 2},
        pytest.param(
            {"data_aug": "y", "model": "mobilenet_v3_large", "weights": "random", "epochs": 2},
            marks=pytest.mark.slow,
            id="a head of two layers with dropout",
        ),
    ],
)
def test_each_has_the_bits_that_it_has_alone(
    shared: Fields, fields: Fields, tmp_path: Path
) -> None:
    if shared.get("weights") == "random":
        from finetune.model.network import build

        shared["weights"] = str(tmp_path / "source.pth")
        torch.save(build(shared["model"], 7, 64, seed=1).network.state_dict(), shared["weights"])
    given = fields | {"strategy": "freeze", "patience": 0} | shared
    configs = [RunConfig.from_fields(given | change) for change in CHANGES]
    assert len({head_group(config) for config in configs}) == 1
    assert together(configs, tmp_path / "together") == [None] * 4
    for i, config in enumerate(configs):
        alone, here = tmp_path / "alone" / str(i), tmp_path / "together" / str(i)
        run(config, RunDir(alone))
        assert rows(here) == rows(alone)
        assert result(here) == result(alone)
        ours, theirs = (read_checkpoint(place / "best.ckpt") for place in (here, alone))
        assert ours.keys() == theirs.keys() and ours["epoch"] == theirs["epoch"]
        for key, value in theirs["state_dict"].items():
            assert torch.equal(ours["state_dict"][key], value), key
        for found, expected in zip(
            RunDir(here).read_predictions(), RunDir(alone).read_predictions(), strict=True
        ):
            assert (found == expected).all()
        assert {p.name for p in here.iterdir()} == {p.name for p in alone.iterdir()}
    assert len({str(rows(tmp_path / "together" / str(i))) for i in range(4)}) == 4


def test_adamw_too(fields: Fields, tmp_path: Path) -> None:
    given = fields | {"strategy": "freeze", "optimizer": "adamw", "epochs": 3}
    rates = (0.1, 0.01)
    configs = [RunConfig.from_fields(given | {"learning_rate": rate}) for rate in rates]
    assert together(configs, tmp_path / "together") == [None, None]
    for i, config in enumerate(configs):
        run(config, RunDir(tmp_path / "alone" / str(i)))
        assert rows(tmp_path / "together" / str(i)) == rows(tmp_path / "alone" / str(i))


def test_one_that_diverges_or_is_pruned_ends_alone(fields: Fields, tmp_path: Path) -> None:
    given = fields | {"strategy": "freeze", "patience": 0}
    changes = (0.01, 3e38, 0.02)
    configs = [RunConfig.from_fields(given | {"learning_rate": rate}) for rate in changes]
    run_dirs, ends = [RunDir(tmp_path / str(i)) for i in range(3)], {}

    def judge(index: int, row: Any) -> None:
        if index == 2 and row["epoch"] == 1:
            raise Pruned("is not among the best")

    run_together(configs, run_dirs, [print] * 3, judge, ends.__setitem__)
    assert ends[0] is None and result(tmp_path / "0")["epochs_run"] == 4
    assert isinstance(ends[1], FinetuneError) and "learning_rate 3e+38" in str(ends[1])
    states = [read_failure(run_dir.failure_path) for run_dir in run_dirs]
    assert [failure and failure["state"] for failure in states] == [None, "failed", "pruned"]
    assert len(rows(tmp_path / "2")) == 2 and (tmp_path / "2" / "best.ckpt").exists()
    assert not (tmp_path / "1" / "best.ckpt").exists()


@pytest.mark.parametrize(
    ("change", "is_shared"),
    [
        ({"learning_rate": 0.5, "name": "other"}, True),
        ({"seed": 1}, False),
        ({"batch_size": 7}, False),
        ({"data_aug": "strong"}, False),
        ({"epochs": 9}, False),
        ({"optimizer": "adamw"}, False),
        ({"image_size": 32}, False),
    ],
)
def test_what_runs_share_that_train_together(
    change: Fields, is_shared: bool, fields: Fields
) -> None:
    given = fields | {"strategy": "freeze"}
    keys = [head_group(RunConfig.from_fields(f)) for f in (given, given | change)]
    assert (keys[0] == keys[1]) is is_shared and None not in keys


@pytest.mark.parametrize(
    "change",
    [{"strategy": "partial"}, {"strategy": "probe"}, {"keep_last": True}, {"cache": False}],
)
def test_other_runs_train_alone(change: Fields, fields: Fields) -> None:
    assert head_group(RunConfig.from_fields(fields | {"strategy": "freeze"} | change)) is None
