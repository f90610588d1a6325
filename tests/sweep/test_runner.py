"""A local sweep from end to end, with real processes, signals and kills."""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from rich.console import Console

from finetune.__main__ import main
from finetune.config.fields import RunConfig
from finetune.model.network import build
from finetune.runs.result import RunResult, read_failure
from finetune.runs.run_dir import read_metrics
from finetune.sweep.confirmation import confirmation
from finetune.sweep.runner import run_sweep
from finetune.sweep.spec import UNLIMITED, Sweep, cell_key
from finetune.sweep.storage import open_storage
from finetune.sweep.table import LiveTable
from finetune.sweep.time_budget import TimeBudget
from finetune.sweep.trials import TrialResult
from finetune.system.devices import visible_devices
from finetune.system.errors import ConfigError, FinetuneError
from tests.support.process_server import fast_python
from tests.support.synthetic import write_run

ROOT = Path(__file__).parents[2]
COMMAND = ("-m", "finetune", "sweep")
METRIC = {"name": "best_val_acc", "goal": "maximize"}
Fields = dict[str, Any]


@pytest.fixture
def base(digits: Path, weights: Path, tmp_path: Path) -> Fields:
    """The fields of all trials: runs of about a second."""
    return {
        "data_dir": str(digits),
        "model": weights.stem,
        "weights": str(weights),
        "val_fraction": 0,
        "image_size": 32,
        "batch_size": 10,
        "epochs": 2,
        "accelerator": "cpu",
        "cache_dir": str(tmp_path / "cache"),
    }


def content(base: Fields, **values: Any) -> Fields:
    parameters = {name: {"value": value} for name, value in base.items() if name not in values}
    parameters |= {name: {"values": list(value)} for name, value in values.items()}
    program = {"name": "small", "program": "agent.py", "method": "grid", "metric": METRIC}
    return program | {"parameters": parameters}


def environment(**changed: str) -> dict[str, str]:
    return {**os.environ, **changed}


