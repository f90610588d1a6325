"""Checks of `gpu_check` that start processes or complete runs, and the speed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.gpu_training import STRATEGIES, Failed, Setup, Watcher, fit, require
from benchmarks.pipelines import Bench
from finetune.inference.evaluate import evaluate
from finetune.inference.predict import load_predictor, predict_logits
from finetune.runs.predictions import softmax
from finetune.runs.result import RunResult
from finetune.runs.run_dir import RunDir
from finetune.system.cuda import check_architecture
from finetune.system.devices import worker_devices
from finetune.system.errors import FinetuneError
from finetune.training.train import train_and_finetune

_NUM_PICTURES, _SPEED_SIZE = 2000, 256

FORKED = """
import os, sys
import finetune.sweep.preload
import torch
assert not torch.cuda.is_initialized(), "the preload has used CUDA"
child = os.fork()
if not child:
    value = torch.ones(3, device=sys.argv[1]).sum().item()
    os._exit(0 if value == 3 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run(**fields: Any) -> RunResult:
    """A complete run, without its printed lines."""
    with contextlib.redirect_stdout(io.StringIO()):
        model: Any = train_and_finetune(**fields)
    result: RunResult = model.result
    return result


def _run_dir(result: RunResult) -> RunDir:
    return RunDir(Path(result.config["out"]) / result.run_id)


def card_and_fork(setup: Setup) -> dict[str, Any]:
    """1: the card can be used, also by a process forked after the sweep's imports."""
    command = [sys.executable, "-c", FORKED, setup.device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    require(done.returncode == 0, f"the forked process: {done.stderr[-500:]}")
    if setup.device == "cpu":
        return {"card": "none", "fork": "CUDA untouched"}
    check_architecture()
    _, total = torch.cuda.mem_get_info()
    return {
        "card": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "gigabytes": round(total / 1e9, 1),
        "driver": _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader"),
        "architectures": torch.cuda.get_arch_list(),
        "fork": "CUDA untouched",
    }


def _nvidia_smi(*options: str) -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, check=False)
    return done.stdout.split()


def stop_and_resume(setup: Setup) -> dict[str, Any]:
    """6: a run that SIGTERM ends after epoch 1 resumes, with the gradient scaler's state."""
    precision = "16-mixed" if setup.device == "cuda" else "bf16-mixed"
    fields = setup.fields(
        strategy="partial", precision=precision, epochs=30, keep_last=True, out=setup.new_folder()
    )
    flags = [f"--{name}={value}" for name, value in fields.items()]
    with subprocess.Popen(
        [sys.executable, "agent.py", *flags], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch  1/"):
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
    require(process.returncode == -signal.SIGTERM, f"it ended with {process.returncode}")
    (path,) = Path(fields["out"]).iterdir()
    stopped_at = json.loads((path / "failure.json").read_text())["epoch"]
    run(resume=path)
    whole = _run_dir(run(**fields | {"out": setup.new_folder()}))
    resumed, uninterrupted = _scaler_state(path), _scaler_state(whole.path)
    require(resumed == uninterrupted, f"scaler {resumed}, uninterrupted {uninterrupted}")
    require(setup.device == "cpu" or bool(resumed), "last.ckpt has no state of the scaler")
    return {"stopped after epochs": stopped_at, "scaler": str(resumed)}


def _scaler_state(run_dir: Path) -> Any:
    checkpoint = torch.load(run_dir / "last.ckpt", map_location="cpu", weights_only=True)
    return checkpoint.get("MixedPrecision", {})


def sweep_with_a_killed_child(setup: Setup) -> dict[str, Any]:
    """8: three workers of a sweep, of which one is killed, all on the GPU; nothing is left."""
    place = setup.new_folder()
    fields = setup.fields(strategy="partial", epochs=20)
    command = _sweep_command(place, fields, num_runs=6, num_workers=3)
    before = _gpu_processes()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        killed = _kill_a_worker(process.pid, place / "runs")
        process.wait(240)
    require(killed > 0, "no worker was found to kill")
    subprocess.run([*command, "--retry_failed"], stdout=subprocess.DEVNULL, check=True)
    results = [RunResult.load(path.parent) for path in (place / "runs").glob("*/result.json")]
    require(len(results) == 6, f"{len(results)} of 6 trials have finished")
    expected = torch.cuda.get_device_name() if setup.device == "cuda" else "cpu"
    require({result.device for result in results} == {expected}, "a trial used another device")
    uuids = all(re.match("GPU-|MIG-", device) for device in worker_devices())
    require(uuids or "CUDA_VISIBLE_DEVICES" in os.environ, f"devices are {worker_devices()}")
    time.sleep(1)
    left = _gpu_processes() - before
    require(not left, f"processes {left} are left on the GPU")
    return {"killed": 1, "finished": 6, "devices": worker_devices()}


def _sweep_command(
    place: Path, fields: dict[str, Any], num_runs: int, num_workers: int
) -> list[str]:
    """A sweep over seeds, in runs/ of this new folder."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in fields.items() if k != "out"}
    content = {
        **{"program": "agent.py", "method": "grid", "name": "gpu-check"},
        "metric": {"name": "best_val_acc", "goal": "maximize"},
        "parameters": {name: {"value": value} for name, value in values.items()}
        | {"seed": {"values": list(range(num_runs))}},
    }
    place.mkdir()
    (place / "sweep.yaml").write_text(yaml.safe_dump(content))
    words = ("--workers", str(num_workers), "--out", str(place / "runs"))
    return [sys.executable, "-m", "finetune", "sweep", str(place / "sweep.yaml"), *words]


def _gpu_processes() -> set[str]:
    return set(_nvidia_smi("--query-compute-apps=pid", "--format=csv,noheader"))


def _kill_a_worker(sweep: int, runs: Path) -> int:
    """SIGKILL a child of the sweep's fork server once it trains; its process id, or 0."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for server in _children(sweep):
            workers = [pid for pid in _children(server) if list(runs.glob("*/metrics.csv"))]
            if workers:
                os.kill(workers[0], signal.SIGKILL)
                return workers[0]
        time.sleep(0.02)
    return 0


def _children(parent: int) -> list[int]:
    try:
        listed = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
        return []
    return [int(pid) for pid in listed.split()]


def out_of_memory(setup: Setup) -> str:
    """9: its message, failure.json, and the next run works. The memory is limited for it."""
    setup.require_cuda()
    out = setup.new_folder()
    fields = setup.fields(strategy="scratch", image_size=256, out=out)
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    limit_bytes = torch.cuda.memory_reserved() + 300e6
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total)
    try:
        run(**fields | {"batch_size": 20000})
    except FinetuneError as error:
        words = str(error)
    else:
        raise Failed("there was enough memory")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    require("out of memory at batch_size 20000" in words, words)
    (failure,) = out.glob("*/failure.json")
    require(json.loads(failure.read_text())["state"] == "failed", failure.read_text())
    torch.cuda.empty_cache()
    run(**fields)
    return words


def predict_again(setup: Setup) -> dict[str, float]:
    """11: predict and evaluate repeat predictions.npz within 2e-2; a CPU loads best.ckpt."""
    run_dir = _run_dir(run(**setup.fields(strategy="partial", epochs=3, out=setup.new_folder())))
    logits, labels, _ = run_dir.read_predictions()
    paths = sorted((setup.data_dir / "val").glob("*/*.png"))
    predictor = load_predictor(run_dir.path)
    require(predictor.device.type == setup.device, f"predict uses {predictor.device}")
    rows: Any = predict_logits(predictor, paths)
    difference = float(np.abs(softmax(np.stack(rows)) - softmax(logits)).max())
    require(difference <= 2e-2, f"probabilities differ by {difference:.3g}")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate(run_dir.path, setup.data_dir / "val")
    accuracy = run_dir.read_evaluations()[-1]["accuracy"]
    recorded = float((logits.argmax(axis=1) == labels).mean())
    require(abs(accuracy - recorded) <= 2e-2, f"evaluate: {accuracy}, the run: {recorded}")
    code = f"import finetune; finetune.load_best({str(run_dir.path)!r})"
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], env=hidden, check=True, timeout=120)
    return {"largest difference of probabilities": difference}


