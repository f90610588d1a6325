"""Small real data and weights that the tests share.

Tests train a network of a few channels; a test marked `real_network` trains a ResNet18.
"""

from __future__ import annotations

import errno
import os

# One compute thread a process, set before torch is imported: the tests themselves run in parallel.
os.environ["OMP_NUM_THREADS"] = "1"

import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.fields import RunConfig
from finetune.datasets.digits import write_digits
from finetune.model.network import build
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir

ROOT = Path(__file__).parent.parent
CHILD_PATH = ROOT / "tests" / "support" / "child_path"

os.environ["PYTHONPATH"] = os.pathsep.join([str(CHILD_PATH), str(ROOT)])
sys.path.insert(0, str(CHILD_PATH))  # where the entry point of `model="tiny"` is


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first in each process, so that none is left alone with one at the end.

    pytest-xdist gives each process an equal run of consecutive tests to begin with.
    """
    slow = [item for item in items if item.keywords.keys() & {"slow", "long"}]
    quick = [item for item in items if item not in set(slow)]
    num_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    size = -(-len(items) // num_processes)
    items.clear()
    for i in range(num_processes):
        chunk = slow[i::num_processes]
        num_quick = size - len(chunk)
        items += [*chunk, *quick[:num_quick]]
        del quick[:num_quick]
    items += quick


def network_of(item: Any) -> str:
    return "resnet18" if item.get_closest_marker("real_network") else "tiny"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "weights" in metafunc.fixturenames:
        network = network_of(metafunc.definition)
        metafunc.parametrize(
            "weights", [network], indirect=True, scope="session", ids=[pytest.HIDDEN_PARAM]
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skip is a failure: every part that a test needs must be installed there."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr[2]}"
    return report


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No W&B but where a test asks for it, and never the developer's own account."""
    for name in ("WANDB_API_KEY", "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("NETRC", "/nonexistent")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits 5-9: four training and three validation scans a class."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(folder, range(5, 10), train_per_class=4, val_per_class=3)
    return folder


@pytest.fixture(scope="session")
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL.pth: a state dict of the test's network with 1000 classes, as ImageNet's has."""
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.pth"
    torch.save(build(request.param, 1000, 64, seed=7).network.state_dict(), path)
    return path


@pytest.fixture
def fields(digits: Path, weights: Path, tmp_path: Path) -> dict[str, Any]:
    """The fields of a run of a few seconds."""
    return {
        "data_dir": digits,
        "model": weights.stem,
        "weights": weights,
        "val_fraction": 0,
        "image_size": 64,
        "batch_size": 5,
        "learning_rate": 0.01,
        "epochs": 4,
        "out": tmp_path / "runs",
        "cache_dir": tmp_path / "cache",
        "accelerator": "cpu",
    }


Train = Callable[..., RunDir]


def carry_out(**fields: Any) -> RunDir:
    from finetune.training.train import train_and_finetune

    result = train_and_finetune(**fields).result
    assert isinstance(result, RunResult)
    return RunDir(Path(result.config["out"]) / result.run_id)


@pytest.fixture
def train(fields: dict[str, Any]) -> Train:
    """Carry out a run with these fields changed; its directory."""
    return lambda **changed: carry_out(**(fields | changed))


@pytest.fixture(scope="session")
def train_once(digits: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Carry out a freeze run that tests share, with these fields; its directory."""

    def finished(**fields: Any) -> RunDir:
        place = tmp_path_factory.mktemp("finished")
        given: dict[str, Any] = {
            "strategy": "freeze",
            "val_fraction": 0.25,
            "image_size": 32,
            "data_dir": digits,
            "model": weights.stem,
            "weights": weights,
            "out": place,
            "cache_dir": place / "cache",
            "accelerator": "cpu",
        }
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("WANDB_MODE", "disabled")
            return carry_out(**given, **fields)

    return finished


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that can't be listed: root, who runs tests in containers, may read everything."""
    folder = tmp_path / "locked"
    folder.mkdir()

    def scandir(path: Any = ".", original: Any = os.scandir) -> Any:
        if str(path) == str(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return folder


@pytest.fixture
def config(fields: dict[str, Any]) -> RunConfig:
    return RunConfig.from_fields(fields)
