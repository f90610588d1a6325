"""A file server on 127.0.0.1 that fails in the ways that real servers do."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.loopback import Handler, listening


@dataclass
class FileServer:
    """The file and the failures, one per request in order; after them, requests succeed."""

    content: bytes
    etag: str | None = '"one"'
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    """The connection closes after this many bytes of a body."""
    statuses: list[int] = field(default_factory=list)
    """Sent instead of the file; 200 sends the file."""
    stalls_seconds: list[float] = field(default_factory=list)
    """A pause in the middle of a body."""
    length_lie: int = 0
    """Added to the reported length."""
    damage: list[int] = field(default_factory=list)
    """Positions of bytes that are sent wrong once."""
    chunked: bool = False
    slow_block: tuple[int, float] | None = None
    """Bytes per block and seconds between blocks."""
    requests: list[str | None] = field(default_factory=list)
    """The Range header of each request."""
    authorization: str | None = None
    """The Authorization header of the last request."""
    num_sent: int = 0
    url: str = ""

    def body(self, start: int, end: int) -> bytes:
        served = bytearray(self.content[start:end])
        for position in list(self.damage):
            if start <= position < end:
                served[position - start] ^= 0xFF
                self.damage.remove(position)
        return bytes(served)


class _Handler(Handler):
    served: FileServer

    def do_GET(self) -> None:
        served = self.served
        self.close_connection = True
        asked = self.headers.get("Range")
        served.requests.append(asked)
        served.authorization = self.headers.get("Authorization")
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
        except OSError:  # the client has closed the connection
            pass


@contextmanager
def serve(content: bytes, name: str = "data.zip") -> Iterator[FileServer]:
    served = FileServer(content)
    with listening(type("Serving", (_Handler,), {"served": served})) as address:
        served.url = f"{address}/{name}"
        yield served
