"""Journal entries of finished units, committed to the staging folder in groups. No torch."""

from __future__ import annotations

import time
from typing import Any

from pome.output.staging import Staging

# Finished units are synced and journalled in groups: what a crash loses is at most this much work.
COMMIT_SECONDS = 5.0
COMMIT_UNITS = 512


class Commits:
    """The finished units of a run that are not in the journal yet."""

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self.pending: list[dict[str, Any]] = []
        self.last = time.monotonic()

    def add(self, entry: dict[str, Any]) -> None:
        """A unit is done: its journal entry, as `Staging.commit` takes it."""
        self.pending.append(entry)
        if len(self.pending) >= COMMIT_UNITS or time.monotonic() - self.last > COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sync and journal the pending units, also on an error or Ctrl-C, so that no finished work is lost."""
        if self.pending:
            self.staging.commit(self.pending)
            self.staging.finished.update((entry["unit"], entry) for entry in self.pending)
            self.pending.clear()
        self.last = time.monotonic()
