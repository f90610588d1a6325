"""The command line of agent.py: messages and exit codes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.process_server import fast_python


def agent(*flags: str, python: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python or fast_python(), "agent.py", *flags],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        timeout=300,
        check=False,
    )


def as_flags(fields: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--strategy=partail"], "must be one of probe, freeze, partial, gradual, lp-ft, scratch"),
        (["--lerning-rate=1"], "did you mean learning_rate"),
        (["--learning-rate=-1"], "learning_rate: got '-1'"),
        (["batch_size=0"], "batch_size: got '0'"),
        (['{"batch_size": 0}'], "batch_size: got 0"),
        (["--epochs=0"], "epochs: got '0'"),
        (["--config=missing.yaml"], "missing.yaml can't be read"),
        (["--epochs"], "expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_message_and_code_2(flags: list[str], words: str) -> None:
    done = agent(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [["--seed=4"], ["seed=4"], ['{"seed": 4}'], ["+seed=4"]])
def test_a_contradiction_to_the_sweep_is_refused_in_every_spelling(
    words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("wandb_version: 1\nseed: {value: 3}\n")
    done = agent(*words, WANDB_SWEEP_PARAM_PATH=str(path))
    assert done.returncode == 2
    assert "seed: got 4" in done.stderr and "in one of them only" in done.stderr


def test_a_config_file_may_be_a_parameter_of_a_sweep(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    base, path = tmp_path / "base.yaml", tmp_path / "config.yaml"
    base.write_text("epochs: 0\n")
    path.write_text(f"wandb_version: 1\nconfig: {{value: {base}}}\n")
    done = agent(f"--config={base}", *as_flags(fields | {"epochs": None}),
                 WANDB_SWEEP_PARAM_PATH=str(path))  # fmt: skip
    assert done.returncode == 2
    assert "epochs: got 0" in done.stderr


def test_missing_data_names_the_download_command(tmp_path: Path) -> None:
    done = agent(f"--data_dir={tmp_path}/none", f"--out={tmp_path}/runs")
    assert done.returncode == 1
    assert "python -m finetune download" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_truncated_picture_is_named(fields: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    victim = min((folder / "train").glob("*/*.png"))
    victim.write_bytes(victim.read_bytes()[:-30])
    flags = as_flags(fields | {"data_dir": folder, "epochs": 1, "strategy": "freeze"})
    done = agent(*flags)
    assert done.returncode == 1
    assert str(victim) in done.stderr
    assert "--skip_unreadable" in done.stderr
    skipped = agent(*flags, "--skip_unreadable")
    assert skipped.returncode == 0, skipped.stderr
    assert "continuing without 1 unreadable" in skipped.stdout


def test_a_run_prints_its_splits_its_epochs_and_its_best_accuracy(fields: dict[str, Any]) -> None:
    done = agent(*as_flags(fields | {"strategy": "gradual", "epochs": 4}))
    assert done.returncode == 0, done.stderr
    assert "20 pictures train; val/ validates (15 pictures)" in done.stdout
    assert done.stdout.count("epoch  ") == 4
    lines = done.stdout.splitlines()
    assert lines[0] == "loading PyTorch"
    assert "per picture to recompute" not in done.stdout
    epochs = [
        line for line in lines if re.search(r"val \d\.\d{3} acc \d\.\d{3} f1 \d\.\d{3}  best", line)
    ]
    assert len(epochs) == 4 and max(map(len, epochs)) <= 80
    best, bar, recall, *confused, place, evaluate, predict = lines[_index_of_best(lines) :]
    assert re.fullmatch(r"best val_acc 0\.\d{4}, macro F1 0\.\d{4}, in epoch \d of 0 to 3", best)
    assert re.fullmatch(r"to compare: .* 5, the largest class, gives 0\.2000", bar)
    assert re.fullmatch(r"recall: 5 [01]\.\d\d, .*, 9 [01]\.\d\d", recall)
    assert all(re.fullmatch(r"most confused: (\d as \d \d+(, )?){1,3}", line) for line in confused)
    assert evaluate == f"next: python -m finetune evaluate {place}"
    assert predict == f"next: python -m finetune predict {place} PICTURE_OR_FOLDER"
    assert done.stderr == ""


def _index_of_best(lines: list[str]) -> int:
    return next(i for i, line in enumerate(lines) if line.startswith("best val_acc"))
