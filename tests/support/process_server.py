"""Forks Python processes that have the heavy imports done, for `process_client`.

Importing torch, Lightning and wandb takes 6 s of CPU time; a fork takes 20 ms. The forked processes
are real ones: they have their own process id, signals, environment and exit code.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import multiprocessing.util
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
_HEADER_BYTES = 4
_MAX_FILES = 200


@cache
def fast_python() -> str:
    """The path of an executable `python` whose processes are forked from one server.

    The server is started at the first call and ends with this process.
    """
    folder = Path(tempfile.mkdtemp(prefix="python-"))
    address, python = folder / "server", folder / "python"
    client = Path(__file__).with_name("process_client.py")
    python.write_text(f"#!{sys.executable} -IS\n{client.read_text()}")
    python.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.process_server", str(address), str(python)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None and server.stdin is not None
    assert server.stdout.readline() == b"ready\n"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.wait, 10)
    atexit.register(server.stdin.close)  # called first; it ends then
    atexit.register(server.stdout.close)
    return str(python)


def serve(address: str, python: str) -> None:
    """Accept clients until standard input is closed. Returns only in a forked process."""
    import multiprocessing

    import wandb
    import wandb.plot
    import wandb.sdk.launch  # noqa: F401

    import finetune.sweep.worker
    import finetune.training.train  # noqa: F401

    multiprocessing.set_executable(python)
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, ("listener", None))
    selector.register(sys.stdin, selectors.EVENT_READ, ("owner", None))
    children: dict[int, socket.socket] = {}
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            kind, pid = key.data
            if kind == "owner":
                for child in children:
                    os.kill(child, signal.SIGKILL)
                os._exit(0)
            elif kind == "listener":
                connection, _ = listener.accept()
                request, files = _receive(connection)
                child = os.fork()
                if child == 0:
                    selector.close()
                    for opened in (listener, connection, *children.values()):
                        opened.close()
                    _become(request, files)
                    return
                for fd in files:
                    os.close(fd)
                children[child] = connection
                selector.register(connection, selectors.EVENT_READ, ("client", child))
                selector.register(os.pidfd_open(child), selectors.EVENT_READ, ("child", child))
            elif kind == "client":
                signals = key.fileobj.recv(64)  # type: ignore[union-attr]
                if not signals:  # the client was killed
                    selector.unregister(key.fileobj)
                for signum in signals or [signal.SIGKILL]:
                    if pid in children:
                        os.kill(pid, signum)
            else:
                _, status = os.waitpid(pid, 0)
                code = os.waitstatus_to_exitcode(status)
                connection = children.pop(pid)
                selector.unregister(key.fileobj)
                os.close(key.fd)
                try:
                    selector.unregister(connection)
                    connection.sendall(code.to_bytes(_HEADER_BYTES, "big", signed=True))
                except (KeyError, OSError):
                    pass
                connection.close()


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    header, files, _, _ = socket.recv_fds(connection, _HEADER_BYTES, _MAX_FILES)
    missing = int.from_bytes(header, "big")
    content = b""
    while len(content) < missing:
        content += connection.recv(missing - len(content))
    return json.loads(content), list(files)


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Give this forked process the client's files, folder, limits and environment."""
    numbers = request["files"]
    base = max([*numbers, *files]) + 1
    moved = [os.dup2(fd, base + i) for i, fd in enumerate(files)]
    os.closerange(0, base)
    for fd, number in zip(moved, numbers, strict=True):
        os.dup2(fd, number, inheritable=number <= 2)
        os.close(fd)
    os.closerange(base, base + _MAX_FILES)
    os.setsid()
    os.chdir(request["folder"])
    for limit, (soft, hard) in request["limits"].items():
        resource.setrlimit(int(limit), (soft, hard))
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    for number in numbers:
        if number > 2:
            os.set_inheritable(number, True)
    # What the imports registered belongs to the server, such as W&B's folder for media.
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    atexit.register(multiprocessing.util._exit_function)
    tempfile.tempdir = None
    _REQUESTS.append(request["arguments"])


_REQUESTS: list[list[str]] = []


def run_as_main(arguments: list[str]) -> None:
    """What `python ARGUMENTS` would run, in this process."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    while arguments[0].startswith("-") and arguments[0] not in ("-c", "-m"):
        arguments = arguments[1:]
    sys.modules["__main__"] = main = ModuleType("__main__")
    if arguments[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        code: CodeType = compile(arguments[1], "<string>", "exec")
        exec(code, main.__dict__)
    elif arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = list(arguments), str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


def exit_code_of(arguments: list[str]) -> int:
    try:
        run_as_main(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(*sys.argv[1:])
    code = exit_code_of(_REQUESTS[0])
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(ValueError):  # closed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # freeing torch's modules would take a second
