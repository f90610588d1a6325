"""Systems without some of Linux's functions: macOS works, Windows gets one line.

Python's start-up hook takes the functions away, in child processes too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from finetune.sweep.storage import start_date
from finetune.system import array_store
from tests.conftest import CHILD_PATH, ROOT
from tests.test_agent import as_flags

MACOS = """
import fcntl, os, select, signal
for module, names in {
    os: "posix_fallocate posix_fadvise sched_getaffinity sched_setaffinity pidfd_open eventfd "
    "memfd_create copy_file_range splice getrandom O_DIRECT O_TMPFILE O_PATH getxattr setxattr",
    signal: "SIGRTMIN SIGRTMAX SIGPOLL SIGPWR sigtimedwait sigwaitinfo pidfd_send_signal",
    select: "epoll", fcntl: "F_OFD_SETLK F_OFD_SETLKW F_OFD_GETLK",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""

WINDOWS = {
    "fcntl": "import sys; sys.modules['fcntl'] = None",
    "SIGUSR1": "import signal; del signal.SIGUSR1",
    "pthread_sigmask": "import signal; del signal.pthread_sigmask",
}


def command(
    hook: str, place: Path, *words: str, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """A command in a Python whose start-up hook is this code."""
    (place / "sitecustomize.py").write_text(hook)
    path = os.pathsep.join(map(str, (place, CHILD_PATH, ROOT)))
    return subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": path},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("missing", [["fcntl"], ["SIGUSR1"], ["pthread_sigmask"], [*WINDOWS]])
@pytest.mark.parametrize(
    "words", [["agent.py", "--help"], ["-m", "finetune", "--help"], ["-c", "import finetune"]]
)
def test_without_posix_one_line_says_where_it_runs(
    words: list[str], missing: list[str], tmp_path: Path
) -> None:
    done = command("\n".join(WINDOWS[name] for name in missing), tmp_path, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: finetune needs Linux or macOS; ")
    assert all(name in line for name in missing)
    assert "WSL" in line


@pytest.mark.parametrize("words", [["agent.py", "--help"], ["-m", "finetune", "--help"]])
def test_help_needs_none_of_linuxs_own_functions(words: list[str], tmp_path: Path) -> None:
    done = command(MACOS, tmp_path, *words)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_run_needs_none_of_linuxs_own_functions(fields: dict[str, Any], tmp_path: Path) -> None:
    flags = as_flags(fields | {"strategy": "freeze", "epochs": 2})
    done = command(MACOS, tmp_path, "agent.py", *flags)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache").glob("*/data.npy"))  # by default everything is cached
    assert "can't be used" not in done.stdout


@pytest.mark.slow
def test_a_sweep_needs_none_of_linuxs_own_functions(fields: dict[str, Any], tmp_path: Path) -> None:
    given = fields | {"strategy": "freeze", "epochs": 1}
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    parameters = {name: {"value": value} for name, value in plain.items()}
    parameters["learning_rate"] = {"values": [0.01, 0.02]}  # type: ignore[dict-item]
    sweep = {"method": "grid", "program": "agent.py", "parameters": parameters,
             "metric": {"name": "best_val_acc", "goal": "maximize"}}  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    words = ["-m", "finetune", "sweep", str(tmp_path / "sweep.yaml"), "--workers", "2"]
    done = command(MACOS, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 2


@pytest.mark.parametrize("shape", [(0, 3), (5, 7), (3, 1 << 21)])
def test_an_array_is_allocated_whole_without_posix_fallocate(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    array = array_store._allocate(tmp_path / "data.npy", shape, "uint8")
    status = (tmp_path / "data.npy").stat()
    assert status.st_blocks * 512 >= status.st_size  # not sparse: a full disk is found here
    array[:] = 3
    array.flush()
    read = np.load(tmp_path / "data.npy")
    assert read.shape == shape
    assert (read == 3).all()


def test_without_proc_a_process_is_known_by_its_start_date() -> None:
    ours = start_date(os.getpid())
    assert ours is not None
    assert ours == start_date(os.getpid())
    time.sleep(1.1)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert start_date(child.pid) not in (None, ours)
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from now on
    assert start_date(child.pid) is None
    child.communicate()
    assert start_date(child.pid) is None
