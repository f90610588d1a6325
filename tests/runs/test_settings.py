"""What makes a setting, and which setting is the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config.fields import RunConfig
from finetune.runs.result import RunResult
from finetune.runs.settings import best_setting, results_by_setting, setting_of
from tests.support.synthetic import write_run


def config(**fields: Any) -> dict[str, Any]:
    return RunConfig.from_fields(fields).to_fields()


HERE = {
    "data_dir": "/here/data",
    "cache_dir": "/here/cache",
    "cache_gb": 20,
    "accelerator": "cpu",
    "precision": "32-true",
    "out": "/here/runs",
    "name": "first",
    "seed": 1,
}
THERE = {
    "data_dir": "/there/data",
    "cache_dir": "/there/cache",
    "cache_gb": 3.5,
    "cache": "off",
    "accelerator": "cuda",
    "precision": "bf16-mixed",
    "out": "/there/runs",
    "name": "second",
    "group": "confirm",
    "seed": 2,
}


def test_two_machines_run_the_same_setting() -> None:
    assert setting_of(config(**HERE)) == setting_of(config(**THERE))


@pytest.mark.parametrize(
    "other",
    [{"learning_rate": 0.1}, {"data_aug": "n"}, {"strategy": "gradual"}, {"weights": "a.pth"}],
)
def test_a_searched_field_makes_another_setting(other: dict[str, Any]) -> None:
    assert setting_of(config(**HERE, **other)) != setting_of(config(**HERE))


def test_the_weights_fingerprint_replaces_their_path() -> None:
    one, two = config(weights="/here/w.pth"), config(weights="/there/w.pth")
    assert setting_of(one) != setting_of(two)
    assert setting_of(one, "ab") == setting_of(two, "ab")
    assert setting_of(one, "ab") != setting_of(two, "cd")


def test_missing_fields_have_their_default_and_unknown_fields_do_not_count() -> None:
    whole = config(strategy="gradual")
    older = {name: value for name, value in whole.items() if name not in ("lr_decay", "momentum")}
    assert setting_of(older) == setting_of({**whole, "ema_decay": 0.2}) == setting_of(whole)


def test_a_value_that_this_version_refuses_is_a_setting_of_its_own() -> None:
    newer = {**config(), "strategy": "probe"}
    assert setting_of(newer) == setting_of(dict(newer)) != setting_of(config())


def run(folder: Path, run_id: str, **fields: Any) -> RunResult:
    return RunResult.load(write_run(folder, run_id, **fields))


def chosen(results: list[RunResult], **changes: dict[str, Any]) -> RunResult:
    """The first result of the best setting; `changes` are made to results by their run id."""
    changed = [r.model_copy(update=changes.get(r.run_id, {})) for r in results]
    groups = results_by_setting(changed)
    return groups[best_setting(groups)][0]


def test_the_highest_mean_accuracy_wins_and_ties_fall_to_loss_and_cost(tmp_path: Path) -> None:
    results = [
        run(tmp_path, f"{name}{seed}", learning_rate=rate, seed=seed)
        for name, rate in (("a", 0.1), ("b", 0.01))
        for seed in (1, 2)
    ]
    equal: dict[str, Any] = {
        "best_val_acc": 0.9592,
        "best_val_loss": 0.2,
        "trainable_parameters": 500,
        "train_seconds": 9.0,
    }
    for fields in (
        {"best_val_acc": 0.97},
        {"best_val_loss": 0.1},
        {"trainable_parameters": 400},
        {"train_seconds": 8.0},
    ):
        for winner in ("a", "b"):
            changes = {
                r.run_id: equal | (fields if r.run_id == f"{winner}2" else {}) for r in results
            }
            assert chosen(results, **changes).run_id == f"{winner}1", (fields, winner)
    # a higher accuracy decides before a lower loss
    both = {r.run_id: dict(equal) for r in results}
    both["a1"]["best_val_acc"] = 0.96
    both["b1"]["best_val_loss"] = 0.01
    assert chosen(results, **both).run_id == "a1"


def test_full_ties_do_not_depend_on_the_order_of_the_runs(tmp_path: Path) -> None:
    results = [run(tmp_path, f"r{rate}", learning_rate=rate) for rate in (0.1, 0.01, 0.001)]
    same = results[0].model_dump(include={"best_val_acc", "best_val_loss", "trainable_parameters", "train_seconds"})  # noqa: E501  # fmt: skip
    changes = {result.run_id: same for result in results}
    assert chosen(results, **changes).run_id == chosen(results[::-1], **changes).run_id


def test_equal_sums_in_another_order_are_a_tie(tmp_path: Path) -> None:
    accuracies = {"a1": 0.1, "a2": 0.2, "a3": 0.3, "b1": 0.3, "b2": 0.2, "b3": 0.1 + 1e-16}
    results = [
        run(tmp_path, name, learning_rate=0.1 if name[0] == "a" else 0.01, seed=int(name[1]))
        for name in accuracies
    ]
    changes = {
        name: {"best_val_acc": accuracy, "best_val_loss": 0.1 if name[0] == "b" else 0.2}
        for name, accuracy in accuracies.items()
    }
    assert chosen(results, **changes).run_id == "b1"
