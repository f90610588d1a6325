"""Resources that a process can run out of: memory, disk space, file handles."""

import errno
import math
import os
import re
from contextlib import suppress
from pathlib import Path

from finetune.system.errors import FinetuneError, Shortage

_REMEDIES = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some of the disk quota",
    errno.EROFS: "pass a directory that can be written",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "allow more open files on this machine",
}


def shortage(error: BaseException) -> Shortage | None:
    """The resource that an error says is used up; None for any other error.

    Libraries wrap a system error in their own, as its cause or only by its text.
    """
    found: BaseException | None = error
    while found is not None:
        for code, remedy in _REMEDIES.items():
            if os.strerror(code) in str(found):
                if isinstance(error, FinetuneError):
                    return Shortage(str(error))
                path = getattr(found, "filename", None)
                place = f"{path} can't be used: " if path else ""
                return Shortage(f"{place}{os.strerror(code)}; {remedy}")
        found = found.__cause__ or found.__context__
    return None


def require_handles(count: int) -> None:
    """Raise `OSError` unless `count` more files can be opened; some libraries hang without them."""
    descriptors: list[int] = []
    try:
        while len(descriptors) < count:
            descriptors += os.pipe()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def free_memory() -> float:
    """Bytes that the system has for the content of files; infinite where it doesn't tell."""
    with suppress(OSError):
        if found := re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(found[1]) * 1024
    return math.inf


_OUT_OF_MEMORY = (
    "can't allocate memory",  # torch's allocator on the CPU
    "out of memory",  # CUDA and MPS
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the CPU or of a device is used up.

    torch raises a RuntimeError or one of its subclasses, which only the text tells apart.
    """
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)
