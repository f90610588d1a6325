"""Stop signals: raised once, deferred, and restored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.system.errors import Stopped
from finetune.system.shutdown import STOP_SIGNALS, defer_stop, is_stopping, stoppable
from tests.conftest import ROOT


def test_a_second_stop_does_not_interrupt_the_cleanup_of_the_first() -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with pytest.raises(Stopped, match="SIGTERM"), stoppable():
        handler = signal.getsignal(signal.SIGTERM)
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            for each in STOP_SIGNALS:  # a Trainer restores the handlers that it has found
                signal.signal(each, handler)
            assert is_stopping()
            for each in STOP_SIGNALS:
                signal.raise_signal(each)
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_a_stop_that_arrives_while_an_object_is_freed_is_not_lost() -> None:
    class Freed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    before = sys.unraisablehook
    with pytest.raises(Stopped, match="SIGINT"), stoppable():
        Freed()
        time.sleep(5)
        pytest.fail("the stop was lost")
    assert sys.unraisablehook is before


def test_a_stop_within_a_nested_context_protects_the_outer_cleanup_too() -> None:
    with pytest.raises(Stopped, match="SIGINT"), stoppable():
        try:
            with stoppable():
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)


def test_a_deferred_stop_comes_at_the_end_of_the_outer_context() -> None:
    done = []
    with pytest.raises(Stopped, match="SIGUSR1"), stoppable():
        with defer_stop():
            with defer_stop():
                signal.raise_signal(signal.SIGUSR1)
            done.append("inside")
        done.append("after")
    assert done == ["inside"]


@pytest.mark.slow
def test_a_stop_during_the_imports_is_deferred_to_their_end(tmp_path: Path) -> None:
    """An exception within one of torch's C++ callbacks would abort the process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class StopAtImport:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch._C':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        if name == 'finetune.tracking' or name == 'finetune.training.recorder':\n"
        "            print(name)\n"
        "sys.meta_path.insert(0, StopAtImport())\n"
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
    imported = [line for line in done.stdout.splitlines() if line.startswith("finetune.")]
    assert imported == ["finetune.tracking", "finetune.training.recorder"]
