"""Processes of agent.py and `python -m finetune` that start in a moment.

One server for each test process has torch, Lightning, W&B and the training imported. It forks for
each request; the child is a real process with its own session, signals and exit code.

    done = run("agent.py", "--epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Process:
    """A started process, with `subprocess.Popen`'s names."""

    def __init__(self, connection: socket.socket, words: tuple[str, ...], place: Path) -> None:
        self.args = words
        self.returncode: int | None = None
        self.stdout_path, self.stderr_path = place / "stdout", place / "stderr"
        self._connection = connection
        self._place = place
        self.pid = int(self._line())

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = self._connection.recv(1)
            if not byte:
                raise RuntimeError("the server of test processes has died")
            line += byte
        return line

    def _end(self) -> None:
        self.returncode = int(self._line())
        self._connection.close()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self._connection.setblocking(False)
            with suppress(BlockingIOError):
                if self._connection.recv(1, socket.MSG_PEEK):
                    self._connection.setblocking(True)
                    self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self._end()
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return self.stdout_path.read_text()

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    def wait_for_output(self, text: str, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while text not in self.stdout:
            assert self.poll() is None, f"ended with {self.returncode}: {self.stdout}{self.stderr}"
            assert time.monotonic() < deadline, f"{text!r} is missing from {self.stdout}"
            time.sleep(0.02)


def start(
    *words: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, merged: bool = False
) -> Process:
    """Start `python WORDS`, where the first of them is `agent.py` or `-m`.

    With `merged`, standard error goes where standard output goes.
    """
    server = _server()
    ours, theirs = socket.socketpair()
    place = Path(tempfile.mkdtemp(prefix="process-"))
    for name in ("stdout", "stderr"):
        (place / name).touch()
    environment = dict(os.environ if env is None else env)
    environment.pop("WANDB_SERVICE", None)  # a client of this process's service would end with it
    request = [list(words), str(cwd), environment, str(place), merged]
    message = json.dumps(request).encode()
    socket.send_fds(server, [len(message).to_bytes(8, "big")], [theirs.fileno()])
    server.sendall(message)
    theirs.close()
    return Process(ours, words, place)


def run(
    *words: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    process = start(*words, cwd=cwd, env=env)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(words, code, process.stdout, process.stderr)


@lru_cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.support.processes", str(theirs.fileno())]
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait(30)

    atexit.register(end)
    return ours


# in the server


def _serve(connection: socket.socket) -> None:
    """Fork for each request until the test process closes its end."""
    for name in (
        "PIL.PngImagePlugin",
        "wandb.plot",
        "wandb.sdk.launch",
        "finetune.sweep.runner",
        "finetune.training.train",
    ):
        importlib.import_module(name)
    gc.freeze()  # a child's garbage collections would copy every imported page
    for signum in (signal.SIGINT, signal.SIGTERM):  # those of a terminal are for pytest
        signal.signal(signum, signal.SIG_IGN)
    while True:
        head, fds, _, _ = socket.recv_fds(connection, 8, 1)
        if not head:
            return
        length, message = int.from_bytes(head, "big"), b""
        while len(message) < length:
            message += connection.recv(length - len(message))
        teller = socket.socket(fileno=fds[0])
        if os.fork() == 0:  # it waits for the process, so that the server can continue
            connection.close()
            _watch(teller, *json.loads(message))
            os._exit(0)
        teller.close()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _watch(teller: socket.socket, *request: Any) -> None:
    pid = os.fork()
    if pid == 0:
        teller.close()
        _become(*request)
    with suppress(BrokenPipeError):
        teller.sendall(b"%d\n" % pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        teller.sendall(b"%d\n" % code)


def _become(
    words: list[str], cwd: str, environment: dict[str, str], place: str, merged: bool
) -> None:
    """Run the program as `__main__`; doesn't return."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    files = [os.open(os.devnull, os.O_RDONLY)]
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    files.append(os.open(f"{place}/stdout", flags, 0o600))
    files.append(os.open(f"{place}/{'stdout' if merged else 'stderr'}", flags, 0o600))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (
        open(0),  # noqa: SIM115
        open(1, "w"),  # noqa: SIM115
        open(2, "w", errors="backslashreplace"),  # noqa: SIM115
    )
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    code: Any = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path[0] = cwd
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            script = str(ROOT / words[0])
            sys.argv = [script, *words[1:]]
            sys.path[0] = str(ROOT)
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    with suppress(OSError):
        atexit._run_exitfuncs()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
