"""A user's shell with W&B's real client, which talks to a server on loopback."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.runs.run_dir import read_metrics
from tests.conftest import ROOT
from tests.support.process_server import fast_python
from tests.support.wandb_server import ENTITY, Run, WandbServer, serve

PROJECT = "digits"


@dataclass
class Place:
    """A user's shell: its environment, with the server's address, and its processes."""

    server: WandbServer
    path: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str, python: str = "", **environment: str) -> subprocess.Popen[bytes]:
        log = (self.path / f"output-{len(self.started)}.log").open("wb")
        process = subprocess.Popen(
            [python or fast_python(), *command],
            env=self.environment | environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        log.close()
        self.started.append(process)
        return process

    def output(self) -> str:
        return "".join(p.read_text() for p in sorted(self.path.glob("output-*.log")))

    def agent(self, sweep: str, *options: str, **environment: str) -> subprocess.Popen[bytes]:
        address = f"{ENTITY}/{PROJECT}/{sweep}"
        return self.start("-m", "wandb", "agent", *options, address, **environment)

    def sweep(self, parameters: dict[str, Any], **more: Any) -> str:
        """Register sweep.yaml with other parameters by `wandb sweep`; its id."""
        content = yaml.safe_load((ROOT / "sweep.yaml").read_text()) | more
        content["parameters"] = parameters
        file = self.path / "sweep.yaml"
        file.write_text(yaml.safe_dump(content))
        before = set(self.server.sweeps)
        assert self.start("-m", "wandb", "sweep", "--project", PROJECT, str(file)).wait(60) == 0
        (name,) = set(self.server.sweeps) - before
        return name

    def run_dir(self, run: Run) -> Path:
        return self.path / "runs" / run.name


@pytest.fixture
def place(fields: dict[str, Any], tmp_path: Path) -> Iterator[Place]:
    with serve() as server:
        environment = os.environ | server.environment | {"PYTHONUNBUFFERED": "1"}
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            environment[name] = str(tmp_path / name.lower())
            Path(environment[name]).mkdir()
        # A wandb-core started by another test would outlive a killed run and keep its id in use.
        environment.pop("WANDB_SERVICE", None)
        environment["PATH"] = f"{Path(fast_python()).parent}{os.pathsep}{os.environ['PATH']}"
        made = Place(server, tmp_path, environment)
        yield made
        for process in made.started:
            process.kill()
            process.wait()
        print(made.output())  # shown if the test fails
        assert not server.unknown, f"the client asked for {server.unknown}"


def fixed(fields: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A run's fields as a sweep's parameters: lists vary."""
    described = {k: str(v) if isinstance(v, Path) else v for k, v in (fields | changed).items()}
    return {k: {"values": v} if isinstance(v, list) else {"value": v} for k, v in described.items()}


def wait_until(true: Callable[[], bool], seconds: float = 90, look: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(look)


def the_run(server: WandbServer) -> Run:
    (run,) = server.runs.values()
    return run


def assert_history_is_complete(run: Run, run_dir: Path) -> None:
    """The server has every row of metrics.csv once and in order."""
    rows = read_metrics(run_dir / "metrics.csv")
    assert len(rows) > 0
    logged = [row for row in run.history if "val_acc" in row]
    assert [{key: row[key] for key in rows[0]} for row in logged] == rows
