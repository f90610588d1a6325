"""Progress bars leave the terminal as it was."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

READING = """
import time
from finetune.system import progress
from finetune.system.errors import DataError
from finetune.system.shutdown import run_cli

progress.PATIENCE_SECONDS = 0

def read():
    done = progress.bar("reading", 1000)
    for number in range(1000):
        done()
        time.sleep(0.01)
        if number == {fails_at}:
            raise DataError("no more")

run_cli(progress.close_bars()(read))
"""
HIDDEN, SHOWN = b"\x1b[?25l", b"\x1b[?25h"


@pytest.mark.parametrize(
    ("fails_at", "last_output"), [(5, b"error: no more"), (-1, b"stopped by SIGINT")]
)
def test_an_interrupted_bar_restores_the_cursor(fails_at: int, last_output: bytes) -> None:
    terminal, child_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", READING.format(fails_at=fails_at)],
        env=os.environ | {"TERM": "xterm"},
        stderr=child_end,
    )
    os.close(child_end)
    seen = b""
    while chunk := read(terminal):
        seen += chunk
        if fails_at < 0 and HIDDEN in seen and process.poll() is None:
            process.send_signal(signal.SIGINT)  # several times
    process.wait(20)
    os.close(terminal)
    assert seen.count(HIDDEN) == seen.count(SHOWN) == 1, "the cursor stays hidden"
    assert seen.endswith(last_output + b"\r\n"), "the bar comes after the last message"


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""
