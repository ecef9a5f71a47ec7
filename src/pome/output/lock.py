"""Lock of a staging folder: one run at a time.

flock is used, which the kernel releases when its holder dies. Some network file systems grant a lock to everybody.
Therefore the lock file also names its holder: on this machine its process is looked up, and on another machine it is
known to live by its heartbeat, which moves the file's time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from pome.errors import OutputError, printable
from pome.output.clone import write_at

LOCK_NAME = "lock"
HEARTBEAT_SECONDS = 5.0
WATCH_SECONDS = 4 * HEARTBEAT_SECONDS  # a live holder moves the file's time in this, however slow its disk


class Lock:
    """The lock of a staging folder, held from `take_lock` until `release`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="pome-lock", daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self._fd)
            except OSError:
                return  # the disk is gone; the run itself will say so

    def release(self) -> None:
        self._released.set()
        self._heart.join()
        os.close(self._fd)


def take_lock(folder: Path) -> Lock:
    """Hold the lock file of `folder`. Raises OutputError naming the run that holds it, OSError if it cannot be made."""
    path = folder / LOCK_NAME
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            holder = _read_holder(fd)
            if not _flock(fd) or (holder and _is_alive(holder, path)):
                raise _in_use(folder, holder)
            if path.exists() and os.path.samestat(os.fstat(fd), os.stat(path)):
                os.ftruncate(fd, 0)
                write_at(fd, json.dumps(_describe_self()).encode(), 0)
                return Lock(fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # the holder finished and removed the folder between our open and our lock
        folder.mkdir(parents=True, exist_ok=True)


def _flock(fd: int) -> bool:
    """Whether the kernel grants the lock; True too where it has none to give."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
            raise
    return True


def _in_use(folder: Path, holder: dict[str, Any] | None) -> OutputError:
    who = f" (process {holder.get('pid')} on {printable(str(holder.get('host')))})" if holder else ""
    return OutputError(f"{folder}: another run{who} is making this output; wait for it or stop it")


def _describe_self() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _read_start(os.getpid())}


def _read_holder(fd: int) -> dict[str, Any] | None:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except (ValueError, RecursionError):
        return None
    return holder if isinstance(holder, dict) else None


def _is_alive(holder: dict[str, Any], path: Path) -> bool:
    """Whether the recorded holder still runs although the kernel gave us its lock."""
    if holder == _describe_self():
        return False  # an earlier run of this very process
    if holder.get("host") == socket.gethostname():
        # The start time tells the process from a later one of its number.
        pid = holder.get("pid")
        return isinstance(pid, int) and holder.get("started") is not None and _read_start(pid) == holder["started"]
    last = _read_time(path)
    if time.time() - last > WATCH_SECONDS:
        return False
    until = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < until:
        time.sleep(HEARTBEAT_SECONDS / 10)
        if _read_time(path) != last:
            return True
    return False


def _read_time(path: Path) -> float:
    """When the lock file was last touched; opened anew, because network file systems ask the server only then."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime


def _read_start(pid: int) -> str | None:
    """When a process started, in the kernel's ticks since boot; None where that cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
