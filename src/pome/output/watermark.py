"""High-water mark of files whose ranges are written in any order: all bytes below it are final."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from pome.errors import CheckpointError


class Watermark:
    """Ranges still to be written, by file and start; a reader waits here until those before its position are final."""

    def __init__(self, ranges: Iterable[tuple[str, int]]) -> None:
        self._pending: dict[str, list[int]] = {}
        for name, start in sorted(ranges, reverse=True):
            self._pending.setdefault(name, []).append(start)  # the first one last, where it is taken off
        self._done: set[tuple[str, int]] = set()
        self._abandoned = False
        self._changed = threading.Condition()

    def mark_written(self, name: str, start: int) -> None:
        """Mark the range of a file that begins at `start` as final: written, or left as it is."""
        with self._changed:
            self._done.add((name, start))
            pending = self._pending.get(name, [])
            while pending and (name, pending[-1]) in self._done:
                self._done.remove((name, pending.pop()))
            self._changed.notify_all()

    def wait(self, name: str, stop: int) -> None:
        """Return when all bytes below `stop` in a file are final. Raises CheckpointError after `abandon`."""
        with self._changed:
            while not self._abandoned and any(start < stop for start in self._pending.get(name, [])[-1:]):
                self._changed.wait()
            if self._abandoned:
                raise CheckpointError("hashing was cancelled")

    def abandon(self) -> None:
        """End every wait with an error: nothing more will be written."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
