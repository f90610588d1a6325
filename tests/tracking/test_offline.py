"""W&B without an account: runs log offline, completely, and never wait at a prompt."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.runs.result import METRICS
from finetune.runs.run_dir import RunDir
from finetune.tracking.environment import mode
from tests.conftest import ROOT
from tests.support.process_server import fast_python
from tests.support.synthetic import write_predictions, write_run
from tests.test_agent import as_flags


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k" * 40}, "online"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_SWEEP_ID": "s"}, "online"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_wandb_mode_is_used_and_defaults_to_offline_without_a_key(
    environ: dict[str, str], expected: str
) -> None:
    assert mode({"NETRC": "/nonexistent"} | environ) == expected


def test_a_key_in_netrc_is_found(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password " + "k" * 40)
    assert mode({"NETRC": str(netrc)}) == "online"
    assert mode({"NETRC": str(netrc), "WANDB_BASE_URL": "http://127.0.0.1:1"}) == "offline"


def test_an_offline_run_has_every_metric(fields: dict[str, Any], tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"}
    done = subprocess.run(
        [fast_python(), str(ROOT / "agent.py"), *as_flags(fields | {"strategy": "partial"})],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=300,
    )
    assert "W&B: no key is configured; logging offline" in done.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    (log,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    history, config = read_offline(log)
    epochs = [row for row in history if "val_acc" in row]
    assert [row["epoch"] for row in epochs] == [0, 1, 2, 3]
    for row in epochs:
        assert set(METRICS) <= row.keys()
    result = json.loads((run_dir / "result.json").read_text())
    assert epochs[-1]["best_val_acc"] == result["best_val_acc"]
    assert epochs[result["best_epoch"]]["val_macro_f1"] == result["best_val_macro_f1"]
    last = {key.partition("/")[0] for row in history for key in row}
    assert {"confusion_matrix_table", "per_class_accuracy", "confident_mistakes"} <= last
    assert config["strategy"] == "partial"
    assert config["val_fraction"] == 0


LOG_RESULT = """
import sys, warnings
from pathlib import Path
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir
from finetune.tracking.tracker import Tracker
warnings.simplefilter("error", RuntimeWarning)
run_dir = RunDir(Path(sys.argv[1]))
tracker = Tracker.open(run_dir.read_config(), run_dir)
tracker.log_result(RunResult.load(run_dir.path), run_dir)
tracker.close()
"""


def logged_tables(tmp_path: Path, counts: dict[tuple[int, int], int], num_classes: int) -> Any:
    """The tables that W&B's client gets of a run with these predictions, by key, and the output."""
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    run_dir = write_run(tmp_path / "runs", "r", classes=[f"c{i}" for i in range(num_classes)])
    write_predictions(run_dir, counts, num_classes, str(picture))
    RunDir(run_dir).best_path.write_bytes(b"a model")
    done = subprocess.run(
        [fast_python(), "-c", LOG_RESULT, str(run_dir)],
        capture_output=True,
        text=True,
        env=os.environ | {"WANDB_MODE": "offline"},
        cwd=ROOT,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = run_dir.glob("wandb/offline-run-*/files/media/table/*.table.json")
    return {f.name.rsplit("_", 2)[0]: json.loads(f.read_text()) for f in files}, done.stdout


def test_more_than_100_classes_are_logged_as_their_most_confused_pairs(tmp_path: Path) -> None:
    # 239 pairs: one of three pictures, the others of one or two
    counts = {(i, i): 3 for i in range(120)} | {(i, (i + 1) % 120): 2 for i in range(120)}
    counts |= {(i, (i + 2) % 120): 1 for i in range(119)} | {(7, 8): 3}
    tables, output = logged_tables(tmp_path, counts, 120)
    assert "confusion_matrix_table" not in tables
    pairs = tables["most_confused_pairs"]
    assert pairs["columns"] == ["label", "prediction", "count"]
    assert pairs["data"][:2] == [["c7", "c8", 3], ["c0", "c1", 2]]
    assert [row[2] for row in pairs["data"]] == [3] + [2] * 119 + [1] * 80
    assert "most_confused_pairs has the 200 most frequent of 239 pairs" in output
    per_class = {name: (share, n) for name, share, n in tables["per_class_accuracy"]["data"]}
    assert len(per_class) == 120
    assert (per_class["c0"], per_class["c7"]) == ((3 / 6, 6), (3 / 7, 7))


def test_100_classes_are_logged_with_their_confusion_matrix(tmp_path: Path) -> None:
    counts = {(i, i): 1 for i in range(100)} | {(99, 0): 4}
    tables, output = logged_tables(tmp_path, counts, 100)
    matrix = tables["confusion_matrix_table"]["data"]
    assert len(matrix) == 100 * 100
    assert ["c99", "c0", 4] in matrix
    assert "most_confused_pairs" not in tables
    assert "confused" not in output


def test_a_class_without_pictures_is_logged_without_an_accuracy(tmp_path: Path) -> None:
    tables, _ = logged_tables(tmp_path, {(1, 1): 3, (1, 0): 1, (2, 2): 2}, 3)
    assert tables["per_class_accuracy"]["data"] == [["c0", None, 0], ["c1", 0.75, 4], ["c2", 1, 2]]
    assert sum(row[-1] for row in tables["confusion_matrix_table"]["data"]) == 6


def records(log: Path) -> Iterator[bytes]:
    """A .wandb file's records: LevelDB's log format, after a header of seven bytes."""
    content, block = log.read_bytes(), 32768
    at, parts = 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # a header doesn't fit into the rest of the block
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record or its last part
            yield parts
            parts = b""


def read_offline(log: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The history rows and the config of a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    for data in records(log):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.history.item:
            history.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
        for update in (*record.run.config.update, *record.config.update):
            config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    return history, config
