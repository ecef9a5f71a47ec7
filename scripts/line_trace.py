"""Which lines of a source tree run: each is appended to a file as `path:line`, by child processes too.

`scripts/mutate.py` traces its tests with it, and copies it into the tree as `sitecustomize.py`, which every Python
loads at its start.
"""

from __future__ import annotations

import os
import sys
import threading
from types import FrameType

SINK, UNDER = "POME_LINES_FILE", "POME_LINES_UNDER"
_seen: set[tuple[str, int]] = set()
_fd = -1


def begin(sink: str, under: str) -> None:
    """Write the lines of files under a folder to a file from now on, those of threads and children too."""
    global _fd
    if _fd >= 0:
        os.close(_fd)
    _fd = os.open(sink, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _seen.clear()
    os.environ[SINK], os.environ[UNDER] = sink, under

    def trace_call(frame: FrameType, event: str, arg: object):
        return trace_line if frame.f_code.co_filename.startswith(under) else None

    def trace_line(frame: FrameType, event: str, arg: object):
        place = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and place not in _seen:
            _seen.add(place)
            os.write(_fd, f"{place[0]}:{place[1]}\n".encode())
        return trace_line

    threading.settrace(trace_call)
    sys.settrace(trace_call)


if __name__ == "sitecustomize" and SINK in os.environ:
    begin(os.environ[SINK], os.environ[UNDER])