def start(
    folder: Path, given: Fields, *flags: str, python: str = "", **changed: str
) -> subprocess.Popen[str]:
    """The sweep's command as a process."""
    (folder / "small.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return subprocess.Popen(
        [python or fast_python(), *COMMAND, "small.yaml", "--out", "runs", *flags],
        cwd=folder,
        env=environment(**changed),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def complete(folder: Path, given: Fields, *flags: str, code: int = 0, **changed: str) -> str:
    process = start(folder, given, *flags, **changed)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output
    return output


def check_complete(folder: Path, cells: int) -> None:
    """Every cell has one accepted result, and each result is its run directory's."""
    study = optuna.load_study(
        study_name="small", storage=open_storage(f"sqlite:///{folder / 'runs' / 'small.db'}")
    )
    done = [t for t in study.get_trials() if t.state.name == "COMPLETE"]
    assert len(done) == cells
    assert len({cell_key(t.user_attrs["values"]) for t in done}) == cells
    results = [RunResult.load(p.parent) for p in (folder / "runs").glob("*/result.json")]
    assert len(results) == cells
    assert sorted(r.best_val_acc for r in results) == sorted(t.value for t in done)
    assert not any(t.state.name in ("RUNNING", "WAITING") for t in study.get_trials())


def children(pid: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(place.name))
    return found


def workers_of(folder: Path) -> list[int]:
    """The processes whose output goes to a run directory."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            output = (place / "fd" / "1").readlink()
            if output.name == "output.log" and output.is_relative_to(folder):
                found.append(int(place.name))
    return found


def await_epoch(folder: Path, count: int) -> Path:
    """The directory of a running trial that has finished `count` epochs."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in (folder / "runs").glob("*/metrics.csv"):
            going = not (path.parent / "result.json").exists()
            if going and (path.parent / "last.ckpt").exists() and len(read_metrics(path)) >= count:
                return path.parent
        time.sleep(0.02)
    raise AssertionError("no trial came so far")


def await_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/stat").exists() for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    block, place, parts = 32768, 7, b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        kind = content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""


# the command


def test_a_small_grid_runs_with_two_workers_and_again_does_nothing(
    base: Fields, tmp_path: Path
) -> None:
    given = content(base, strategy=["freeze"], learning_rate=[0.001, 0.1])
    outcomes = run_sweep(given, out=tmp_path / "runs", workers=2)
    assert [o.state for o in outcomes] == ["finished", "finished"]
    assert outcomes[0].value is not None and outcomes[1].value is not None
    assert outcomes[0].value >= outcomes[1].value
    assert {o.setting["learning_rate"] for o in outcomes} == {0.001, 0.1}
    for outcome in outcomes:
        result = RunResult.load(outcome.run_dir)
        assert result.config["group"] == "small"
        assert outcome.value == outcome.best_val_acc == result.best_val_acc
        assert outcome.best_epoch == result.best_epoch
        assert "epoch  1/1" in (outcome.run_dir / "output.log").read_text()
    check_complete(tmp_path, 2)
    started = time.monotonic()
    assert run_sweep(given, out=tmp_path / "runs", workers=2) == outcomes
    assert time.monotonic() - started < 5


def test_the_parent_imports_no_torch_and_a_missing_optuna_is_named(tmp_path: Path) -> None:
    code = "import sys, finetune.sweep.runner; assert not {'torch', 'wandb'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    code = (
        "import sys; sys.modules['optuna'] = None; from finetune.__main__ import main\n"
        "from finetune.system.shutdown import run_cli\n"
        "run_cli(lambda: main(['sweep', 'sweep.yaml']))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "needs optuna: pip install optuna (or '.[sweep]')" in ended.stderr


def test_trials_that_all_fail_end_the_sweep_with_the_reason(base: Fields, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_text("no weights")
    given = content(base | {"weights": str(broken)}, seed=range(6))
    console = Console(file=(tmp_path / "said").open("w"))
    with pytest.raises(FinetuneError, match=r"the first 3 trials all failed.*not a checkpoint"):
        run_sweep(given, out=tmp_path / "runs", console=console)
    console.file.close()


def test_devices_are_those_that_cuda_would_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5")
    assert visible_devices() == ["2", "GPU-5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_sweep_whose_gpus_cannot_be_used_ends_with_its_trials_waiting(
    base: Fields, tmp_path: Path
) -> None:
    given = content(base, strategy=["freeze"], learning_rate=[0.001, 0.1], accelerator=["auto"])
    output = complete(tmp_path, given, "--workers", "2", code=1, CUDA_VISIBLE_DEVICES="GPU-a,GPU-b")
    assert "continuing with one worker less: CUDA_VISIBLE_DEVICES is GPU-" in output
    assert "no GPU that was assigned can be used" in output
    assert not list((tmp_path / "runs").glob("*/failure.json"))
    again = complete(tmp_path, given, CUDA_VISIBLE_DEVICES="")
    assert "2 finished" in again


def test_a_bad_trial_is_pruned_and_gradual_is_judged_late(base: Fields, tmp_path: Path) -> None:
    base |= {"epochs": 6, "batch_size": 20}
    data = ("--data_dir", base.pop("data_dir"))
    given = content(base, strategy=["gradual"], learning_rate=[0.02, 1e-7, 1e-8])
    given["metric"] = {"name": "train_loss", "goal": "minimize"}
    # Gradual's epochs count from the fourth, in which its last part starts to train.
    given["early_terminate"] = {"type": "hyperband", "min_iter": 1, "eta": 2}
    output = complete(tmp_path, given, *data)
    rows = {p.parent.name: read_metrics(p) for p in (tmp_path / "runs").glob("*/metrics.csv")}
    assert sorted(map(len, rows.values())) == [4, 4, 6], output
    failures = [f for n in rows if (f := read_failure(tmp_path / "runs" / n / "failure.json"))]
    assert [f["state"] for f in failures] == ["pruned", "pruned"]
    assert "1 finished, 2 pruned" in output
    assert complete(tmp_path, given, *data).count("pruned") == 3  # the table again, and nothing ran


def test_early_termination_judges_by_macro_f1(base: Fields, tmp_path: Path) -> None:
    given = content(base | {"epochs": 3}, strategy=["freeze"], learning_rate=[0.1, 1e-7, 1e-8])
    given["metric"] = {"name": "val_macro_f1", "goal": "maximize"}
    given["early_terminate"] = {"type": "hyperband", "min_iter": 2, "eta": 2}
    output = complete(tmp_path, given)
    assert "1 finished, 2 pruned" in output
    assert output.count("val_macro_f1 0.") >= 3
    rows = {p.parent: read_metrics(p) for p in (tmp_path / "runs").glob("*/metrics.csv")}
    (longest,) = (found for found in rows.values() if len(found) == 3)
    for run_dir, found in rows.items():
        if found is not longest:
            assert found[1]["val_macro_f1"] < longest[1]["val_macro_f1"]
            reason = f"val_macro_f1 {found[1]['val_macro_f1']:.4f} at iteration 2 is not among"
            assert str((read_failure(run_dir / "failure.json") or {})["reason"]).startswith(reason)


@pytest.mark.parametrize(
    ("name", "goal"),
    [("val_macro_f1", "maximize"), ("train_acc", "maximize"), ("lr/fc", "minimize")],
)
def test_any_logged_metric_may_be_a_sweep_s(
    name: str, goal: str, base: Fields, tmp_path: Path
) -> None:
    given = content(base, strategy=["freeze"], learning_rate=[0.1, 1e-7])
    given["metric"] = {"name": name, "goal": goal}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(given))
    assert not main(["sweep", "--check", str(tmp_path / "small.yaml")])
    console = Console(file=io.StringIO(), width=200)
    results = run_sweep(given, out=tmp_path / "runs", console=console)
    for result in results:
        rows = read_metrics(result.run_dir / "metrics.csv")
        assert result.value == rows[-1][name]
        assert result.best_val_macro_f1 == rows[result.best_epoch or 0]["val_macro_f1"]
    values = [result.value for result in results]
    assert len(values) == 2 and values == sorted(values, reverse=goal == "maximize")


def test_the_rate_of_a_part_that_the_network_lacks_is_refused_as_a_metric(
    base: Fields, tmp_path: Path
) -> None:
    given = content(base, strategy=["freeze"])
    given["metric"] = {"name": "lr/layer9", "goal": "maximize"}
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(ConfigError, match=r"metric.name: got 'lr/layer9'; .*lr/layer4, lr/fc"):
        run_sweep(given, out=tmp_path / "runs", console=console)


def test_offline_runs_carry_the_sweep_as_their_group(base: Fields, tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    given = content(base, strategy=["freeze"])
    complete(tmp_path, given, WANDB_MODE="offline")
    (log,) = (tmp_path / "runs").glob("*/wandb/offline-run-*/*.wandb")
    groups = set()
    for data in log_records(log.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            groups.add((record.run.run_group, record.run.run_id))
    assert groups == {("small", log.parents[2].name)}


def test_the_live_table_counts_earlier_trials() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    live_table = LiveTable(8, "best_val_acc", console)
    setting: dict[str, Any] = {"learning_rate": 0.01}
    accuracies = (0.5333, 0.5, 0.4)
    results = [
        TrialResult(f"x-{i}", Path(f"x-{i}"), "freeze", setting, "finished", accuracy)
        for i, accuracy in enumerate(accuracies)
    ]
    live_table.update(results)
    with live_table.display:
        pass
    title = "3 of 8 done; best so far: freeze learning_rate=0.01, best_val_acc 0.5333"
    assert title in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_sweep_that_only_the_time_limits_counts_trials_and_shows_the_time(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    config = RunConfig.from_fields({"strategy": "freeze"})
    ended = TrialResult("x-0", tmp_path, "freeze", {}, "finished", 0.5, seconds=2.0)
    for num_trials, deadline in ((UNLIMITED, 61.0), (UNLIMITED, 0.0), (2, math.inf), (10**9, 61.0)):
        budget = TimeBudget(time.monotonic() + deadline)
        table = LiveTable(num_trials, "best_val_acc", console, budget)
        table.started("x-0", config)
        table.update([ended])
        table.ended(ended)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[::2] == ["x-0  freeze-lr0.001-bs32-aug  starting"] * 4
    minute, none = r"\(01:0\d left\)", r"\(00:00 left\)"
    expected = [rf"\[1\] .* {minute}", rf"\[1\] .* {none}", rf"\[1/2\] .* {none}"]
    for line, pattern in zip(
        lines[1::2], [*expected, rf"\[1/1000000000\] .* {minute}"], strict=True
    ):
        assert re.fullmatch(pattern, line)


# interrupted


def test_ctrl_c_does_not_interrupt_the_start_of_the_fork_server(
    base: Fields, tmp_path: Path
) -> None:
    process = start(tmp_path, content(base, seed=[1]), python=sys.executable)
    servers: list[int] = []
    while not servers:
        assert process.poll() is None
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(process.pid)}
        servers = [pid for pid, command in commands.items() if b"forkserver" in command]
    os.kill(servers[0], signal.SIGINT)  # a terminal signals every process
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    time.sleep(0.5)
    os.kill(servers[0], signal.SIGKILL)  # it is alive
    assert process.communicate()[0].splitlines()[-2:] == [
        "resume: python -m finetune sweep small.yaml --out runs",
        "stopped by SIGINT",
    ]


@pytest.mark.parametrize(
    "how",
    [
        "SIGINT",
        "kill parent",
        pytest.param("SIGUSR1", marks=pytest.mark.slow),
        pytest.param("SIGUSR1 to all", marks=pytest.mark.slow),
        pytest.param("SIGTERM", marks=pytest.mark.slow),
        pytest.param("kill worker", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_trial_resumes_after_its_last_epoch(
    how: str, base: Fields, tmp_path: Path
) -> None:
    base |= {"strategy": "scratch", "epochs": 30, "patience": 0}
    given = content(base, seed=[1, 2])
    python = sys.executable if how == "SIGUSR1 to all" else ""  # has the children itself
    process = start(tmp_path, given, python=python)
    run_dir = await_epoch(tmp_path, 2)
    workers = workers_of(tmp_path)
    assert workers
    if how == "kill worker":
        os.kill(workers[0], signal.SIGKILL)
    else:
        expected = (
            signal.SIGKILL if how == "kill parent" else signal.Signals[how.removesuffix(" to all")]
        )
        if how == "SIGUSR1 to all":  # as Slurm does
            for child in children(process.pid):
                os.kill(child, expected)
        process.send_signal(expected)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == -expected, output
        is_printed = "trials requeued: 1; run the same command to resume them" in output
        assert is_printed == (how != "kill parent"), output
        if how != "kill parent":
            assert not any(Path(f"/proc/{worker}/fd").exists() for worker in workers)
        await_end(workers)
        assert not (run_dir / "result.json").exists()
        failure = read_failure(run_dir / "failure.json")
        assert failure is not None and failure["state"] == "stopped"
        process = start(tmp_path, given)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    check_complete(tmp_path, 2)
    assert "resuming after epoch" in (run_dir / "output.log").read_text()
    result = RunResult.load(run_dir)
    assert result.epochs_run == 30 and not (run_dir / "failure.json").exists()


@pytest.mark.real_network
@pytest.mark.parametrize(
    ("num_cells", "workers"),
    [
        pytest.param(12, 2, marks=pytest.mark.slow),
        pytest.param(48, 1, marks=pytest.mark.long),
        pytest.param(48, 2, marks=pytest.mark.long),
    ],
)
def test_a_grid_survives_ctrl_c_and_kills(
    num_cells: int, workers: int, base: Fields, tmp_path: Path
) -> None:
    more = {"batch_size": [5, 10], "data_aug": ["y", "n"]} if num_cells == 48 else {}
    given = content(
        base,
        strategy=["freeze", "partial", "gradual", "scratch"],
        learning_rate=[0.001, 0.01, 0.1],
        **more,
    )
    for count, how in ((num_cells // 8, signal.SIGINT), (num_cells // 3, signal.SIGKILL)):
        process = start(tmp_path, given, "--workers", str(workers))
        while len(list((tmp_path / "runs").glob("*/result.json"))) < count:
            assert process.poll() is None
            time.sleep(0.05)
        if how == signal.SIGKILL and (found := workers_of(tmp_path)):
            os.kill(found[0], signal.SIGKILL)
            time.sleep(1)
        process.send_signal(how)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == -how, output
    output = complete(tmp_path, given, "--workers", str(workers))
    assert f"{num_cells} finished" in output
    check_complete(tmp_path, num_cells)


def test_a_sweep_of_version_0_1_0_is_resumed_though_its_file_s_lines_are_swapped(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(ROOT / "tests/old_formats/v0_1_0", folder)
    given = yaml.safe_load((folder / "sweep.yaml").read_text())
    given["parameters"] = dict(reversed(given["parameters"].items()))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    runs = folder / "swept"
    before = {p: p.read_bytes() for p in runs.glob("*/result.json")}
    # The small network of these files was a ResNet18 by name.
    hook = """
from finetune.config.backbones import BACKBONES
from tests.support.tiny_backbone import TINY
BACKBONES["resnet18"] = TINY
"""
    (tmp_path / "sitecustomize.py").write_text(hook)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    ended = subprocess.run(
        [sys.executable, *COMMAND, "sweep.yaml"],
        cwd=folder, env=environment(PYTHONPATH=path), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "[4/4]" in ended.stdout and "[2/4]" not in ended.stdout and "4 finished" in ended.stdout
    assert len(before) == 2 and all(p.read_bytes() == content for p, content in before.items())
    cells = {
        path.parent.name: (RunResult.load(path.parent).strategy, learning_rate)
        for path in runs.glob("*/result.json")
        for learning_rate in [RunResult.load(path.parent).config["learning_rate"]]
    }
    assert cells == {
        "small-af8537-000": ("freeze", 0.01),
        "small-af8537-001": ("freeze", 0.001),
        "small-af8537-002": ("partial", 0.01),
        "small-af8537-003": ("partial", 0.001),
    }


@pytest.mark.slow
def test_networks_yaml_runs_every_network_with_every_strategy(base: Fields, tmp_path: Path) -> None:
    given = yaml.safe_load((ROOT / "sweeps/networks.yaml").read_text())
    strategies = given["parameters"]["strategy"]["values"]
    models = ["tiny", "tiny2"]
    for model in models:
        torch.save(build(model, 9, 32, seed=1).network.state_dict(), tmp_path / f"{model}.pth")
    changed = base | {
        "weights": str(tmp_path / "{model}.pth"),
        "epochs": 4,
    }
    given["parameters"] |= {name: {"value": value} for name, value in changed.items()}
    given["parameters"]["model"] = {"values": models}
    del given["parameters"]["learning_rate"]["values"][2:]
    trials = run_sweep(given, out=tmp_path / "runs", workers=2)
    assert [trial.state for trial in trials] == ["finished"] * 16
    found = Counter((t.setting["model"], t.strategy) for t in trials)
    assert found == {(model, strategy): 2 for model in models for strategy in strategies}


# confirm


def test_confirm_repeats_each_strategy_s_best_with_fresh_seeds_equally_often(
    base: Fields, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    base["epochs"] = 1
    given = content(base, strategy=["freeze", "scratch"], learning_rate=[0.001, 0.1])
    run_sweep(given, out=runs, fields={"seed": 3})
    swept = [RunResult.load(p.parent) for p in runs.glob("*/result.json")]
    swept.sort(key=lambda r: (r.best_val_acc, -r.best_val_loss))
    best = {r.strategy: r.config["learning_rate"] for r in swept}
    assert main(["confirm", str(runs), "--seeds", "2"]) == 0
    shown = capsys.readouterr().out
    assert "standard deviation" in shown
    table = shown.partition("setting")[2]
    assert "seed=4" in table and "=1" not in table  # not what all have, such as epochs
    results = [RunResult.load(p.parent) for p in (runs / "confirm").glob("*/result.json")]
    found = Counter((r.strategy, r.config["learning_rate"], r.seed) for r in results)
    assert found == {(s, best[s], seed): 1 for s in best for seed in (4, 5)}
    assert confirmation(runs, 3).num_cells == 6
    assert confirmation(runs, 3).name == confirmation(runs, 2).name


def test_a_second_confirmation_takes_seeds_that_no_other_run_had(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_run(runs, "a", 0.8, learning_rate=0.01, seed=3)
    first = confirmation(runs, 2)
    assert seeds(first) == [4, 5]
    for seed in seeds(first):
        write_run(runs / "confirm", f"fresh{seed}", learning_rate=0.01, seed=seed, group=first.name)
    write_run(runs, "worse", 0.5, learning_rate=0.1, seed=9)
    assert confirmation(runs, 3).name == first.name
    assert seeds(confirmation(runs, 3)) == [4, 5, 6]
    write_run(runs, "better", 0.9, learning_rate=0.03, seed=3)
    second = confirmation(runs, 2)
    assert second.name != first.name
    assert seeds(second) == [10, 11]


def seeds(sweep: Sweep) -> list[object]:
    assert sweep.listed
    return [cell["seed"] for cell in sweep.listed]


def test_confirm_without_runs_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no finished runs"):
        main(["confirm", str(tmp_path)])