def speed(setup: Setup) -> dict[str, Any]:
    """12: images per second beside a bare loop; at least 0.7 of it for scratch."""
    bench = Bench(setup.new_folder(), _SPEED_SIZE)
    data_dir = bench.pictures(_NUM_PICTURES, 100, (_SPEED_SIZE, _SPEED_SIZE))
    found: dict[str, Any] = {"raw": {s: bench.raw(s, 60) for s in ("partial", "scratch")}}
    common = {"data_dir": data_dir, "weights": bench.weights, "image_size": _SPEED_SIZE}
    fields = setup.fields(**common, batch_size=32)
    for name in (*STRATEGIES, "strong"):
        given = {"strategy": "scratch", "data_aug": "strong"} if name == "strong" else {
            "strategy": name
        }  # fmt: skip
        found[name] = _training_rate(fields | given | {"epochs": 4 if name == "gradual" else 3})
        print(f"     {name}: {found[name]:.0f} images/s in training steps", flush=True)
    ratio = found["scratch"] / found["raw"]["scratch"]
    found["ratio to raw, scratch"] = ratio
    found["workers"] = {}
    for num_workers in (1, 2, 3):
        if setup.is_late:
            break
        found["workers"][num_workers] = _sweep_rate(setup, fields, num_workers)
        print(f"     {num_workers} workers: {found['workers'][num_workers]:.0f} images/s")
    require(ratio >= 0.7, f"scratch has {ratio:.2f} of the bare loop; {found}")
    return found


def _training_rate(fields: dict[str, Any]) -> float:
    """Images per second of the training steps of the last epoch, all parts being open by then."""
    watcher, _ = fit(fields, Watcher())
    return watcher.steps_per_second[-1] * float(fields["batch_size"])


def _sweep_rate(setup: Setup, fields: dict[str, Any], num_workers: int) -> float:
    """Images per second of all runs of a sweep together, by their own clocks."""
    place = setup.new_folder()
    given = fields | {"strategy": "scratch", "epochs": 3}
    command = _sweep_command(place, given, num_runs=num_workers, num_workers=num_workers)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    results = [RunResult.load(path.parent) for path in place.glob("runs/*/result.json")]
    return sum(result.images_per_second for result in results)
