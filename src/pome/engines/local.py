"""The local engine: a map over units on this machine, one worker for each device.

While the kernel works on a unit, its worker's reader fetches the next. Results come back in the order in which they
are finished, which no caller may rely on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Unit = TypeVar("Unit")
Data = TypeVar("Data")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Done(Generic[Result]):
    """Kept apart from what ends a worker, so that a result may be anything, None too."""

    result: Result


def map_units(
    units: Sequence[Unit],
    devices: Sequence[str],
    read: Callable[[Unit], Data],
    work: Callable[[Unit, Data, str], Result],
) -> Generator[Result, None, None]:
    """Yield `work(unit, read(unit), device)` for every unit, reading one unit ahead on each device.

    The first error of any worker, or Ctrl-C, is raised here after the workers have finished the units that they are at
    and their results were yielded; a second Ctrl-C waits for nothing. Closing the iterator (or an exception in
    the caller) stops the workers in the same way, without their results.
    """
    todo: queue.SimpleQueue[Unit] = queue.SimpleQueue()
    done: queue.SimpleQueue[_Done[Result] | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()
    for unit in units:
        todo.put(unit)

    def fetch(reader: ThreadPoolExecutor) -> tuple[Unit, Future[Data]] | None:
        if stop.is_set():
            return None
        try:
            unit = todo.get_nowait()
        except queue.Empty:
            return None
        return unit, reader.submit(read, unit)

    def run_worker(device: str) -> None:
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="pome-read") as reader:
                ahead = fetch(reader)
                while ahead is not None:
                    unit, data = ahead
                    ready = data.result()
                    ahead = fetch(reader)
                    if stop.is_set():
                        break
                    done.put(_Done(work(unit, ready, device)))
                    del ready, data  # else the worker holds one unit's bytes while it waits for the next
        except BaseException as error:
            stop.set()
            done.put(error)
        finally:
            done.put(None)

    workers = [threading.Thread(target=run_worker, args=(device,), daemon=True) for device in devices]
    for worker in workers:
        worker.start()
    failure: BaseException | None = None
    patient = True
    try:
        running = len(workers)
        while running:
            try:
                item = done.get()
            except KeyboardInterrupt as interrupt:
                if isinstance(failure, KeyboardInterrupt):
                    patient = False
                    raise
                # What the workers are at is finished and yielded, so that its work is not lost; then it is raised.
                stop.set()
                failure = interrupt
                continue
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                failure = failure or item
            else:
                yield item.result
        if failure is not None:
            raise failure
    finally:
        stop.set()
        for worker in workers if patient else ():
            worker.join()
