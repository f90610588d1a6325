from __future__ import annotations

from pathlib import Path

import pytest

from finetune.analysis.comparison import Comparison, compare
from finetune.analysis.read_runs import read_runs
from finetune.system.errors import RunDirError
from tests.support.synthetic import write_confirmed, write_failure, write_run, write_sweep


def compared(runs_dir: Path) -> Comparison:
    return compare(read_runs(runs_dir))


def test_fresh_seeds_give_a_verdict_on_strategies(tmp_path: Path) -> None:
    write_confirmed(tmp_path, {"partial": 0.85, "freeze": 0.75, "scratch": 0.5})
    comparison = compared(tmp_path)
    assert comparison.about_strategies
    assert [one.strategy for one in comparison.standings] == ["partial", "freeze", "scratch"]
    assert all(pair.significant for pair in comparison.differences)
    assert all(pair.p_mcnemar is None for pair in comparison.differences)
    assert "partial wins with 8" in comparison.headline
    assert "freeze is 10." in comparison.headline or "freeze is 9." in comparison.headline
    assert comparison.advice == ""


def test_strategies_that_luck_may_have_ordered_are_not_told_apart(tmp_path: Path) -> None:
    write_confirmed(tmp_path, {"partial": 0.80, "gradual": 0.799}, num_seeds=3)
    headline = compared(tmp_path).headline
    assert "can't be told apart" in headline
    assert "wins" not in headline


