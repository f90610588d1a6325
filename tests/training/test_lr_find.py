"""The learning-rate range test."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.__main__ import main
from finetune.config.fields import RunConfig
from finetune.system.errors import ConfigError
from finetune.training import lr_find
from finetune.training.lr_find import HIGHEST_RATE, LOWEST_RATE, NUM_STEPS, RangeTest, range_test


def as_flags(fields: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


@pytest.mark.parametrize("strategy", ["freeze", "gradual", "scratch"])
def test_the_rates_rise_and_the_suggestion_is_where_the_loss_falls(
    strategy: str, fields: dict[str, Any]
) -> None:
    found = range_test(RunConfig.from_fields(fields | {"strategy": strategy}))
    assert found.rates[0] == LOWEST_RATE
    assert found.rates == sorted(found.rates)
    assert found.rates[-1] <= HIGHEST_RATE * (1 + 1e-9)
    assert 20 < len(found.losses) == len(found.rates) <= NUM_STEPS
    assert found.losses[-1] <= 4 * min(found.losses)
    rate = found.suggestion
    assert rate is not None
    assert 1e-4 < rate < HIGHEST_RATE
    i = found.rates.index(rate)
    assert found.losses[i + 1] < found.losses[i - 1]


def test_the_same_config_gives_the_same_curve(fields: dict[str, Any]) -> None:
    config = RunConfig.from_fields(fields | {"strategy": "partial", "data_aug": "strong"})
    assert range_test(config) == range_test(config)


def test_all_parts_that_will_train_are_open_with_their_shares_of_the_rate(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watched(lr_find._RisingRate):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            groups = trainer.optimizers[0].param_groups
            trained = [g["name"] for g in groups if g["params"][0].requires_grad]
            seen.append((trained, [g["lr"] / self.rates[-1] for g in groups]))
            super().on_train_batch_end(trainer, pl_module, *rest)

    monkeypatch.setattr(lr_find, "_RisingRate", Watched)
    range_test(RunConfig.from_fields(fields | {"strategy": "gradual"}))
    assert {tuple(trained) for trained, _ in seen} == {("layer2", "layer3", "layer4", "fc")}
    assert seen[0][1][-4:] == pytest.approx([0.125, 0.25, 0.5, 1])


def test_the_command_prints_the_curve_and_writes_nothing(
    fields: dict[str, Any], capsys: pytest.CaptureFixture[str], weights: Path
) -> None:
    before = torch.load(weights, weights_only=True)
    assert main(["lr_find", "--strategy", "freeze", *as_flags(fields)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.split() == ["rate", "loss"]]
    assert 15 <= len(lines) - head <= 30
    flag, value = lines[-1].removeprefix("steepest descent: ").split()
    assert flag == "--learning_rate"
    assert LOWEST_RATE < float(value) < HIGHEST_RATE
    assert not Path(fields["out"]).exists()
    after = torch.load(weights, weights_only=True)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resume", "runs/a"], "lr_find starts anew"),
        (["--learning_rat", "1"], "unknown field 'learning_rat'; did you mean learning_rate"),
        (["--epochs", "0"], "epochs: got '0'"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        main(["lr_find", *flags])


def test_a_command_without_run_fields_refuses_unknown_flags() -> None:
    with pytest.raises(ConfigError, match="unrecognized arguments: --strategy freeze"):
        main(["check", "--strategy", "freeze"])


def test_a_curve_that_does_not_fall_gives_no_suggestion() -> None:
    rates = [10.0**-i for i in range(50, 0, -1)]
    rising = RangeTest(rates, [1 + 0.01 * i for i in range(50)])
    assert rising.suggestion is None
    assert lr_find.describe(rising)[-1] == "the loss does not fall: no rate is suggested"
    falling = RangeTest(rates, [1 / (1 + math.exp(i - 25)) for i in range(50)])
    assert falling.suggestion == rates[25]
    assert RangeTest([], []).suggestion is None
    assert "not finite" in lr_find.describe(RangeTest([], []))[0]
