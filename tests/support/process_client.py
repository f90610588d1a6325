"""Stands for `python` in tests: has `process_server` fork the process instead of starting it.

It passes its arguments, environment, folder, limits and open files, forwards signals, and ends as
the forked process ends.
"""

import json
import os
import resource
import signal
import socket
import sys

LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_CORE)


def main() -> None:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.connect(os.path.join(os.path.dirname(__file__), "server"))  # noqa: PTH118, PTH120
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, lambda signum, frame: server.sendall(bytes([signum])))
    files = [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    files = [fd for fd in files if fd != server.fileno() and _is_open(fd)]
    request = {
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109
        "limits": {limit: resource.getrlimit(limit) for limit in LIMITS},
        "files": files,
    }
    content = json.dumps(request).encode()
    socket.send_fds(server, [len(content).to_bytes(4, "big")], files)
    server.sendall(content)
    answer = server.recv(4)
    if not answer:
        sys.exit("process_server is gone")
    code = int.from_bytes(answer, "big", signed=True)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


main()