def test_a_sweep_without_fresh_seeds_compares_these_models_and_says_so(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    comparison = compared(tmp_path)
    assert not comparison.about_strategies
    assert comparison.headline.startswith("The best model found is partial-lr0.01-bs32-aug at 84")
    assert "compares these models, not the strategies" in comparison.advice
    assert "python -m finetune confirm" in comparison.advice
    assert all(pair.p_mcnemar is not None for pair in comparison.differences)


def test_the_runs_that_chose_a_setting_do_not_confirm_it(tmp_path: Path) -> None:
    """Three seeds were part of the sweep: its best setting had the luck of all three."""
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


def test_a_sweep_beside_its_confirmation_is_judged_by_the_fresh_seeds_alone(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep")
    write_confirmed(tmp_path / "confirmed", {"partial": 0.82, "gradual": 0.78, "freeze": 0.7})
    comparison = compared(tmp_path)
    assert comparison.about_strategies
    judged = comparison.standings[:3]
    assert [[run.result.seed for run in one.chosen if run.result] for one in judged] == [
        [1000, 1001, 1002, 1003, 1004]
    ] * 3
    assert any("scratch: fewer than 3 fresh seeds" in line for line in comparison.warnings)
    assert {d.first for d in comparison.differences} | {
        d.second for d in comparison.differences
    } == {"partial", "gradual", "freeze"}


def test_a_setting_with_seeds_of_its_own_is_not_fresh_if_its_accuracies_chose_it(
    tmp_path: Path,
) -> None:
    """Each setting has three seeds that no other has, and the best was taken by their mean."""
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


def test_a_run_of_a_sweep_is_not_fresh_though_each_of_its_trials_had_another_seed(
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
    assert [len(one.chosen) for one in comparison.standings] == [3, 3]


def test_between_two_confirmed_settings_the_search_decides_and_not_the_fresh_seeds(
    tmp_path: Path,
) -> None:
    for rate, found in ((0.01, 0.85), (0.1, 0.8)):
        write_run(tmp_path, f"search{rate}", found, learning_rate=rate, strategy="partial")
        for seed in (1, 2, 3) if rate == 0.01 else (4, 5, 6, 7):
            fresh = 0.8 if rate == 0.01 else 0.9
            write_run(tmp_path, f"fresh{rate}-{seed}", fresh, learning_rate=rate, strategy="partial", seed=seed)  # noqa: E501  # fmt: skip
    write_confirmed(tmp_path, {"freeze": 0.7})
    leader = compared(tmp_path).standings[0]
    assert leader.fresh
    assert {one.config["learning_rate"] for one in leader.chosen} == {0.01}


def test_a_better_setting_found_after_the_confirmation_is_named(tmp_path: Path) -> None:
    write_confirmed(tmp_path, {"partial": 0.8, "freeze": 0.7})
    write_run(tmp_path, "old", 0.8, strategy="partial", learning_rate=0.01)
    write_run(tmp_path, "new", 0.95, strategy="partial", learning_rate=0.05, seed=42)
    marks = compared(tmp_path).standings[0].marks
    assert "another setting did better in the search, and has no fresh seeds" in marks


def test_fresh_seeds_that_diverged_are_named(tmp_path: Path) -> None:
    write_confirmed(tmp_path, {"partial": 0.8, "freeze": 0.7})
    reason = "diverged in epoch 0 at learning_rate 0.01: train_loss is nan"
    for seed in (1005, 1006):
        write_failure(tmp_path, f"d{seed}", "failed", reason, strategy="partial", learning_rate=0.01, seed=seed, weights="imagenet", val_fraction=0.2)  # noqa: E501  # fmt: skip
    partial, freeze = compared(tmp_path).standings
    assert partial.marks == ("2 more of its setting diverged, and count in no mean",)
    assert freeze.marks == ()


def test_one_strategys_fresh_seeds_are_not_ranked_against_the_others_best_runs(
    tmp_path: Path,
) -> None:
    write_sweep(tmp_path)
    write_confirmed(tmp_path / "more", {"partial": 0.75})
    comparison = compared(tmp_path)
    assert not comparison.about_strategies
    assert comparison.winner is not None
    assert comparison.winner.run_id == "par132y"
    assert comparison.headline.startswith("The best model found is partial")


def test_a_confirmed_winner_is_corrected_for_the_choice_among_fresh_runs(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep")
    write_confirmed(tmp_path / "confirm", {"partial": 0.8, "freeze": 0.7})
    comparison = compared(tmp_path)
    assert comparison.num_candidates == 10
    assert comparison.corrected is not None
    assert comparison.winner is not None
    assert comparison.winner.result is not None
    assert comparison.winner.result.seed >= 1000
    assert comparison.corrected.accuracy < comparison.winner.result.best_val_acc


def test_the_best_of_many_is_shown_beside_its_corrected_accuracy(tmp_path: Path) -> None:
    for i in range(30):
        write_run(tmp_path, f"run{i}", 0.70, learning_rate=0.001 * (i + 1), num_val=200)
    comparison = compared(tmp_path)
    assert comparison.corrected is not None
    assert comparison.num_candidates == 30
    assert comparison.winner is not None
    assert comparison.winner.result is not None
    assert comparison.corrected.accuracy <= comparison.winner.result.best_val_acc


def test_a_strategy_is_marked_for_what_it_may_not_have_been_given(tmp_path: Path) -> None:
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
    partial, scratch = compared(tmp_path).standings
    assert partial.marks == ("its best learning rate, 0.1, is the largest that was tried",)
    assert scratch.marks == ("still improving at its last epoch", "training accuracy stayed at 80%")
    assert partial.within == scratch.within == " within 10 epochs"


def test_a_diverged_neighbour_makes_an_edge_no_edge(tmp_path: Path) -> None:
    for rate, accuracy in ((0.001, 0.6), (0.01, 0.7)):
        write_run(tmp_path, f"p{rate}", accuracy, strategy="partial", learning_rate=rate)
    reason = "diverged in epoch 0 at learning_rate 0.1: train_loss is nan"
    write_failure(tmp_path, "p0.1", "failed", reason, strategy="partial", learning_rate=0.1)
    (partial,) = compared(tmp_path).standings
    assert partial.marks == ()
    assert partial.num_diverged == 1


def test_a_rate_whose_run_broke_off_was_not_tried(tmp_path: Path) -> None:
    for rate, accuracy in ((0.001, 0.6), (0.01, 0.7)):
        write_run(tmp_path, f"p{rate}", accuracy, strategy="partial", learning_rate=rate)
    reason = "out of memory; lower batch_size"
    write_failure(tmp_path, "p0.1", "failed", reason, strategy="partial", learning_rate=0.1)
    (partial,) = compared(tmp_path).standings
    assert partial.marks == ("its best learning rate, 0.01, is the largest that was tried",)


def test_a_marked_strategy_is_only_called_worse_within_its_epochs(tmp_path: Path) -> None:
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
def test_runs_over_other_pictures_are_left_out_with_a_warning(
    tmp_path: Path, fingerprints: tuple[str, str, str], what: str
) -> None:
    write_run(tmp_path, "a", 0.7)
    write_run(tmp_path, "b", 0.71, learning_rate=0.1)
    write_run(tmp_path, "c", 0.99, learning_rate=0.2, fingerprints=fingerprints)
    comparison = compared(tmp_path)
    assert [line for line in comparison.warnings if line.startswith(f"1 run (c): {what}")]
    assert comparison.winner is not None
    assert comparison.winner.run_id == "b"


def test_different_source_weights_are_warned_of(tmp_path: Path) -> None:
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", fingerprints=("data-0", "split-0", "weights-1"))
    write_run(tmp_path, "c", strategy="scratch")
    (warning,) = compared(tmp_path).warnings
    assert warning.startswith("the runs started from different weights")


def test_a_folder_of_failures_says_that_there_is_nothing_to_compare(tmp_path: Path) -> None:
    write_failure(tmp_path, "a", "failed", "no weights")
    comparison = compared(tmp_path)
    assert comparison.headline.startswith("No run has ended well")
    assert [one.run_id for one in comparison.others] == ["a"]


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="holds no run directories"):
        read_runs(tmp_path)
    with pytest.raises(RunDirError, match="does not exist"):
        read_runs(tmp_path / "gone")


def test_a_damaged_run_is_an_outcome_of_its_own(tmp_path: Path) -> None:
    write_run(tmp_path, "good")
    bad = write_run(tmp_path, "bad")
    (bad / "result.json").write_text("{")
    cut = write_run(tmp_path, "cut") / "predictions.npz"
    cut.write_bytes(cut.read_bytes()[:1000])
    (write_run(tmp_path, "empty") / "predictions.npz").write_bytes(b"")
    states = {one.run_id: one.state for one in read_runs(tmp_path)}
    damaged = dict.fromkeys(("bad", "cut", "empty"), "unreadable")
    assert states == {"good": "finished", **damaged}
