"""Run directories of version 0.1.0 and of later versions are read; only real damage is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import f1_score

from finetune.analysis.read_runs import read_runs
from finetune.runs.resolve import prepare_run
from finetune.runs.result import FORMAT_VERSION, METRICS, RunResult, read_failure
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.system.errors import RunDirError
from tests.conftest import ROOT

OLD_RUNS = ROOT / "tests/old_formats/v0_1_0/runs"
SPELLINGS = {"auto": True, "on": True, "True": True, "off": False, "n": False}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A copy of a finished run of version 0.1.0."""
    shutil.copytree(OLD_RUNS / "gradual", tmp_path / "gradual")
    return RunDir(tmp_path / "gradual")


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_finished_runs_are_read() -> None:
    for name in ("freeze", "gradual", "whole"):
        run = RunDir(OLD_RUNS / name)
        result, config = RunResult.load(run.path), run.read_config()
        assert (result.format_version, result.run_id, result.start_epochs) == (1, name, {})
        assert (config.strategy, config.seed, config.cache) == (result.strategy, result.seed, True)
        rows = read_metrics(run.metrics_path)
        assert len(rows) == result.epochs_run
        assert rows[result.best_epoch]["val_acc"] == result.best_val_acc
        assert result.best_val_macro_f1 is None
        assert all(math.isnan(row["val_macro_f1"]) for row in rows)
        assert len(run.read_predictions()[1]) == result.num_val


def test_an_interrupted_run_is_read() -> None:
    run = RunDir(OLD_RUNS / "interrupted")
    failure = {"state": "stopped", "reason": "stopped by SIGTERM", "epoch": 2}
    assert read_failure(run.failure_path) == failure
    assert len(read_metrics(run.metrics_path)) == 2
    with pytest.raises(RunDirError, match="the run stopped: stopped by SIGTERM"):
        RunResult.load(run.path)


def test_all_old_runs_are_compared() -> None:
    states = {record.run_id: record.state for record in read_runs(OLD_RUNS)}
    finished = dict.fromkeys(("freeze", "gradual", "whole"), "finished")
    assert states == finished | {"interrupted": "stopped"}


def test_the_macro_f1_of_an_old_run_follows_from_its_predictions() -> None:
    (record,) = (record for record in read_runs(OLD_RUNS) if record.run_id == "gradual")
    logits, labels, _ = RunDir(OLD_RUNS / "gradual").read_predictions()
    expected = f1_score(labels, logits.argmax(axis=1), average="macro")
    assert record.macro_f1 == pytest.approx(expected, abs=1e-12)


def test_a_new_result_names_its_format(run: RunDir) -> None:
    fields = RunResult.load(run.path).model_dump(exclude={"format_version"})
    run.write_result(RunResult(**fields))
    assert json.loads(run.result_path.read_text())["format_version"] == FORMAT_VERSION


def test_a_result_may_have_more_fields_and_lack_optional_ones(run: RunDir) -> None:
    def change(content: dict[str, Any]) -> None:
        content |= {"format_version": 9, "val_top5": 0.5}
        for name in ("run_id", "num_threads", "versions", "prefix_timings", "cache_seconds"):
            del content[name]

    before = RunResult.load(run.path)
    change_json(run.result_path, change)
    result = RunResult.load(run.path)
    assert (result.format_version, result.run_id, result.versions) == (9, "gradual", {})
    assert result.best_val_acc == before.best_val_acc


def test_a_result_without_its_accuracy_is_refused_by_name(run: RunDir) -> None:
    change_json(run.result_path, lambda content: content.pop("best_val_acc"))
    with pytest.raises(RunDirError, match=r"result\.json can't be read: best_val_acc"):
        RunResult.load(run.path)


def edit_rows(run: RunDir, edit: Callable[[list[str]], list[str]]) -> None:
    lines = [edit(line.split(",")) for line in run.metrics_path.read_text().splitlines()]
    run.metrics_path.write_text("".join(",".join(cells) + "\r\n" for cells in lines), newline="")


