from __future__ import annotations

from pathlib import Path

import pytest

from finetune.analysis.comparison import Comparison, compare
from finetune.analysis.read_runs import read_runs
from finetune.analysis.report.report import terminal_summary
from finetune.system.errors import RunDirError
from tests.support.synthetic import (
    write_confirmed,
    write_failure,
    write_pruned,
    write_run,
    write_sweep,
)


def compared(runs_dir: Path) -> Comparison:
    return compare(read_runs(runs_dir))


def test_strategies_are_compared_if_they_have_fresh_seeds(tmp_path: Path) -> None:
    write_confirmed(tmp_path, {"partial": 0.85, "freeze": 0.75, "scratch": 0.5})
    comparison = compared(tmp_path)
    assert comparison.about_strategies
    assert [summary.strategy for summary in comparison.summaries] == [
        "partial",
        "freeze",
        "scratch",
    ]
    assert all(pair.significant for pair in comparison.differences)
    assert all(pair.p_mcnemar is None for pair in comparison.differences)
    assert "partial wins with 8" in comparison.headline
    assert "freeze is 10." in comparison.headline or "freeze is 9." in comparison.headline
    assert comparison.advice == ""


def test_no_winner_is_named_without_a_significant_difference(tmp_path: Path) -> None:
    write_confirmed(tmp_path, {"partial": 0.80, "gradual": 0.799}, num_seeds=3)
    headline = compared(tmp_path).headline
    assert headline.startswith("No significant difference between")
    assert "wins" not in headline


