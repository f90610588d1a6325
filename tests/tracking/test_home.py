"""W&B's client on machines whose home directory is missing, unknown or can't be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.runs.run_dir import read_metrics
from finetune.tracking.environment import CLIENT_FOLDER, mode
from tests.conftest import ROOT
from tests.support.wandb_server import KEY
from tests.test_agent import as_flags
from tests.tracking.conftest import Place, assert_history_is_complete, fixed, the_run
from tests.tracking.test_offline import read_offline

WITHOUT_PASSWD = """
import pwd, runpy, sys
def getpwuid(uid):
    raise KeyError(uid)
pwd.getpwuid = getpwuid
sys.path.insert(0, "")
runpy.run_path("agent.py", run_name="__main__")
"""


@pytest.fixture
def place(place: Place) -> Place:
    """A shell in which W&B's client looks for its folders in the home."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DIR", "HOME"):
        place.environment.pop(name, None)
    return place


@pytest.fixture
def read_only_home(tmp_path: Path) -> Path:
    """A home in which nobody can make W&B's folders, not even root, who may write everywhere."""
    home = tmp_path / "home"
    home.mkdir()
    for name in (".local", ".cache", ".config"):
        (home / name).touch()
    return home


def homes(read_only_home: Path, kind: str) -> dict[str, str]:
    places = {"read-only": read_only_home, "missing": read_only_home / ".local" / "user"}
    return {"HOME": str(places[kind])} if kind in places else {}


@pytest.mark.parametrize("kind", ["read-only", "missing", "unset", "without passwd"])
def test_an_offline_run_is_complete_and_quiet_without_a_usable_home(
    place: Place, fields: dict[str, Any], read_only_home: Path, kind: str
) -> None:
    place.environment |= homes(read_only_home, kind)
    program = ["-c", WITHOUT_PASSWD] if kind == "without passwd" else ["agent.py"]
    flags = as_flags(fields | {"strategy": "freeze", "epochs": 2})
    assert place.start(*program, *flags, WANDB_MODE="offline").wait(120) == 0
    assert "INFO" not in place.output()  # W&B's service without a folder for its log
    assert not (ROOT / ".wandb_cache").exists()  # where it keeps its cache without one
    runs = place.path / "runs"
    (log,) = runs.glob("*/wandb/offline-run-*/run-*.wandb")
    rows = [row for row in read_offline(log)[0] if "val_acc" in row]
    recorded = read_metrics(next(runs.glob("*/metrics.csv")))
    assert [{key: row[key] for key in recorded[0]} for row in rows] == recorded
    if kind in ("read-only", "missing"):
        client = runs / CLIENT_FOLDER
        assert f"W&B: the home directory can't be written; {client} is used" in place.output()
        assert any(client.glob("artifacts/staging/*"))
    cache = str(place.path / "cache-of-sync")
    folders = {"WANDB_CACHE_DIR": cache, "WANDB_DATA_DIR": cache}  # `sync` needs a home too
    sync = place.start("-m", "wandb", "sync", str(log.parent), **folders)
    assert sync.wait(120) == 0
    run = the_run(place.server)
    assert_history_is_complete(run, place.run_dir(run))
    assert run.artifact("model").files["best.ckpt"]


@pytest.mark.parametrize("kind", ["read-only", "unset"])
def test_an_online_run_is_complete_without_a_usable_home(
    place: Place, fields: dict[str, Any], read_only_home: Path, kind: str
) -> None:
    place.environment |= homes(read_only_home, kind)
    flags = as_flags(fields | {"strategy": "freeze", "epochs": 2})
    assert place.start("agent.py", *flags).wait(120) == 0
    assert "INFO" not in place.output()
    run = the_run(place.server)
    assert run.state == "finished"
    assert_history_is_complete(run, place.run_dir(run))
    assert run.artifact("model").files["best.ckpt"]


