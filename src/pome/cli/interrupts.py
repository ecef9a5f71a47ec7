"""Ctrl-C and SIGTERM during a command: said at once, then raised as KeyboardInterrupt."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def acknowledge_interrupts(acknowledge: Callable[[], None]) -> Iterator[None]:
    """Inside, an interrupt calls `acknowledge` before it is raised: a matrix that is being worked on is finished first,
    which may take a minute in which nothing else would be seen to happen."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return

    def handle(*_: object) -> None:
        acknowledge()
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