def test_a_sweep_without_fresh_seeds_is_a_comparison_of_models_only(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    comparison = compared(tmp_path)
    assert not comparison.about_strategies
    assert comparison.headline.startswith("The best model found is partial-lr0.01-bs32-aug at 84")
    assert "compares these models, not the strategies" in comparison.advice
    assert "python -m finetune confirm" in comparison.advice
    assert all(pair.p_mcnemar is not None for pair in comparison.differences)


def test_runs_that_were_used_to_choose_a_setting_are_not_fresh(tmp_path: Path) -> None:
    """A grid over three seeds and two learning rates."""
    for seed in (1, 2, 3):
        for strategy in ("partial", "freeze"):
            for rate in (0.01, 0.1):
                write_run(
                    tmp_path,
                    f"{strategy}{seed}{rate}",
                    strategy=strategy,
                    seed=seed,
                    learning_rate=rate,
                )
    assert not compared(tmp_path).about_strategies


def test_only_fresh_seeds_are_compared_if_a_sweep_was_confirmed(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep")
    write_confirmed(tmp_path / "confirmed", {"partial": 0.82, "gradual": 0.78, "freeze": 0.7})
    comparison = compared(tmp_path)
    assert comparison.about_strategies
    confirmed = comparison.summaries[:3]
    assert [[run.result.seed for run in summary.chosen if run.result] for summary in confirmed] == [
        [1000, 1001, 1002, 1003, 1004]
    ] * 3
    assert any("scratch: fewer than 3 fresh seeds" in line for line in comparison.warnings)
    assert {d.first for d in comparison.differences} | {
        d.second for d in comparison.differences
    } == {"partial", "gradual", "freeze"}


def test_two_settings_with_different_seeds_do_not_confirm_each_other(
    tmp_path: Path,
) -> None:
    """Each setting has three seeds of its own, and no other runs were used to choose."""
    for strategy in ("partial", "freeze"):
        for i, rate in enumerate((0.01, 0.1)):
            for seed in range(3 * i, 3 * i + 3):
                write_run(
                    tmp_path,
                    f"{strategy}{rate}-{seed}",
                    strategy=strategy,
                    seed=seed,
                    learning_rate=rate,
                )
    assert not compared(tmp_path).about_strategies


def test_the_trials_of_a_sweep_are_not_fresh_even_with_different_seeds(
    tmp_path: Path,
) -> None:
    for strategy in ("partial", "freeze"):
        for seed, rate in enumerate((0.001, 0.01, 0.1)):
            accuracy = 0.9 if rate == 0.01 else 0.8
            run_id = f"{strategy}{seed}"
            write_run(tmp_path, run_id, accuracy, strategy=strategy, seed=seed, learning_rate=rate, group="search")  # noqa: E501  # fmt: skip
    write_confirmed(tmp_path, {"partial": 0.85, "freeze": 0.7}, num_seeds=3, group="confirm-1")
    comparison = compared(tmp_path)
    assert comparison.about_strategies
    assert [len(summary.chosen) for summary in comparison.summaries] == [3, 3]


def test_the_search_decides_between_two_confirmed_settings(
    tmp_path: Path,
) -> None:
    for rate, found in ((0.01, 0.85), (0.1, 0.8)):
        write_run(tmp_path, f"search{rate}", found, learning_rate=rate, strategy="partial")
        for seed in (1, 2, 3) if rate == 0.01 else (4, 5, 6, 7):
            fresh = 0.8 if rate == 0.01 else 0.9
            write_run(tmp_path, f"fresh{rate}-{seed}", fresh, learning_rate=rate, strategy="partial", seed=seed)  # noqa: E501  # fmt: skip
    write_confirmed(tmp_path, {"freeze": 0.7})
    leader = compared(tmp_path).summaries[0]
    assert leader.fresh
    assert {run.config["learning_rate"] for run in leader.chosen} == {0.01}


def test_a_better_setting_found_after_the_confirmation_is_a_caveat(tmp_path: Path) -> None:
    write_confirmed(tmp_path, {"partial": 0.8, "freeze": 0.7})
    write_run(tmp_path, "old", 0.8, strategy="partial", learning_rate=0.01)
    write_run(tmp_path, "new", 0.95, strategy="partial", learning_rate=0.05, seed=42)
    marks = compared(tmp_path).summaries[0].caveats
    assert "another setting was better in the search but has no fresh seeds" in marks


def test_diverged_fresh_seeds_are_a_caveat(tmp_path: Path) -> None:
    write_confirmed(tmp_path, {"partial": 0.8, "freeze": 0.7})
    reason = "diverged in epoch 0 at learning_rate 0.01: train_loss is nan"
    for seed in (1005, 1006):
        write_failure(tmp_path, f"d{seed}", "failed", reason, strategy="partial", learning_rate=0.01, seed=seed, weights="imagenet", val_fraction=0.2)  # noqa: E501  # fmt: skip
    partial, freeze = compared(tmp_path).summaries
    assert partial.caveats == ("2 more of this setting diverged and are not in the mean",)
    assert freeze.caveats == ()


def test_fresh_seeds_of_only_one_strategy_are_not_compared_with_best_runs(
    tmp_path: Path,
) -> None:
    write_sweep(tmp_path)
    write_confirmed(tmp_path / "more", {"partial": 0.75})
    comparison = compared(tmp_path)
    assert not comparison.about_strategies
    assert comparison.winner is not None
    assert comparison.winner.run_id == "par132y"
    assert comparison.headline.startswith("The best model found is partial")


def test_a_confirmed_winner_is_corrected_for_selection_from_the_fresh_runs(
    tmp_path: Path,
) -> None:
    write_sweep(tmp_path / "sweep")
    write_confirmed(tmp_path / "confirm", {"partial": 0.8, "freeze": 0.7})
    comparison = compared(tmp_path)
    assert comparison.num_candidates == 10
    assert comparison.corrected is not None
    assert comparison.winner is not None
    assert comparison.winner.result is not None
    assert comparison.winner.result.seed >= 1000
    assert comparison.corrected.accuracy < comparison.winner.result.best_val_acc


def test_the_corrected_accuracy_is_not_above_that_of_the_best_run(tmp_path: Path) -> None:
    for i in range(30):
        write_run(tmp_path, f"run{i}", 0.70, learning_rate=0.001 * (i + 1), num_val=200)
    comparison = compared(tmp_path)
    assert comparison.corrected is not None
    assert comparison.num_candidates == 30
    assert comparison.winner is not None
    assert comparison.winner.result is not None
    assert comparison.corrected.accuracy <= comparison.winner.result.best_val_acc


def test_caveats_name_why_a_strategy_may_not_have_had_a_fair_chance(tmp_path: Path) -> None:
    for rate, accuracy in ((0.001, 0.6), (0.01, 0.7), (0.1, 0.8)):
        write_run(tmp_path, f"p{rate}", accuracy, strategy="partial", learning_rate=rate)
        write_run(
            tmp_path,
            f"s{rate}",
            0.5 - abs(rate - 0.01),
            strategy="scratch",
            learning_rate=rate,
            best_epoch=9,
            train_acc=0.8,
        )
    partial, scratch = compared(tmp_path).summaries
    assert partial.caveats == ("its best learning rate, 0.1, is the largest that was tried",)
    assert scratch.caveats == (
        "still improving at its last epoch",
        "training accuracy stayed at 80%",
    )
    assert partial.limitation == scratch.limitation == " within 10 epochs"


def test_a_learning_rate_below_a_diverged_one_is_not_the_largest_tried(tmp_path: Path) -> None:
    for rate, accuracy in ((0.001, 0.6), (0.01, 0.7)):
        write_run(tmp_path, f"p{rate}", accuracy, strategy="partial", learning_rate=rate)
    reason = "diverged in epoch 0 at learning_rate 0.1: train_loss is nan"
    write_failure(tmp_path, "p0.1", "failed", reason, strategy="partial", learning_rate=0.1)
    partial, _ = compared(tmp_path).summaries
    assert partial.caveats == ()


def test_a_learning_rate_whose_run_failed_otherwise_was_not_tried(tmp_path: Path) -> None:
    for rate, accuracy in ((0.001, 0.6), (0.01, 0.7)):
        write_run(tmp_path, f"p{rate}", accuracy, strategy="partial", learning_rate=rate)
    reason = "out of memory; lower batch_size"
    write_failure(tmp_path, "p0.1", "failed", reason, strategy="partial", learning_rate=0.1)
    partial, _ = compared(tmp_path).summaries
    assert partial.caveats == ("its best learning rate, 0.01, is the largest that was tried",)


def test_the_headline_on_one_strategy_is_about_its_settings(tmp_path: Path) -> None:
    for rate, accuracy in ((0.001, 0.6), (0.01, 0.75), (0.1, 0.74)):
        write_run(tmp_path, f"r{rate}", accuracy, strategy="freeze", learning_rate=rate)
    comparison = compared(tmp_path)
    assert comparison.headline.startswith("The best model found is freeze-lr0.01 at 75.0 % (")
    assert "it beats the best model of learning rate 0.001" in comparison.headline
    assert "no significant difference from learning rate 0.1" in comparison.headline
    assert "not the settings" in comparison.advice
    assert [str(s.group) for s in comparison.summaries] == [
        *("learning rate 0.01", "learning rate 0.1", "learning rate 0.001")
    ]


def test_more_settings_than_can_be_compared_are_only_searched(tmp_path: Path) -> None:
    for i in range(14):
        write_run(tmp_path, f"r{i}", 0.7 + 0.002 * i, strategy="freeze", learning_rate=0.001 + i)
    comparison = compared(tmp_path)
    assert comparison.headline.startswith(
        "The best of 14 settings of freeze is freeze-lr13.001 at 72.6 % ("
    )
    assert "corrected for selection from 14 runs)" in comparison.headline


def test_the_headline_on_one_confirmed_strategy_is_the_mean_of_its_fresh_seeds(
    tmp_path: Path,
) -> None:
    for rate, accuracy in ((0.001, 0.6), (0.01, 0.79)):
        write_run(tmp_path, f"r{rate}", accuracy, strategy="freeze", learning_rate=rate)
    write_confirmed(tmp_path / "confirm", {"freeze": 0.7})
    comparison = compared(tmp_path)
    (summary,) = comparison.summaries
    assert len(summary.chosen) == 5
    mean = f"{100 * summary.accuracy:.1f} %, the mean of 5 fresh seeds"
    found = "freeze-lr0.01, the best of 2 settings in the search, reaches "
    assert comparison.headline == f"{found}{mean}."


def test_a_strategy_without_epochs_and_rates_has_no_caveats_on_them(tmp_path: Path) -> None:
    for rate in (0.01, 0.1):
        write_run(tmp_path, f"p{rate}", 0.8, strategy="partial", learning_rate=rate)
    write_run(tmp_path, "probe", 0.5, strategy="probe", train_acc=0.8)
    _, probe = compared(tmp_path).summaries
    assert probe.caveats == ("training accuracy stayed at 80%",)
    assert "within" not in compared(tmp_path).headline


def test_settings_with_several_seeds_are_compared_over_seeds(tmp_path: Path) -> None:
    for aug, accuracy in (("y", 0.8), ("n", 0.7)):
        for seed in range(3):
            write_run(tmp_path, f"{aug}{seed}", accuracy + 0.004 * seed, data_aug=aug, seed=seed)
    comparison = compared(tmp_path)
    assert comparison.about_strategies and comparison.advice == ""
    mean = "augmentation flip is best: 80.4 %, the mean of 3 seeds"
    assert comparison.headline.startswith(f"{mean}; augmentation none is 10.0 points worse")


def test_pruned_runs_are_counted_in_the_correction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for strategy in ("partial", "freeze"):
        write_run(tmp_path, strategy, 0.8, strategy=strategy)
    for i in range(9):
        write_pruned(tmp_path, f"p{i}", 0.79, learning_rate=0.01 + 0.01 * i)
    write_pruned(tmp_path, "other", 0.79, num_val=400)
    comparison = compared(tmp_path)
    assert comparison.num_candidates == 11
    assert "corrected for selection from 11 runs" in comparison.headline
    assert [run.run_id for run in comparison.excluded] == ["other"]
    print(terminal_summary(comparison))
    assert "9 runs pruned by early termination, counted in the" in capsys.readouterr().out


def test_a_strategy_with_caveats_is_worse_within_its_epochs_only(tmp_path: Path) -> None:
    write_confirmed(tmp_path, {"partial": 0.85})
    write_confirmed(tmp_path, {"scratch": 0.5}, train_acc=0.6)
    assert "points worse within 10 epochs" in compared(tmp_path).headline


@pytest.mark.parametrize(
    ("fingerprints", "what"),
    [
        (("data-1", "split-0", "weights-0"), "other data"),
        (("data-0", "split-1", "weights-0"), "another split"),
    ],
)
def test_runs_on_other_pictures_are_not_compared_and_a_warning_says_so(
    tmp_path: Path, fingerprints: tuple[str, str, str], what: str
) -> None:
    write_run(tmp_path, "a", 0.7)
    write_run(tmp_path, "b", 0.71, learning_rate=0.1)
    write_run(tmp_path, "c", 0.99, learning_rate=0.2, fingerprints=fingerprints)
    comparison = compared(tmp_path)
    assert [line for line in comparison.warnings if line.startswith(f"1 run (c): {what}")]
    assert comparison.winner is not None
    assert comparison.winner.run_id == "b"


def test_different_source_weights_are_a_warning(tmp_path: Path) -> None:
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", fingerprints=("data-0", "split-0", "weights-1"))
    write_run(tmp_path, "c", strategy="scratch")
    (warning,) = compared(tmp_path).warnings
    assert warning.startswith("the runs have different weights: ")


def test_a_folder_of_failures_has_no_winner(tmp_path: Path) -> None:
    write_failure(tmp_path, "a", "failed", "no weights")
    comparison = compared(tmp_path)
    assert comparison.headline.startswith("No run that can be compared has finished")
    assert [run.run_id for run in comparison.excluded] == ["a"]


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="holds no run directories"):
        read_runs(tmp_path)
    with pytest.raises(RunDirError, match="does not exist"):
        read_runs(tmp_path / "gone")


def test_a_damaged_run_is_listed_as_unreadable(tmp_path: Path) -> None:
    write_run(tmp_path, "good")
    bad = write_run(tmp_path, "bad")
    (bad / "result.json").write_text("{")
    cut = write_run(tmp_path, "cut") / "predictions.npz"
    cut.write_bytes(cut.read_bytes()[:1000])
    (write_run(tmp_path, "empty") / "predictions.npz").write_bytes(b"")
    states = {run.run_id: run.state for run in read_runs(tmp_path)}
    damaged = dict.fromkeys(("bad", "cut", "empty"), "unreadable")
    assert states == {"good": "finished", **damaged}


def test_runs_of_one_setting_from_two_machines_are_one_setting(tmp_path: Path) -> None:
    """By its mean, the second learning rate is better; by its best run alone, the first."""
    machines = ({"cache_dir": "/a", "data_dir": "/b"}, {"cache_dir": "/c", "data_dir": "/d"})
    for rate, accuracies in ((0.1, (0.80, 0.60)), (0.01, (0.75, 0.75))):
        for seed, (machine, accuracy) in enumerate(zip(machines, accuracies, strict=True)):
            fields = {"learning_rate": rate, "seed": seed, **machine}
            write_run(tmp_path, f"r{rate}-{seed}", accuracy, **fields)
    comparison = compared(tmp_path)
    assert comparison.summaries[0].chosen[0].config["learning_rate"] == 0.01
    assert comparison.warnings == ()


def test_runs_of_different_precision_are_compared_with_a_warning(tmp_path: Path) -> None:
    write_run(tmp_path, "a", precision="32-true")
    write_run(tmp_path, "b", precision="bf16-mixed", seed=1)
    (warning,) = compared(tmp_path).warnings
    assert warning == "the runs have different precision: 32-true (1 run), bf16-mixed (1 run)"
