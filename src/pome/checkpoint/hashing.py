"""SHA-256 of files on this machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

_CHUNK = 8 << 20  # bytes read at a time


def hash_file(
    path: Path, advance: Callable[[int], None] = lambda _: None, wait: Callable[[int], None] | None = None
) -> tuple[int, str]:
    """Size in bytes and SHA-256 (hex) of a file, read in pieces.

    `advance` is told of the bytes of each piece. `wait(stop)` is called before the bytes up to `stop` are read, and
    returns when they may be. Raises OSError.
    """
    digest = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(_CHUNK))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        while True:
            if wait is not None:
                wait(size + _CHUNK)
            got = os.preadv(fd, [buffer], size)
            if not got:
                break
            digest.update(buffer[:got])
            size += got
            advance(got)
    finally:
        os.close(fd)
    return size, digest.hexdigest()
