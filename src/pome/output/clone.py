"""Copies of files in the cheapest way that the file system has: shared, in the kernel, or by read and write."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

Advance = Callable[[int], None]

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_CHUNK = 8 << 20
_KERNEL_CHUNK = 64 << 20  # small enough for a progress bar and for Ctrl-C to be heard
# Errors that every way of copying would meet. After any other the next way is tried: file systems refuse copies within
# the kernel in many ways (EOPNOTSUPP, EXDEV, EACCES, EIO, ...), and where a disk is broken, a read or write says so.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def share_file(source: int, target: int) -> bool:
    """Make an empty file share all bytes of another until one is written (btrfs, xfs, bcachefs); False: not here."""
    try:
        import fcntl

        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        return False
    return True


def can_share(source: Path, folder: Path) -> bool:
    """Whether a file can be shared into a folder, tried on a nameless file that leaves nothing behind."""
    try:
        with source.open("rb") as original, tempfile.TemporaryFile(dir=folder) as probe:
            return share_file(original.fileno(), probe.fileno())
    except OSError:
        return False


def copy_range(source: int, source_at: int, target: int, target_at: int, count: int, advance: Advance) -> None:
    """Copy `count` bytes between two files. Raises OSError; EIO when the source ends before them."""
    done = 0
    in_kernel = hasattr(os, "copy_file_range")
    while done < count:
        if in_kernel:
            try:
                size = min(count - done, _KERNEL_CHUNK)
                got = os.copy_file_range(source, target, size, source_at + done, target_at + done)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise
                got = 0
            if got == 0:  # some file systems answer 0 for what they cannot do
                in_kernel = False
                continue
        else:
            piece = os.pread(source, min(count - done, _CHUNK), source_at + done)
            if not piece:
                raise OSError(errno.EIO, "the source ends early; it changed while being copied")
            write_at(target, piece, target_at + done)
            got = len(piece)
        done += got
        advance(got)


def copy_file(source: int, target: int, size: int, advance: Advance) -> None:
    """Fill an empty file with the first `size` bytes (the whole) of another."""
    if size and share_file(source, target):
        advance(size)
    else:
        copy_range(source, 0, target, 0, size, advance)


def write_at(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, however many calls the system takes for it."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view[: 1 << 30], offset)
        view = view[written:]
        offset += written
