"""Stops: when they come, when they wait, and how often they count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.system.errors import Stopped
from finetune.system.shutdown import STOP_SIGNALS, defer_stop, is_stopping, stoppable
from tests.conftest import ROOT


def test_a_second_stop_does_not_disturb_the_clean_up_of_the_first() -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with pytest.raises(Stopped, match="SIGTERM"), stoppable():
        handler = signal.getsignal(signal.SIGTERM)
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            for each in STOP_SIGNALS:  # as a Trainer does, which puts back what it has found
                signal.signal(each, handler)
            assert is_stopping()
            for each in STOP_SIGNALS:
                signal.raise_signal(each)
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_a_stop_inside_counts_for_the_outer_clean_up_too() -> None:
    with pytest.raises(Stopped, match="SIGINT"), stoppable():
        try:
            with stoppable():
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)


def test_what_is_undivided_is_done_before_the_stop() -> None:
    done = []
    with pytest.raises(Stopped, match="SIGUSR1"), stoppable():
        with defer_stop():
            with defer_stop():
                signal.raise_signal(signal.SIGUSR1)
            done.append("inside")
        done.append("after")
    assert done == ["inside"]


def test_a_stop_during_the_imports_waits_for_their_end(tmp_path: Path) -> None:
    """Raised within one of torch's own C++ callbacks it would abort the process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Striking:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch._C':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        if name == 'finetune.tracking' or name == 'finetune.training.recorder':\n"
        "            print(name)\n"
        "sys.meta_path.insert(0, Striking())\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "agent.py")],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGTERM
    assert done.stdout.split() == ["finetune.tracking", "finetune.training.recorder"]
