"""The learning-rate range test."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.__main__ import main
from finetune.config.fields import RunConfig
from finetune.runs.run_dir import read_metrics
from finetune.system.errors import ConfigError, FinetuneError, Stopped
from finetune.training import lr_find
from finetune.training.lr_find import HIGHEST_RATE, LOWEST_RATE, NUM_STEPS, RangeTest, range_test
from tests.conftest import Train


def as_flags(fields: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


@pytest.mark.parametrize("strategy", ["partial", "gradual", "scratch"])
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
    assert 1e-3 < rate < 1
    i = found.rates.index(rate)
    assert found.losses[i + 5] < found.losses[i - 5]


def test_a_hundredth_and_a_hundredfold_of_the_suggestion_train_worse(
    fields: dict[str, Any], train: Train
) -> None:
    fields = fields | {"strategy": "partial"}
    rate = range_test(RunConfig.from_fields(fields)).suggestion
    assert rate is not None
    losses = [
        read_metrics(train(strategy="partial", learning_rate=rate * factor).metrics_path)[-1]
        for factor in (0.01, 1, 100)
    ]
    lower, suggested, higher = (row["train_loss"] for row in losses)
    assert suggested < 0.8 * min(lower, higher)


def test_the_same_config_gives_the_same_curve(fields: dict[str, Any]) -> None:
    changes = {"strategy": "partial", "data_aug": "strong", "batch_size": 10}
    config = RunConfig.from_fields(fields | changes)
    first, second = range_test(config), range_test(config)
    assert first == second
    assert first.suggestion == second.suggestion is not None


def test_the_number_of_epochs_does_not_change_the_curve(fields: dict[str, Any]) -> None:
    fields = fields | {"strategy": "partial"}
    one, four = (range_test(RunConfig.from_fields(fields | {"epochs": n})) for n in (1, 4))
    assert one == four
    assert len(one.losses) > 4 * 4  # more steps than four epochs have


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


def test_the_command_prints_the_curve_and_writes_nothing_but_caches(
    fields: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = weights.read_bytes()
    monkeypatch.chdir(tmp_path)
    assert main(["lr_find", "--strategy", "partial", *as_flags(fields)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.split() == ["rate", "loss"]]
    assert 15 <= len(lines) - head <= 30
    flag, value = lines[-1].removeprefix("steepest descent: ").split()
    assert flag == "--learning_rate"
    assert LOWEST_RATE < float(value) < HIGHEST_RATE
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert weights.read_bytes() == before


def test_a_stop_signal_ends_it(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(lr_find._RisingRate):
        def on_train_batch_end(self, *rest: Any) -> None:
            super().on_train_batch_end(*rest)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(lr_find, "_RisingRate", Interrupting)
    with pytest.raises(Stopped):
        main(["lr_find", "--strategy", "freeze", *as_flags(fields)])
    assert not Path(fields["out"]).exists()


def test_a_file_of_fields_is_read(fields: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "given.yaml"
    file.write_text("learning_rate: much\n")
    del fields["learning_rate"]
    with pytest.raises(ConfigError, match="learning_rate: got 'much'"):
        main(["lr_find", "--config", str(file), *as_flags(fields)])


@pytest.mark.parametrize("field", ["data_dir", "weights"])
def test_missing_data_and_weights_exit_with_1(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(FinetuneError, match=f"{field}: .* does not exist") as caught:
        main(["lr_find", "--strategy", "freeze", *as_flags(fields | {field: "/nonexistent"})])
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resume", "runs/a"], "lr_find starts anew"),
        (["--learning_rat", "1"], "unknown field 'learning_rat'; did you mean learning_rate"),
        (["--epochs", "0"], "epochs: got '0'"),
        (["--strategy", "probe"], "strategy: probe has no learning rate to find"),
        (["--strategy"], "expected one argument; see agent.py --help"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        main(["lr_find", *flags])
    assert caught.value.exit_code == 2


def test_a_command_without_run_fields_refuses_unknown_flags() -> None:
    with pytest.raises(ConfigError, match="unrecognized arguments: --strategy freeze"):
        main(["check", "--strategy", "freeze"])


RATES = [10.0**-i for i in range(50, 0, -1)]


def test_a_curve_that_does_not_fall_gives_no_suggestion() -> None:
    rising = RangeTest(RATES, [1 + 0.01 * i for i in range(50)])
    assert rising.suggestion is None
    assert "does not fall" in lr_find.describe(rising)[-1]
    falling = RangeTest(RATES, [1 / (1 + math.exp(i - 30)) for i in range(50)])
    assert falling.suggestion == RATES[30]


def test_a_loss_that_only_varies_gives_no_suggestion(fields: dict[str, Any]) -> None:
    """The head can't learn from the random features of a network that was never trained."""
    found = range_test(RunConfig.from_fields(fields | {"strategy": "freeze"}))
    assert min(found.losses[25:]) < min(found.losses[10:25])
    assert "does not fall more than it varies" in lr_find.describe(found)[-1]


def test_a_fall_from_a_peak_after_the_least_loss_is_not_the_suggestion() -> None:
    losses = [1 / (1 + math.exp((i - 30) / 2)) for i in range(45)] + [1.5, 1.5, 0.5, 0.5, 0.5]
    assert int(np.gradient(losses).argmin()) > 44
    assert RangeTest(RATES, losses).suggestion == RATES[30]


def test_noise_between_steps_does_not_move_the_suggestion() -> None:
    losses = [1 / (1 + math.exp((i - 30) / 3)) for i in range(50)]
    noisy = [loss + 0.15 * (i == 18) - 0.15 * (i == 20) for i, loss in enumerate(losses)]
    assert int(np.gradient(noisy).argmin()) == 19
    rate = RangeTest(RATES, losses).suggestion
    assert rate == RATES[30]
    assert RangeTest(RATES, noisy).suggestion == rate


def test_a_curve_that_is_too_short_gives_no_suggestion() -> None:
    short = RangeTest(RATES[:20], [1.0 - 0.01 * i for i in range(20)])
    assert short.suggestion is None
    assert lr_find.describe(short)[-1] == "the curve has only 20 steps: no rate is suggested"
    assert RangeTest([], []).suggestion is None
    assert "not finite" in lr_find.describe(RangeTest([], []))[0]
