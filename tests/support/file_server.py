"""A file server on loopback that can do what servers on the way to a large file do."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.loopback import Handler, listening


@dataclass
class FileServer:
    """What it serves, and how it behaves at each request, in order; then well."""

    content: bytes
    etag: str | None = '"one"'
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    """After so many bytes of a body, the connection closes."""
    statuses: list[int] = field(default_factory=list)
    """Answered instead of the file; 200 is the file."""
    stalls_seconds: list[float] = field(default_factory=list)
    """Silence in the middle of a body."""
    length_lie: int = 0
    """Added to the true length."""
    damage: dict[int, int] = field(default_factory=dict)
    """How often each byte is still to be served wrong."""
    chunked: bool = False
    slow_block: tuple[int, float] | None = None
    """Bytes a block, and seconds between two."""
    requests: list[str | None] = field(default_factory=list)
    """The Range of each request."""
    num_sent: int = 0
    url: str = ""

    def body(self, start: int, end: int) -> bytes:
        served = bytearray(self.content[start:end])
        for place in list(self.damage):
            if start <= place < end and self.damage[place]:
                served[place - start] ^= 0xFF
                self.damage[place] -= 1
        return bytes(served)


class _Handler(Handler):
    served: FileServer

    def do_GET(self) -> None:
        served = self.served
        self.close_connection = True
        asked = self.headers.get("Range")
        served.requests.append(asked)
        status = served.statuses.pop(0) if served.statuses else 200
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = len(served.content)
        start, end = 0, size
        same = self.headers.get("If-Range") in (None, served.etag)
        if served.ranges and asked and same:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
            assert found
            start, end = int(found[1]), int(found[2]) + 1 if found[2] else size
            if start >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            total = size + served.length_lie
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
        else:
            self.send_response(200)
        if served.etag:
            self.send_header("ETag", served.etag)
        if served.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(end - start + served.length_lie))
        self.end_headers()
        self._send(served.body(start, end))

    def _send(self, body: bytes) -> None:
        served = self.served
        cut = served.cuts.pop(0) if served.cuts else len(body)
        body = body[:cut]
        if served.stalls_seconds:
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.wfile.flush()
            time.sleep(served.stalls_seconds.pop(0))
            body = body[half:]
        step, pause = served.slow_block or (1 << 16, 0)
        try:
            for at in range(0, len(body), step):
                block = body[at : at + step]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if served.chunked else block)
                self.wfile.flush()
                served.num_sent += len(block)
                time.sleep(pause)
            if served.chunked:
                self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the client went away
            pass


@contextmanager
def serve(content: bytes, name: str = "data.zip") -> Iterator[FileServer]:
    served = FileServer(content)
    with listening(type("Serving", (_Handler,), {"served": served})) as address:
        served.url = f"{address}/{name}"
        yield served
