"""Damage to every file that is read: at most one message, and never wrong weights."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import finetune
from finetune.__main__ import main
from finetune.analysis.read_runs import read_runs
from finetune.model.weights import read_checkpoint
from finetune.runs.result import RunResult, read_failure
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.sweep.confirmation import confirmation
from finetune.system.errors import FinetuneError, RunDirError, WeightsError
from tests.conftest import Train
from tests.support.process_server import fast_python

pytestmark = pytest.mark.real_network  # an exported state dict is tried in torchvision's

NUM_FLIPS = int(os.environ.get("NUM_FLIPS", "60"))
"""Flipped bits in predictions.npz."""

Damage = Callable[[bytes, random.Random], bytes]


def flipped(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


DAMAGES: dict[str, Damage] = {
    "flipped": flipped,
    "truncated": lambda content, rng: content[: rng.randrange(1, len(content) - 1)],
    "empty": lambda content, rng: b"",
    "garbage": lambda content, rng: rng.randbytes(300),
    "nested": lambda content, rng: b"[" * 100_000,
    "other": lambda content, rng: b"[1, 2]",
    "zeros": lambda content, rng: bytes(len(content)),
}
FILES = ("config.yaml", "metrics.csv", "result.json", "evaluation.json", "predictions.npz",
         "best.ckpt", "last.ckpt")  # fmt: skip
CHECKED = ("predictions.npz", "best.ckpt", "last.ckpt")
"""Archives with checksums; the other files are texts, which people may edit."""


@pytest.fixture(scope="module")
def whole(train_once: Train) -> Path:
    """A finished and evaluated run."""
    run_dir = train_once(epochs=3, batch_size=5, learning_rate=0.01, keep_last=True).path
    assert not main(["evaluate", str(run_dir)])
    return run_dir


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunDir:
    """A copy to damage."""
    shutil.copytree(whole, tmp_path / "runs" / whole.name)
    return RunDir(tmp_path / "runs" / whole.name)


def damage(path: Path, how: str, seed: int = 0) -> None:
    path.write_bytes(DAMAGES[how](path.read_bytes(), random.Random(f"{path.name} {how} {seed}")))


def output_of(*command: object) -> str:
    """What a command prints, without its times; or its one message."""
    try:
        main([*map(str, command)])
    except FinetuneError as error:
        return f"error: {error}"
    return ""


def answers(run: RunDir, digits: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The output of each command that reads a run directory."""
    commands: dict[str, tuple[object, ...]] = {
        "predict": ("predict", run.path, digits / "val", "--json"),
        "evaluate": ("evaluate", run.path, "--json"),
        "export": ("export", run.path, "--format", "state_dict", "--out", run.path / "x" / "m.pth"),
        "report": ("report", run.path.parent),
    }
    found = {}
    for name, command in commands.items():
        capsys.readouterr()
        error = output_of(*command)
        found[name] = error or capsys.readouterr().out.replace(str(run.path), "RUN")
    try:
        found["confirm"] = json.dumps(confirmation(run.path.parent, 1).source, sort_keys=True)
    except FinetuneError as error:
        found["confirm"] = f"error: {error}"
    return found


