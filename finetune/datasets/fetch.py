"""Fetch one file over HTTP: resume what is incomplete, retry what fails."""

import json
import shutil
import time
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from finetune.system.errors import ConfigError, DataError
from finetune.system.progress import byte_bar

RETRY_WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Before each retry. Starts again after an attempt that received data."""
TIMEOUT_SECONDS = 30.0  # a connection that delivers nothing for this long is broken
_BLOCK_BYTES = 1 << 14
_TEMPORARY_ERRORS = frozenset({408, 425, 429, 500, 502, 503, 504})


class PartialDownload:
    """The bytes of a file received so far and, beside them, what the server said about the file."""

    def __init__(self, url: str, folder: Path) -> None:
        """Raises `ConfigError` for an invalid URL."""
        self.url, self.name = url, _file_name(url)
        self.path = folder / f"{self.name}.part"
        self.note_path = folder / f"{self.name}.part.json"
        split = urlsplit(url)
        host = split.netloc.rpartition("@")[2]
        self.source = split._replace(netloc=host, query="", fragment="").geturl()
        """The URL without password and query, which may hold a token."""
        self.total_bytes: int | None = None
        self.validator: str | None = None
        """The server's ETag or Last-Modified, which changes when the file is replaced."""
        try:
            note = json.loads(self.note_path.read_text(encoding="utf-8"))
            if self.path.exists() and note["url"] == self.source:
                self.total_bytes, self.validator = note["total_bytes"], note["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # missing or cut off: the server is asked again

    def write_note(self) -> None:
        note = {"url": self.source, "total_bytes": self.total_bytes, "validator": self.validator}
        self.note_path.write_text(json.dumps(note), encoding="utf-8")

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def is_complete(self) -> bool:
        return self.total_bytes is not None and self.num_bytes >= self.total_bytes

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note_path.unlink(missing_ok=True)
        self.total_bytes = self.validator = None


def _file_name(url: str) -> str:
    try:
        prepared = requests.Request("GET", url).prepare().url or ""
    except (requests.RequestException, ValueError):
        prepared = ""
    if not prepared.startswith(("http://", "https://")):
        raise ConfigError(f"url: got {url!r}; must be https://HOST/FILE or http://HOST/FILE")
    return PurePosixPath(urlsplit(prepared).path).name or "data.zip"


class _Interrupted(Exception):
    """An attempt failed; a retry may succeed."""


def check_free_space(folder: Path, num_bytes: float) -> None:
    """Raises `DataError` unless `num_bytes` fit on the folder's disk."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        raise DataError(
            f"{folder}: {num_bytes / 1e9:.2f} GB are needed, but only {free_bytes / 1e9:.2f} GB of "
            "the disk are free; free some space or choose a folder on another disk"
        )


def fetch(partial: PartialDownload, unpacked_ratio: float = 0) -> None:
    """Complete a partial download. Received bytes are kept whatever happens.

    Raises `DataError` when the server refuses, all retries fail, or the disk has no space for the
    missing bytes and the unpacked ones, which are `unpacked_ratio` times the file.
    """
    waits = iter(RETRY_WAITS_SECONDS)
    try:
        while not partial.is_complete:
            before = partial.num_bytes
            try:
                _attempt(partial, unpacked_ratio)
            except _Interrupted as error:
                if partial.num_bytes > before:
                    waits = iter(RETRY_WAITS_SECONDS)
                wait = next(waits, None)
                if wait is None:
                    raise DataError(
                        f"{partial.source}: {error}; all {len(RETRY_WAITS_SECONDS)} retries failed."
                        f" {partial.num_bytes} bytes are kept in {partial.path}: run the same "
                        "command again to resume"
                    ) from None
                print(f"{partial.name}: {error}; retrying in {wait:g} s", flush=True)
                time.sleep(wait)
        if not partial.num_bytes:
            raise DataError(f"{partial.source}: the server sent an empty file")
    finally:
        if not partial.num_bytes:
            partial.remove()


def _attempt(partial: PartialDownload, unpacked_ratio: float) -> None:
    """Send one request and append what arrives. Raises `_Interrupted` or `DataError`."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "finetune"}
    if partial.num_bytes:
        headers["Range"] = f"bytes={partial.num_bytes}-"
        if partial.validator:
            headers["If-Range"] = partial.validator
    try:
        response = requests.get(partial.url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS)
    except requests.RequestException as error:
        reason = getattr(error.args[0] if error.args else None, "reason", error)
        raise _Interrupted(str(reason)) from None
    with response:
        status = f"the server answered {response.status_code} {response.reason}"
        if response.status_code in _TEMPORARY_ERRORS:
            raise _Interrupted(status)
        if response.status_code not in (200, 206, 416):
            raise DataError(f"{partial.source}: {status}")
        _check_response(partial, response)
        if (total := partial.total_bytes) is not None:
            num_bytes = total - partial.num_bytes + unpacked_ratio * total
            check_free_space(partial.path.parent, num_bytes)
        if response.status_code != 416:
            _append(partial, response)
    if not partial.is_complete:
        raise _Interrupted(f"cut off at {partial.num_bytes} of {total or 'unknown'} bytes")


def _check_response(partial: PartialDownload, response: requests.Response) -> None:
    """Raise an error unless a response belongs to the same file; note its size and version."""
    content_range, position = response.headers.get("Content-Range", ""), partial.num_bytes
    if response.status_code == 206 and not content_range.startswith(f"bytes {position}-"):
        raise _Interrupted("the server sent another range than requested")
    size = content_range.rpartition("/")[2]
    total = int(size) if size.isdecimal() else partial.total_bytes
    if response.status_code == 200:
        total = response.raw.length_remaining
    if partial.total_bytes not in (None, total):  # such as a login page
        raise DataError(
            f"{partial.source}: the server reports {'no size' if total is None else total}, but "
            f"{partial.total_bytes} bytes before. {position} bytes are kept in {partial.path}; if "
            "the file was replaced, remove that one to start over"
        )
    etag = response.headers.get("ETag", "")
    # RFC 9110, 13.1.5: a weak ETag does not show that ranges belong to the same file.
    validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
    partial.total_bytes, partial.validator = total, validator or partial.validator
    partial.write_note()


def _append(partial: PartialDownload, response: requests.Response) -> None:
    """Append a response's body, or start over with it if it is the complete file.

    A server sends the complete file if it does not support ranges, or if the file was replaced.
    """
    mode = "wb" if response.status_code == 200 else "ab"
    try:
        with partial.path.open(mode) as file, byte_bar(f"fetching {partial.name}") as show:
            for block in response.raw.stream(_BLOCK_BYTES, decode_content=False):
                file.write(block)
                show(file.tell(), partial.total_bytes)
    except HTTPError:
        return
    except OSError as error:
        raise DataError(
            f"{partial.path} cannot be written: {error.strerror}. {partial.num_bytes} bytes are "
            "kept: run the same command again to resume"
        ) from None
    if partial.total_bytes is None:
        partial.total_bytes = partial.num_bytes
        partial.write_note()
