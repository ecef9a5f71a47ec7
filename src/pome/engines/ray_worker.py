"""The actor of the Ray engine: works on bundles of units where Ray placed it. It knows nothing of Ray."""

from __future__ import annotations

import pickle
import threading
import time
from typing import Any, Protocol

Item = tuple[int, bytes]  # the number of a unit, and the unit, pickled
# What became of a bundle: results, pickled, by the number of their units; seconds of work; an error, pickled.
Reply = tuple[list[Item], float, bytes | None]


class Executor(Protocol):
    """What a job opened on a worker, to do its units: `read` is called while another thread is in `work`."""

    def read(self, unit: Any) -> Any: ...

    def work(self, unit: Any, data: Any) -> Any: ...

    def flush(self) -> None:
        """Make safe what was written; results count only after it."""


class Job(Protocol):
    """What all units of a run share: paths and options. It is pickled, and so holds no data and no open file."""

    def open(self, device: str, threads: int) -> Executor: ...


class Worker:
    """One slot of a cluster: a GPU, or as many cores as a unit's threads. Lives as long as the run.

    It has two bundles at a time: the next one's first unit is read while the first one is worked on.
    """

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._turn = threading.Lock()
        self._executor: Executor | None = None

    def greet(self) -> None:
        """Answer of a worker whose process has begun."""

    def open(self, job: bytes, device: str, threads: int) -> bytes | None:
        """Load what the work needs; the error, pickled, where that fails."""
        try:
            self._executor = pickle.loads(job).open(device, threads)
        except Exception as error:  # of the job: it is raised again where the run is
            return dump_error(error)
        return None

    def work(self, bundle: list[Item]) -> Reply:
        """Results of a bundle's units, or of the first of them where it was stopped or met an error."""
        assert self._executor is not None
        done: list[Item] = []
        seconds, failed = 0.0, None
        try:
            for number, pickled in bundle:
                if self._stopping.is_set():
                    break
                unit = pickle.loads(pickled)
                data = self._executor.read(unit)
                with self._turn:
                    if self._stopping.is_set():
                        break
                    begun = time.perf_counter()
                    result = self._executor.work(unit, data)
                    seconds += time.perf_counter() - begun
                done.append((number, pickle.dumps(result)))
                del data
        except Exception as error:  # of the job: it is raised again where the run is
            failed = dump_error(error)
        try:
            self._executor.flush()
        except Exception as error:  # then nothing of the bundle is safe
            done, failed = [], dump_error(error)
        return done, seconds, failed

    def stop(self) -> None:
        """Begin no further unit; those that are worked on are finished."""
        self._stopping.set()


def dump_error(error: Exception) -> bytes:
    """An error that can be raised elsewhere; one that cannot be pickled becomes its text."""
    try:
        dumped = pickle.dumps(error)
        pickle.loads(dumped)
    except Exception:  # an error class may do anything when it is pickled
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return dumped