@pytest.fixture
def expected(run: RunDir, digits: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    found = answers(run, digits, capsys)
    assert not any(said.startswith("error") for said in found.values())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_changes_no_output_or_ends_the_command_with_a_message(
    file: str,
    run: RunDir,
    digits: Path,
    capsys: pytest.CaptureFixture[str],
    expected: dict[str, str],
) -> None:
    content = (run.path / file).read_bytes()
    for how in DAMAGES:
        damage(run.path / file, how)
        for command, said in answers(run, digits, capsys).items():
            refused = said.startswith("error: ") or "did not finish" in said
            if file in CHECKED:
                assert refused or said == expected[command], f"{how}: {command}: {said}"
            if refused:
                # confirm prints which run it left out, and then has no runs
                assert file in said or command == "confirm", f"{how}: {command}: {said}"
        (run.path / file).write_bytes(content)


def read(run: RunDir) -> dict[str, Any]:
    """All numbers that are read from the small files."""
    (outcome,) = read_runs(run.path.parent)
    if outcome.state == "unreadable":
        raise RunDirError(outcome.reason)
    assert outcome.result is not None and outcome.correct is not None
    logits, labels, paths = run.read_predictions()
    return {
        "config": run.read_config(),
        "result": outcome.result.model_dump(include=set(RunResult.model_fields)),
        "rows": outcome.rows,
        "correct": outcome.correct.tolist(),
        "predictions": [logits.tolist(), labels.tolist(), paths.tolist()],
        "evaluations": run.read_evaluations(),
    }


def test_a_flipped_bit_in_predictions_is_detected_or_changes_no_number(run: RunDir) -> None:
    file = run.predictions_path.name
    expected, content = read(run), (run.path / file).read_bytes()
    num_noticed = 0
    for seed in range(NUM_FLIPS):
        damage(run.path / file, "flipped", seed)
        try:
            assert read(run) == expected, f"seed {seed}"
        except FinetuneError:
            num_noticed += 1
        (run.path / file).write_bytes(content)
    assert num_noticed > NUM_FLIPS / 2


@pytest.mark.parametrize("file", ["best.ckpt", "last.ckpt"])
def test_a_flipped_bit_in_a_checkpoint_is_detected_or_changes_no_weight(
    file: str, run: RunDir
) -> None:
    path = run.path / file
    expected, content = read_checkpoint(path), path.read_bytes()
    num_noticed = 0
    for seed in range(10):
        damage(path, "flipped", seed)
        try:
            found = read_checkpoint(path)["state_dict"]
            assert all(torch.equal(found[k], v) for k, v in expected["state_dict"].items())
        except WeightsError:
            num_noticed += 1
        path.write_bytes(content)
    assert num_noticed


def test_a_run_with_a_damaged_failure_file_counts_as_unfinished(run: RunDir) -> None:
    run.result_path.unlink()
    for how in DAMAGES:
        run.write_failure("failed", "no memory left", 1)
        damage(run.failure_path, how)
        (outcome,) = read_runs(run.path.parent)
        assert outcome.result is None
        failure = read_failure(run.failure_path)
        assert outcome.state == (failure["state"] if failure else "unfinished"), how


# resume


@pytest.fixture(scope="module")
def resumed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of an undamaged run after two more epochs."""
    copy = tmp_path_factory.mktemp("resumed") / whole.name
    shutil.copytree(whole, copy)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_MODE", "disabled")
        return go_on(RunDir(copy))


def go_on(run: RunDir) -> dict[str, Any]:
    finetune.train_and_finetune(resume=run.path, epochs=5)
    rows = read_metrics(run.metrics_path)
    for row in rows:
        del row["images_per_second"]
    result = RunResult.load(run.path)
    logits, _, _ = run.read_predictions()
    return {
        "rows": rows,
        "best": (result.best_epoch, result.best_val_acc),
        "logits": logits.tobytes(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("file", [*FILES, "failure.json"])
def test_a_resume_has_the_same_result_or_is_refused(
    file: str, run: RunDir, resumed: dict[str, Any]
) -> None:
    for how in ("flipped", "truncated", "empty", "other"):
        if (file, how) == ("config.yaml", "flipped"):
            continue  # a changed setting
        shutil.copytree(run.path, run.path.with_name("copy"))
        copy = RunDir(run.path.with_name("copy"))
        if file == "failure.json":
            copy.write_failure("failed", "no memory left", 1)
        damage(copy.path / file, how)
        try:
            assert go_on(copy) == resumed, how
        except FinetuneError as error:
            assert file in str(error), f"{how}: {error}"
        else:
            unused = ("metrics.csv", "evaluation.json", "failure.json")
            # A changed name of a field that a resume does not read is a field of another version.
            assert file in unused or (file, how) == ("result.json", "flipped"), how
        shutil.rmtree(copy.path)


def test_a_checkpoint_of_another_kind_is_refused(run: RunDir) -> None:
    shutil.copyfile(run.best_path, run.last_path)
    with pytest.raises(WeightsError, match=r"last\.ckpt"):
        go_on(run)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["best.ckpt", "predictions.npz"])
def test_a_resume_without_best_epoch_is_refused_and_the_run_can_be_restarted(
    file: str, run: RunDir, resumed: dict[str, Any]
) -> None:
    (run.path / file).unlink()
    with pytest.raises(WeightsError, match="Start a new run"):
        go_on(run)
    run.result_path.unlink()
    with pytest.raises(WeightsError, match=r"Remove .*last\.ckpt to start from the beginning"):
        go_on(run)
    run.last_path.unlink()
    assert go_on(run) == resumed


# a sweep


@pytest.mark.slow
def test_a_sweep_continues_despite_damaged_run_directories(
    digits: Path, weights: Path, tmp_path: Path
) -> None:
    parameters: dict[str, Any] = {
        "data_dir": str(digits),
        "model": weights.stem,
        "weights": str(weights),
        "val_fraction": 0,
        "image_size": 32,
        "batch_size": 5,
        "epochs": 150,  # enough epochs that no trial has ended when the last one starts
        "patience": 0,
        "strategy": "freeze",
        "accelerator": "cpu",
        "cache_dir": str(tmp_path / "cache"),
    }
    content = {
        "program": "agent.py",
        "method": "grid",
        "metric": {"name": "best_val_acc", "goal": "maximize"},
        "parameters": {k: {"value": v} for k, v in parameters.items()}
        | {"seed": {"values": [1, 2, 3, 4]}},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))

    with going(tmp_path, subprocess.DEVNULL) as process:  # its output is not read during the wait
        wait_for(lambda: len(list((tmp_path / "runs").glob("*/last.ckpt"))) == 4)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    places = sorted((tmp_path / "runs").glob("*/"), key=lambda p: (p / "result.json").exists())
    for place, file in zip(places, ("last.ckpt", "metrics.csv", "config.yaml"), strict=False):
        damage(place / file, "truncated")
    assert not (places[0] / "result.json").exists()
    with going(tmp_path, subprocess.PIPE) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert "3 finished, 1 failed" in output
    assert "last.ckpt" in output and "to start from the beginning" in output


def going(folder: Path, output: int) -> subprocess.Popen[str]:
    command = [fast_python(), "-m", "finetune", "sweep", "small.yaml", "--workers", "4"]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ},
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob(".*.tmp"))