def test_the_key_in_a_read_only_home_is_used(
    place: Place, fields: dict[str, Any], read_only_home: Path
) -> None:
    host = place.server.url.removeprefix("http://")
    hosts = (
        host,
        host.partition(":")[0],
    )  # the client's version 0.21 looks for it without the port
    lines = [f"machine {name} login user password {KEY}\n" for name in hosts]
    (read_only_home / ".netrc").write_text("".join(lines))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        del place.environment[name]
    flags = as_flags(fields | {"strategy": "freeze", "epochs": 1})
    assert place.start("agent.py", *flags, HOME=str(read_only_home)).wait(120) == 0
    assert the_run(place.server).state == "finished"


@pytest.mark.slow
def test_an_agent_s_run_is_complete_with_a_read_only_home(
    place: Place, fields: dict[str, Any], read_only_home: Path
) -> None:
    sweep = place.sweep(fixed(fields, strategy="freeze", epochs=2))
    assert place.agent(sweep, HOME=str(read_only_home)).wait(120) == 0
    (run,) = place.server.sweep_runs(sweep)
    assert run.state == "finished"
    assert_history_is_complete(run, place.run_dir(run))
    assert run.artifact("model").files["best.ckpt"]


@pytest.mark.slow
def test_a_local_sweep_finishes_with_a_read_only_home(
    place: Place, fields: dict[str, Any], read_only_home: Path
) -> None:
    given = fields | {"strategy": "freeze", "epochs": 1}
    content = {
        **{"program": "agent.py", "method": "grid"},
        "metric": {"name": "best_val_acc", "goal": "maximize"},
        "parameters": fixed(given, seed=[1, 2]),
    }
    file = place.path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    command = ["-m", "finetune", "sweep", str(file), "--out", str(place.path / "runs")]
    process = place.start(*command, HOME=str(read_only_home), WANDB_MODE="offline")
    assert process.wait(120) == 0
    assert len(list(place.path.glob("runs/*/result.json"))) == 2


def test_folders_that_are_set_stay(
    place: Place, fields: dict[str, Any], read_only_home: Path
) -> None:
    chosen = place.path / "chosen"
    names = {"WANDB_DATA_DIR": str(chosen), "WANDB_CACHE_DIR": str(chosen)}
    flags = as_flags(fields | {"strategy": "freeze", "epochs": 1})
    process = place.start("agent.py", *flags, HOME=str(read_only_home), **names)
    assert process.wait(120) == 0
    assert any(chosen.iterdir())
    assert not (place.path / "runs" / CLIENT_FOLDER).exists()


@pytest.mark.parametrize("value", ["true", "1", "YES"])
def test_wandb_disabled_disables_wandb(value: str) -> None:
    environ = {"WANDB_DISABLED": value, "WANDB_API_KEY": "k" * 40, "WANDB_SWEEP_ID": "s"}
    assert mode(environ) == "disabled"
    assert mode(environ | {"WANDB_DISABLED": "false"}) == "online"


def test_a_run_with_wandb_disabled_sends_and_writes_nothing(
    place: Place, fields: dict[str, Any]
) -> None:
    flags = as_flags(fields | {"strategy": "freeze", "epochs": 1})
    process = place.start("agent.py", *flags, WANDB_DISABLED="true", WANDB_MODE="online")
    assert process.wait(120) == 0
    assert not place.server.runs
    assert len(list(place.path.glob("runs/*/result.json"))) == 1
    assert not list(place.path.glob("runs/*/wandb"))


def test_an_error_of_the_client_offline_does_not_advise_to_log_offline(
    place: Place, fields: dict[str, Any]
) -> None:
    process = place.start(
        "agent.py", *as_flags(fields), WANDB_MODE="offline", WANDB_BASE_URL="nowhere"
    )
    assert process.wait(120) == 1
    assert "error: W&B: " in place.output()
    assert "Set WANDB_MODE=disabled to run without W&B" in place.output()
    assert "WANDB_MODE=offline" not in place.output()
