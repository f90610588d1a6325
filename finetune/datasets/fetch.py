"""One file over HTTP, through whatever breaks on the way.

Turns a URL into a file on disk: goes on where it broke off, tries again with growing patience
while that gets anywhere, and keeps what it has when it gives up. Knows nothing about what is in
the file; who does can have spans of it fetched again.

    >>> fetch(Part("https://host/data.zip", Path("data.zip.part")))  # doctest: +SKIP
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from finetune.system.errors import ConfigError, DataError
from finetune.system.progress import byte_bar

BLOCK_BYTES = 1 << 16
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server."""

    waits_seconds: tuple[float, ...] = (1, 2, 4, 8, 15, 30)
    """Before each new attempt; the count begins again whenever bytes arrived."""
    stall_seconds: float = 30
    """Without a byte, a connection counts as broken."""


PATIENCE = Patience()


def name_of(url: str) -> str:
    """The file's name in a URL; "" where there is none. Raises `ConfigError`."""
    return Path(urllib.parse.unquote(_split(url).path)).name


def _split(url: str) -> urllib.parse.SplitResult:
    try:
        split = urllib.parse.urlsplit(url)
        known = split.scheme in ("http", "https") and split.hostname and split.hostname.isascii()
        if known and (split.port is None or split.port):
            return split
    except ValueError:  # brackets or a port that make no sense
        pass
    raise ConfigError(f"url: got {url!r}; must be https://HOST/FILE or http://HOST/FILE")


class Part:
    """What is here of one remote file, and what its server said of it, kept beside it."""

    def __init__(self, url: str, path: Path) -> None:
        split = _split(url)
        # As browsers do with a pasted address: spaces and letters beyond ASCII are escaped.
        path_and_query = [urllib.parse.quote(p, safe=string.punctuation) for p in split[2:4]]
        self.address = urllib.parse.urlunsplit([*split[:2], *path_and_query, ""])
        self.url, self.path = url, path
        # A query may be a signature or a token, which is not for files that stay.
        self.source = urllib.parse.urlunsplit(
            [split.scheme, split.netloc.rpartition("@")[2], split.path, "", ""]
        )
        self.note_path = path.with_name(f"{path.name}.json")
        note = self._read_note()
        self.total_bytes: int | None = note.get("total_bytes")
        self.validator: str | None = note.get("validator") if note.get("url") == url else None

    def _read_note(self) -> dict[str, Any]:
        try:
            note = json.loads(self.note_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) and self.path.exists() else {}

    def write_note(self) -> None:
        note = {"url": self.url, "total_bytes": self.total_bytes, "validator": self.validator}
        self.note_path.write_text(json.dumps(note), encoding="utf-8")

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def is_whole(self) -> bool:
        return self.total_bytes is not None and self.num_bytes == self.total_bytes

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note_path.unlink(missing_ok=True)


class _Broken(Exception):
    """An attempt ended early; another one may get further."""


Room = Callable[[int], None]


def fetch(part: Part, patience: Patience = PATIENCE, check_room: Room | None = None) -> None:
    """Make the part whole. `check_room` gets the bytes still missing, once the server told them.

    Raises `DataError` when it stops getting anywhere; what arrived stays for the next time.
    """
    if part.is_whole:
        return
    part.path.parent.mkdir(parents=True, exist_ok=True)
    part.path.touch()
    try:
        _fetch_span(part, part.num_bytes, None, patience, check_room)
        if not part.num_bytes:
            raise DataError(f"{part.url}: the server sent an empty file")
    finally:
        if not part.num_bytes:
            part.remove()


def fetch_again(
    part: Part, spans: Iterable[tuple[int, int]], patience: Patience = PATIENCE
) -> None:
    """Fetch spans of a part that is here into their places. Raises `DataError`.

    Where the server holds another file by now, all of that one.
    """
    validator = part.validator
    for start, end in spans:
        if part.validator == validator:
            _fetch_span(part, start, end, patience, None)


def _fetch_span(
    part: Part, start: int, end: int | None, patience: Patience, check_room: Room | None
) -> None:
    span = _Span(part, start, end, check_room)
    name = name_of(part.url)
    failures = 0
    with byte_bar(f"fetching {name}") as span.show:
        while True:
            before = span.position
            try:
                span.attempt(patience.stall_seconds)
                return
            except _Broken as broken:
                failures = 1 if span.position > before else failures + 1
                if failures > len(patience.waits_seconds):
                    kept = f"; {part.num_bytes} bytes are kept in {part.path}"
                    raise DataError(
                        f"{part.url}: {broken}; {len(patience.waits_seconds)} further attempts got "
                        f"nowhere{kept if part.num_bytes else ''}. Run the same command again to "
                        "go on"
                    ) from None
                wait = patience.waits_seconds[failures - 1]
                print(f"{name}: {broken}; trying again in {wait:g} s", flush=True)
                time.sleep(wait)


