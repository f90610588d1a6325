"""Keys, passwords and the environment appear in no file and in no message."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.sweep.storage import open_storage
from finetune.system.errors import FinetuneError
from tests.support.process_server import fast_python

KEY = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {
    "WANDB_API_KEY": KEY,
    "AWS_SECRET_ACCESS_KEY": "hush-aws-hush",
    "SOME_PASSWORD": "hush-some-hush",
    "PGPASSWORD": "hush-pg-hush",
}
IN_URL = "hush-url-hush"


@pytest.mark.slow
def test_a_sweep_offline_writes_no_secret_anywhere(fields: dict[str, Any], tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    place.mkdir()
    small = fields | {"epochs": 1, "strategy": "freeze", "image_size": 32, "out": place / "runs"}
    small["cache_dir"] = place / "cache"
    parameters: dict[str, Any] = {
        k: {"value": str(v) if isinstance(v, Path) else v} for k, v in small.items()
    }
    # The second call fails with some message.
    parameters["learning_rate"] = {"values": [0.01, 1e30]}
    parameters["strategy"] = {"value": "scratch"}
    content = {"program": "agent.py", "method": "grid", "parameters": parameters}
    (place / "small.yaml").write_text(yaml.safe_dump(content))
    storage = f"sqlite:///file:{place}/sweep.db?mode=rwc&uri=true&password={IN_URL}"
    done = subprocess.run(
        [fast_python(), "-m", "finetune", "sweep", "small.yaml", "--storage", storage],
        cwd=place,
        env={**os.environ, **SECRETS, "WANDB_MODE": "offline"},
        capture_output=True,
        timeout=240,
        check=False,
    )
    said = done.stdout + done.stderr
    assert b"1 finished, 1 failed" in said, said.decode()
    kept = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    logs = [content for path, content in kept.items() if path.suffix == ".wandb"]
    assert len(logs) == 2 and all(b"learning_rate" in log for log in logs)
    assert any(path.name == "output.log" for path in kept)
    assert any(path.name == "sweep.db" for path in kept)
    for secret in (*SECRETS.values(), IN_URL):
        assert secret.encode() not in said
        assert [str(path) for path, content in kept.items() if secret.encode() in content] == []


@pytest.mark.parametrize(
    "where",
    [
        "postgresql://me:{}@127.0.0.1:1/db",
        "postgresql://me:a@{}@127.0.0.1:1/db",
        "postgresql://127.0.0.1:1/db?user=me&password={}",
        "postgresql://me:{}@nosuchhost.invalid:1/db",
        "postgresql://me:{}@127.0.0.1:port/db",
        "oracul://me:{}@host/db",
        "mysql://me:{}@host/db",
        "me:{}@host",
    ],
)
def test_no_message_about_a_storage_has_its_password(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.sweep.storage._TRIES", 1)
    with pytest.raises(FinetuneError) as refused:
        open_storage(where.format(IN_URL))
    assert IN_URL not in str(refused.value)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None
