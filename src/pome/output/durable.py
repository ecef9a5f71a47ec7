"""Durable writes: syncs of files and folders, and OSErrors turned into messages that name the next step."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pome.checkpoint.files import File, read_range
from pome.errors import OutputError, printable
from pome.output.clone import Advance, write_at

_PIECE = 8 << 20


@contextlib.contextmanager
def as_output_error(path: Path, origin: str = "") -> Iterator[None]:
    """Turn an OSError while writing into an OutputError that names the file, perhaps its origin, and the next step."""
    try:
        yield
    except OSError as error:
        steps = {
            errno.ENOSPC: "make room there, then run the same command again to go on",
            errno.EDQUOT: "raise the quota, then run the same command again to go on",
            errno.EFBIG: "raise the limit on file sizes (ulimit -f), then run the same command again to go on",
            errno.EROFS: "the file system is read-only; choose another OUT",
            errno.EACCES: "choose an OUT that you may write to",
            errno.EPERM: "choose an OUT that you may write to",
        }
        step = steps.get(error.errno or 0, "mend it, then run the same command again to go on")
        raise OutputError(f"{show_path(path)}{origin}: {error.strerror or error}; {step}") from error


def show_path(path: Path) -> str:
    return printable(str(path), 1000)


def pump(source: File, start: int, target: int, at: int, count: int, advance: Advance) -> None:
    """Copy bytes that only reading `source` makes."""
    for done in range(0, count, _PIECE):
        piece = read_range(source, start + done, min(_PIECE, count - done), "the file")
        write_at(target, piece, at + done)
        advance(len(piece))


def open_regular(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise OutputError(f"{show_path(path)}: cannot be read: {error.strerror}; nothing is lost, try again") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OutputError(f"{show_path(path)}: is no longer a regular file")
    return fd


def read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear_staging(folder: Path) -> None:
    """Remove the staging folder of a published output; the file `publishing`, the sign of it, goes last."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if path.name != "publishing":
                remove(path)
        shutil.rmtree(folder)


# Answers of network and user-space file systems to a request that they do not have. None means a broken disk.
REFUSALS = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EPERM, errno.EACCES}
)


def append_synced(fd: int, data: bytes) -> None:
    view: Any = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    sync_file(fd)


def write_synced(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        write_at(fd, content, 0)
        sync_file(fd)
    finally:
        os.close(fd)


def sync_file(fd: int, data_only: bool = False) -> bool:
    """Write a file's bytes to the disk; False where the file system has no such request. Raises OSError."""
    try:
        os.fdatasync(fd) if data_only and hasattr(os, "fdatasync") else os.fsync(fd)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        return False
    return True


def sync_folder(path: Path) -> bool:
    """Write a folder's entries to the disk; False where the file system has no such request. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        return False
    try:
        return sync_file(fd)
    finally:
        os.close(fd)


def set_mode(fd: int, mode: int) -> bool:
    """Give an open file its permissions; False where the file system keeps none of its own. Raises OSError."""
    try:
        os.fchmod(fd, mode)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        return False
    return True