def test_metrics_may_have_other_columns_in_another_order(run: RunDir) -> None:
    before = read_metrics(run.metrics_path)
    edit_rows(run, lambda cells: [*reversed(cells[:2]), "note", *cells[3:]])
    rows = read_metrics(run.metrics_path)
    assert [list(row) for row in rows] == [list(row) for row in before]
    missing = METRICS[2]
    assert all(math.isnan(row.pop(missing)) for row in rows)
    assert rows == [{k: v for k, v in row.items() if k != missing} for row in before]


def test_rows_of_other_versions_are_written_and_read(run: RunDir) -> None:
    rows = read_metrics(run.metrics_path)
    run.write_metrics([{**row, "val_top5": 0.5} for row in rows])
    assert list(map(str, read_metrics(run.metrics_path))) == list(map(str, rows))  # nan too
    run.write_metrics([{"epoch": 0, "val_acc": 0.5}])
    (row,) = read_metrics(run.metrics_path)
    assert row["val_acc"] == 0.5
    assert math.isnan(row["val_loss"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[:-9], "cut off"),
        (lambda text: text.rpartition(",")[0] + "\r\n", "cut off"),
        (lambda text: text.replace("\r\n1,", "\r\n7,"), "missing"),
        (lambda text: text.replace("epoch,", "epochs,"), "missing"),
        (lambda text: text.replace("\r\n1,", "\r\n1,x"), "could not convert"),
        (lambda text: "", "cut off"),
    ],
)
def test_damaged_metrics_are_refused(run: RunDir, damage: Callable[[str], str], words: str) -> None:
    text = run.metrics_path.read_bytes().decode()
    assert damage(text) != text
    run.metrics_path.write_bytes(damage(text).encode())
    with pytest.raises(RunDirError, match=rf"metrics\.csv is damaged: .*{words}"):
        read_metrics(run.metrics_path)


def test_an_evaluation_has_defaults_and_needs_its_accuracy(run: RunDir) -> None:
    record = {"folder": "/data/test", "accuracy": 0.5, "num_pictures": 10, "calibration": 0.1}
    run.evaluation_path.write_text(json.dumps({"evaluations": [record], "format_version": 3}))
    (found,) = run.read_evaluations()
    assert found.items() >= record.items()
    assert (found["per_class"], found["accuracy_interval"]) == ([], [0.0, 1.0])
    change_json(run.evaluation_path, lambda content: content["evaluations"][0].pop("accuracy"))
    with pytest.raises(RunDirError, match="it lacks accuracy"):
        run.read_evaluations()


def test_the_macro_f1_of_an_old_evaluation_is_the_mean_of_its_classes(run: RunDir) -> None:
    record = {"folder": "/data/test", "accuracy": 0.5, "num_pictures": 10}
    classes = [{"class": name, "f1": f1} for name, f1 in (("a", 0.5), ("b", 0.75), ("c", None))]
    content = {"evaluations": [record | {"per_class": classes}, record]}
    run.evaluation_path.write_text(json.dumps(content))
    assert [found["macro_f1"] for found in run.read_evaluations()] == [0.625, None]


def test_a_failure_may_lack_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "failure.json"
    path.write_text('{"state": "pruned", "at": 3}')
    failure = read_failure(path)
    assert failure is not None
    assert (failure["state"], failure["reason"]) == ("pruned", "no reason recorded")


def test_a_newer_config_is_read_without_its_unknown_fields_but_not_resumed(run: RunDir) -> None:
    expected = run.read_config()
    text = run.config_path.read_text()
    run.config_path.write_text(f"ema_decay: 0.99\n{text}")
    assert run.read_config() == expected
    with pytest.raises(RunDirError, match="doesn't know: ema_decay; resume the run with"):
        prepare_run({"resume": run.path}, print)


@pytest.mark.parametrize("word", SPELLINGS)
def test_cache_is_a_boolean_in_all_its_spellings(run: RunDir, word: str) -> None:
    text = run.config_path.read_text()
    run.config_path.write_text(text.replace("cache: 'on'", f"cache: '{word}'"))
    config = run.read_config()
    assert config.cache is SPELLINGS[word]
    assert config.to_fields()["cache"] is SPELLINGS[word]
