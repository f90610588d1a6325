"""A run from its first epoch to its result: checkpoints, resume, early stopping, failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import f1_score

import finetune
from finetune.config.fields import RunConfig
from finetune.model.network import build, load_best, load_source
from finetune.runs.result import METRICS, RunResult, best_epoch
from finetune.runs.run_dir import RunDir, read_metrics
from finetune.system.errors import ConfigError, Diverged, Pruned, RunDirError, Stopped, WeightsError
from finetune.training.train import run
from tests.conftest import ROOT, Train
from tests.support.process_server import fast_python
from tests.support.tiny_backbone import TINY
from tests.support.tiny_network import load_into, tiny

TIMES = {"images_per_second"}
VARYING = {
    "run_id", "train_seconds", "cache_seconds", "images_per_second", "prefix_timings", "config",
}  # fmt: skip


def without_times(run_dir: RunDir) -> list[dict[str, float]]:
    rows = read_metrics(run_dir.metrics_path)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def best_state(run_dir: RunDir) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run_dir.best_path, weights_only=True)["state_dict"]
    return state


def assert_same_run(ours: RunDir, theirs: RunDir) -> None:
    """Equal to the bit, except for times and paths."""
    assert without_times(ours) == without_times(theirs)
    results = [json.loads(r.result_path.read_text()) for r in (ours, theirs)]
    stable = [{k: v for k, v in result.items() if k not in VARYING} for result in results]
    assert stable[0] == stable[1]
    for key, tensor in best_state(ours).items():
        assert torch.equal(tensor, best_state(theirs)[key]), key


def test_a_run_directory_is_complete_and_consistent(train: Train, fields: dict[str, Any]) -> None:
    run_dir = train(strategy="partial")
    names = {path.name for path in run_dir.path.iterdir()}
    assert names - {".lock"} == {
        "config.yaml", "metrics.csv", "best.ckpt", "predictions.npz", "result.json",
    }  # fmt: skip
    rows = read_metrics(run_dir.metrics_path)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    rates = tuple(f"lr/{part}" for part in TINY.parts)
    assert tuple(rows[0]) == (*METRICS, *rates)
    result = RunResult.load(run_dir.path)
    best = best_epoch(rows)
    assert result.best_epoch == best
    assert (result.best_val_acc, result.best_val_loss) == (
        max(row["val_acc"] for row in rows),
        rows[best]["val_loss"],
    )
    assert (result.num_train, result.num_val, result.class_names) == (20, 15, list("56789"))
    with np.load(run_dir.predictions_path) as predictions:
        accuracy = (predictions["logits"].argmax(1) == predictions["labels"]).mean()
        assert accuracy == pytest.approx(result.best_val_acc, abs=1e-12)
        guesses, labels = predictions["logits"].argmax(1), predictions["labels"]
        expected = f1_score(labels, guesses, average="macro")
        assert rows[best]["val_macro_f1"] == pytest.approx(expected, abs=1e-12)
        assert result.best_val_macro_f1 == rows[best]["val_macro_f1"]
        assert all(Path(path).is_file() for path in predictions["paths"])
    best_ckpt = torch.load(run_dir.best_path, weights_only=True)
    assert (best_ckpt["format_version"], best_ckpt["model"]) == (2, "tiny")
    assert result.start_epochs == {"layer3": 0, "layer4": 0, "fc": 0}
    recorded = yaml.safe_load(run_dir.config_path.read_text())
    assert "auto" not in recorded.values()
    assert "resume" not in recorded
    assert recorded == result.config


def test_best_val_acc_is_the_running_best(train: Train) -> None:
    rows = read_metrics(train(strategy="scratch", learning_rate=0.1, epochs=6).metrics_path)
    running = np.maximum.accumulate([row["val_acc"] for row in rows])
    assert [row["best_val_acc"] for row in rows] == running.tolist()


def test_the_returned_model_is_the_best_epochs_in_eval_mode(train: Train) -> None:
    run_dir = train(strategy="partial")
    model = finetune.load_best(run_dir.path)
    assert not model.training
    assert model.result == RunResult.load(run_dir.path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, best_state(run_dir)[key])


def test_the_same_config_gives_the_same_bits_in_any_directory(train: Train, tmp_path: Path) -> None:
    first = train(strategy="gradual")
    second = train(strategy="gradual", out=tmp_path / "elsewhere", cache_dir=tmp_path / "cold")
    assert_same_run(first, second)
    other_seed = train(strategy="gradual", seed=1)
    assert without_times(other_seed) != without_times(first)


def test_a_runs_config_file_repeats_the_run_to_the_bit(train: Train) -> None:
    first = train(strategy="partial", data_aug="n")
    second = train(config=first.config_path, weights=None, strategy=None)
    assert_same_run(first, second)


@pytest.mark.parametrize(
    ("strategy", "schedule"),
    [
        *((strategy, "constant") for strategy in ("freeze", "partial", "gradual", "scratch")),
        ("gradual", "cosine"),
        ("partial", "onecycle"),
    ],
)
def test_a_run_stopped_after_any_epoch_resumes_to_the_same_bits(
    strategy: str, schedule: str, train: Train, fields: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"strategy": strategy, "lr_schedule": schedule}
    whole = train(**settings)
    for epoch in (0, 2) if (strategy, schedule) == ("gradual", "constant") else (1,):
        config = RunConfig.from_fields(fields | settings)
        cut = RunDir(tmp_path / "cut" / f"{epoch}")

        def stop(row: dict[str, float], last: int = epoch) -> None:
            if row["epoch"] == last:
                raise Stopped(signal.SIGTERM)

        with pytest.raises(Stopped):
            run(config, cut, on_epoch=stop)
        assert json.loads(cut.failure_path.read_text())["state"] == "stopped"
        finetune.train_and_finetune(resume=cut.path)
        assert_same_run(whole, cut)
        assert not cut.failure_path.exists()


def test_resume_uses_the_runs_config_and_refuses_another(train: Train) -> None:
    run_dir = train(strategy="freeze", epochs=2, keep_last=True)
    with pytest.raises(ConfigError, match=r"batch_size is 5, given 7"):
        finetune.train_and_finetune(resume=run_dir.path, batch_size=7)
    with pytest.raises(ConfigError, match=r"epochs is 2, given 1"):
        finetune.train_and_finetune(resume=run_dir.path, epochs=1)
    with pytest.raises(RunDirError, match="finished"):
        finetune.train_and_finetune(resume=run_dir.path, batch_size="5")


@pytest.mark.parametrize("strategy", ["freeze", "scratch"])
def test_a_finished_run_without_its_last_checkpoint_is_not_started_again(
    strategy: str, train: Train
) -> None:
    run_dir = train(strategy=strategy, epochs=1)
    before = {path: path.read_bytes() for path in run_dir.path.iterdir() if path.is_file()}
    for epochs in (1, 2):
        with pytest.raises(RunDirError, match=r"is finished; start a new run.*--keep_last"):
            finetune.train_and_finetune(resume=run_dir.path, epochs=epochs)
    assert before == {p: p.read_bytes() for p in run_dir.path.iterdir() if p.is_file()}


def test_an_unfinished_run_keeps_its_last_checkpoint(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    def prune(row: dict[str, float]) -> None:
        raise Pruned("others are better")

    run_dir = RunDir(tmp_path / "run")
    with pytest.raises(Pruned):
        run(RunConfig.from_fields(fields | {"strategy": "freeze"}), run_dir, on_epoch=prune)
    assert run_dir.last_path.exists()


def test_a_finished_run_resumes_with_more_epochs(train: Train, tmp_path: Path) -> None:
    whole = train(strategy="gradual", epochs=4)
    longer = train(strategy="gradual", epochs=2, out=tmp_path / "longer", keep_last=True)
    finetune.train_and_finetune(resume=longer.path, epochs=4)
    assert without_times(longer) == without_times(whole)
    assert (longer.path / "result.2-epochs.json").exists()
    assert longer.last_path.exists()


def test_resume_refuses_other_weights(train: Train, weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "weights.pth"
    copy.write_bytes(weights.read_bytes())
    run_dir = train(strategy="freeze", epochs=2, weights=copy, keep_last=True)
    torch.save(tiny(5, seed=99).state_dict(), copy)
    with pytest.raises(WeightsError, match="Resume with the weights"):
        finetune.train_and_finetune(resume=run_dir.path, epochs=4)


def test_a_damaged_last_checkpoint_is_refused(train: Train) -> None:
    run_dir = train(strategy="freeze", epochs=2, keep_last=True)
    content = bytearray(run_dir.last_path.read_bytes())
    content[len(content) // 2] ^= 1
    run_dir.last_path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged.*Start a new run"):
        finetune.train_and_finetune(resume=run_dir.path, epochs=4)


def test_early_stopping_counts_from_the_last_unfreezing(train: Train) -> None:
    run_dir = train(strategy="gradual", epochs=30, learning_rate=0.3, patience=2, keep_last=True)
    losses = [row["val_loss"] for row in read_metrics(run_dir.metrics_path)]
    counted = losses[3:]
    best = counted.index(min(counted))
    assert len(counted) - 1 - best == 2
    assert RunResult.load(run_dir.path).stopped_early
    with pytest.raises(RunDirError, match="stopped early"):
        finetune.train_and_finetune(resume=run_dir.path, epochs=40)


def test_a_diverging_run_reports_epoch_and_rate_and_records_its_failure(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path / "run")
    config = RunConfig.from_fields(fields | {"strategy": "scratch", "learning_rate": 1e30})
    with pytest.raises(Diverged, match=r"epoch 0 at learning_rate 1e\+30"):
        run(config, run_dir)
    failure = json.loads(run_dir.failure_path.read_text())
    assert failure["state"] == "failed"
    assert "diverged" in failure["reason"]
    assert not run_dir.result_path.exists()


def test_a_directory_in_use_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.from_fields(fields)
    held = RunDir(tmp_path / "run")
    held.claim(config)
    with pytest.raises(RunDirError, match="in use"):
        run(config, RunDir(tmp_path / "run"))
    held.release()


def test_an_out_directory_below_a_file_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = RunConfig.from_fields(fields)
    with pytest.raises(RunDirError, match=r"can't be written.*--out"):
        run(config, RunDir(tmp_path / "file" / "run"))


@pytest.mark.real_network
def test_last_checkpoint_leaves_the_frozen_prefix_out(train: Train) -> None:
    frozen, whole = (train(strategy=s, keep_last=True) for s in ("freeze", "scratch"))
    assert frozen.last_path.stat().st_size < whole.last_path.stat().st_size / 100
    content = torch.load(frozen.last_path, weights_only=True)
    assert content["weights_fingerprint"] == RunResult.load(frozen.path).weights_fingerprint


def test_a_run_directory_is_a_source_of_weights(train: Train) -> None:
    first = train(strategy="partial")
    model = tiny(5, seed=1)
    load_into(model, str(first.path), print)
    for key, tensor in best_state(first).items():
        assert torch.equal(model.state_dict()[key], tensor)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "does not exist"),
        ("foreign", "missing: .*bn1"),
        ("pickle", "can't be loaded|damaged"),
        ("flipped", "damaged"),
        ("text", "damaged or not a checkpoint"),
        ("shape", r"of shape: conv1"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_a_reason(
    damage: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    state = tiny(5, seed=0).state_dict()
    if damage == "foreign":
        torch.save({"conv1.weight": state["conv1.weight"]}, path)
    elif damage == "pickle":
        torch.save({"x": Explosive()}, path)
    elif damage == "flipped":
        torch.save(state, path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("hello")
    elif damage == "shape":
        torch.save(state | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(WeightsError, match=words):
        load_into(tiny(5, seed=1), str(path), print)
    assert not Path("exploded").exists()


class Explosive:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("exploded",))


def test_safetensors_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = tiny(1000, seed=4).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    model = tiny(5, seed=0)
    load_into(model, str(tmp_path / "w.safetensors"), print)
    assert torch.equal(model.state_dict()["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])


def test_a_failed_download_of_imagenet_weights_names_the_path_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(WeightsError) as caught:
        load_source(build("resnet18", 5, 64, seed=0), "resnet18", "imagenet", print)
    expected = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert str(expected) in str(caught.value)
    assert "--weights" in str(caught.value)


@pytest.mark.real_network
def test_the_call_in_the_readme_works(
    digits: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the data at the default path and weights under torch.hub's file name."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "inaturalist_12K").symlink_to(digits)
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "resnet18-f37072fd.pth").write_bytes(weights.read_bytes())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    from finetune import train_and_finetune

    finetuned_model = train_and_finetune(
        epochs=10, batch_size=32, data_aug="y", learning_rate=0.001
    )
    assert finetuned_model.result.strategy == "partial"
    assert finetuned_model.result.config["val_fraction"] == 0.2
    assert not finetuned_model.training
    assert finetuned_model(torch.zeros(1, 3, 256, 256)).shape == (1, 5)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_after_its_files_are_written(
    signum: signal.Signals, fields: dict[str, Any], tmp_path: Path
) -> None:
    flags = [f"--{k}={v}" for k, v in (fields | {"epochs": 500, "patience": 0}).items()]
    process = subprocess.Popen(
        [fast_python(), "agent.py", "--strategy=partial", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("epoch  1"))
    process.send_signal(signum)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == -signum
    assert errors.strip().splitlines()[-1] == f"stopped by {signum.name}"
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert output.splitlines()[-1] == f"resume: python agent.py --resume {run_dir}"
    failure = json.loads((run_dir / "failure.json").read_text())
    assert failure["state"] == "stopped"
    assert load_best(run_dir).result is None
