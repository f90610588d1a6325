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

from finetune.runs.result import METRICS
from finetune.tracking.environment import mode
from tests.conftest import ROOT
from tests.support.process_server import fast_python
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
    last = {key.partition("/")[0] for row in history for key in row}
    assert {"confusion_matrix_table", "per_class_accuracy", "confident_mistakes"} <= last
    assert config["strategy"] == "partial"
    assert config["val_fraction"] == 0


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
