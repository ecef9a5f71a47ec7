"""Rates that a run leaves in the user's cache, from the times of its stages. No torch."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator

from pome.config.spec import EditSpec
from pome.planning.devices import find_device
from pome.planning.estimate import Files, Tally
from pome.planning.rates import Rates, leave_rates

COMMAND_SECONDS = 0.4  # of Python and the command line, before an edit begins
LEAST_BYTES, LEAST_SECONDS = 64 << 20, 0.05  # of a stage that tells a rate


class RunClock:
    """Seconds of the stages of one edit, and of the units in them."""

    def __init__(self, spec: EditSpec, begun: float) -> None:
        self.spec = spec
        self.begun = begun
        self.tally = Tally(spec)
        self.spent = {"plan": time.perf_counter() - begun}
        self.loads_torch = "torch" not in sys.modules

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """The block is one stage: `start` (torch is loaded), `copy` or `edit`."""
        begun = time.perf_counter()
        yield
        self.spent[stage] = time.perf_counter() - begun

    def leave(self, files: Files, devices: list[str], cores: int) -> None:
        """Put the rates of a whole, undisturbed run into the cache."""
        device = find_device("cpu" if devices == ["cpu"] else devices[0] if len(devices) == 1 else "cuda")
        if device.on_cpu and device.cores != cores:
            return  # split as an earlier run on another machine
        rest = time.perf_counter() - self.begun - sum(self.spent.values())
        leave_rates(
            device.name,
            Rates(
                f"{datetime.date.today().isoformat()}, by runs here",
                startup_seconds=COMMAND_SECONDS + self.spent["start"] if self.loads_torch else None,
                copy_bytes=_divide(files.copied, self.spent["copy"]),
                hash_bytes=_divide(files.hashed, rest),
                routes=self.tally.find_points(self.spent["edit"]),
            ),
        )


def _divide(nbytes: int, seconds: float) -> float | None:
    return nbytes / seconds if nbytes > LEAST_BYTES and seconds > LEAST_SECONDS else None
