"""The weight files of an output in the making, opened once each and written at any offset."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from pome.output.clone import write_at
from pome.output.durable import as_output_error, sync_file


class WeightFiles:
    """Files of one folder that units are written to. Several threads may write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fds: dict[str, int] = {}
        self._opening = threading.Lock()
        self._pinned: int | None = None

    def pin(self) -> None:
        """Hold to the folder as it is now: to one that takes its place, under the same path, nothing is written.

        A worker that its run has given up may still live when the next run makes the folder anew.
        """
        with as_output_error(self.folder):
            self._pinned = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def write(self, name: str, data: bytearray, offset: int) -> None:
        """Write bytes to their range of a file; they are safe only after `sync`. Raises OutputError."""
        with as_output_error(self.folder / name):
            write_at(self._open(name), data, offset)

    def sync(self, data_only: bool = True) -> None:
        """Write to the disk all that was written. Raises OutputError."""
        with self._opening:  # others go on and may open the next file; what is to be synced is in those open by now
            files = list(self._fds.items())
        for name, fd in files:
            with as_output_error(self.folder / name):
                sync_file(fd, data_only)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _open(self, name: str) -> int:
        with self._opening:  # several devices write to one file
            if name not in self._fds:
                path = self.folder / name if self._pinned is None else name
                flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
                self._fds[name] = os.open(path, flags, dir_fd=self._pinned)
            return self._fds[name]
