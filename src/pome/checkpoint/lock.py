"""One run at a time: a lock file held with flock, and who holds it for file systems whose locks lie."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from pome.checkpoint.clone import write_at
from pome.errors import OutputError, printable


def take_lock(folder: Path) -> int:
    """Hold `folder/lock` or raise OutputError naming the run that holds it."""
    path = folder / "lock"
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            holder = _read_holder(fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise _in_use(folder, holder) from None
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
            # Where locks lie (some network file systems) the holder's own process tells.
            if holder and holder != _describe_self() and _is_alive(holder):
                raise _in_use(folder, holder)
            if path.exists() and os.path.samestat(os.fstat(fd), os.stat(path)):
                os.ftruncate(fd, 0)
                write_at(fd, json.dumps(_describe_self()).encode(), 0)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # the holder finished and removed the folder between our open and our lock
        folder.mkdir(parents=True, exist_ok=True)


def _in_use(folder: Path, holder: dict[str, Any] | None) -> OutputError:
    who = f" (process {holder.get('pid')} on {printable(str(holder.get('host')))})" if holder else ""
    return OutputError(f"{folder}: another run{who} is making this output; wait for it or stop it")


def _describe_self() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _read_start(os.getpid())}


def _read_holder(fd: int) -> dict[str, Any] | None:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the recorded process still runs here; its start time tells it from a later one of that number."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    return holder.get("started") is not None and _read_start(holder["pid"]) == holder["started"]


def _read_start(pid: int) -> str | None:
    """When a process started, in the kernel's ticks since boot; None where that cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