@dataclass
class _Span:
    """A span on its way: everything of it before `position` is on disk."""

    part: Part
    position: int
    end: int | None
    check_room: Room | None
    show: Callable[[int, int | None], None] = lambda position, total: None

    def attempt(self, stall_seconds: float) -> None:
        """One request. Raises `_Broken` when it ends early, `DataError` when it makes no sense."""
        if self.end is not None and self.position >= self.end:
            return
        request = urllib.request.Request(self.part.address, headers=self._headers())
        try:
            with urllib.request.urlopen(request, timeout=stall_seconds) as response:
                at = self._begin(response)
                self._receive(response, at)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and self._ends_here(error.headers.get("Content-Range", "")):
                return
            if error.code in _TRY_AGAIN:
                raise _Broken(f"the server answers {error.code} {error.reason}") from None
            raise DataError(f"{self.part.url}: {error.code} {error.reason}") from None
        except http.client.InvalidURL as error:
            raise ConfigError(f"url: got {self.part.url!r}: {error}") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise DataError(f"{self.part.url}: {reason.verify_message}") from None
            raise _Broken(str(reason) or type(error).__name__) from None

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity", "User-Agent": "finetune"}
        if self.position or self.end is not None:
            last = "" if self.end is None else self.end - 1
            headers["Range"] = f"bytes={self.position}-{last}"
            if self.part.validator:
                headers["If-Range"] = self.part.validator
        return headers

    def _begin(self, response: Any) -> int:
        """Where in the file this response starts. A new file under the URL is noticed here."""
        headers = response.headers
        etag = headers.get("ETag", "")
        # RFC 9110, 13.1.5: a weak ETag can't say that ranges belong together.
        validator = etag if etag.startswith('"') else headers.get("Last-Modified")
        if response.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            if not found or int(found[1]) != self.position:
                raise _Broken("the server sent another range than the one asked for")
            at, total = self.position, None if found[2] == "*" else int(found[2])
        else:
            length = headers.get("Content-Length", "")
            at, total = 0, int(length) if length.isdecimal() else None
        self._check_total(total)
        if self.part.validator and not validator and total is None:  # a page to log in at, say
            raise _Broken("the server sent something else")
        if self.part.validator and validator and validator != self.part.validator:
            self.part.path.write_bytes(b"")
            self.position, self.end, self.part.validator = 0, None, None
            if at:
                raise _Broken("the server now holds another file; starting afresh")
        self.part.total_bytes = total if total is not None else self.part.total_bytes
        self.part.validator = validator or self.part.validator
        if self.check_room and total is not None:
            self.check_room(total - self.part.num_bytes)
            self.check_room = None
        self.part.write_note()
        return at

    def _check_total(self, total: int | None) -> None:
        if None not in (total, self.part.total_bytes) and total != self.part.total_bytes:
            raise DataError(
                f"{self.part.url}: the server says {total} bytes, and said "
                f"{self.part.total_bytes} before. {self.part.num_bytes} bytes are kept in "
                f"{self.part.path}; if the file was replaced, remove that one to start afresh"
            )

    def _ends_here(self, content_range: str) -> bool:
        """Whether "nothing from there on" means that the file is whole."""
        found = re.fullmatch(r"bytes \*/(\d+)", content_range)
        if not found:
            return False
        total = int(found[1])
        self._check_total(total)
        if total > self.position:
            return False
        if total < self.position:
            raise DataError(
                f"{self.part.url}: the server has {total} bytes, and {self.part.path} holds "
                f"{self.part.num_bytes}, so they are of another file; remove it to start afresh"
            )
        self.part.total_bytes = self.position
        self.part.write_note()
        return True

    def _receive(self, response: Any, at: int) -> None:
        """Write what comes from `at` on. A server that ignores ranges starts at 0: its bytes go
        over the same bytes, so that nothing is lost when it breaks off before the old end.
        """
        end = self.end if self.end is not None else self.part.total_bytes
        with self.part.path.open("r+b", buffering=0) as file:
            file.seek(at)
            while end is None or at < end:
                block = response.read1(BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - at))
                if not block:
                    break
                _write(file, block, self.part.path)
                at += len(block)
                self.position = max(self.position, at)
                self.show(at, end)
        if end is not None and at < end:
            raise _Broken(f"cut off at {at} of {end} bytes")
        if end is None:
            with self.part.path.open("r+b") as file:
                file.truncate(at)  # what was there may have been longer
            self.part.total_bytes = at
            self.part.write_note()


def _write(file: FileIO, block: bytes, path: Path) -> None:
    rest = memoryview(block)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise DataError(
            f"{path} can't be written: {error.strerror}; what is there is kept for the next time"
        ) from None
