"""The local engine: a map over units on this machine, one worker for each device, or several on the CPU.

While the kernel works on a unit, its worker's reader fetches the next. Results come back in the order in which they
are finished, which no caller may rely on.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Unit = TypeVar("Unit")
Data = TypeVar("Data")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Done(Generic[Result]):
    """Result of a unit. It has a class of its own, so that a result may be any value, also None."""

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
    done: deque[_Done[Result] | BaseException | None] = deque()
    more = threading.Condition()
    begin, stop = threading.Event(), threading.Event()
    for unit in units:
        todo.put(unit)

    def tell(item: _Done[Result] | BaseException | None) -> None:
        with more:
            done.append(item)
            more.notify()

    def fetch(reader: ThreadPoolExecutor) -> tuple[Unit, Future[Data]] | None:
        if stop.is_set():
            return None
        try:
            unit = todo.get_nowait()
        except queue.Empty:
            return None
        return unit, reader.submit(read, unit)

    def run_worker(device: str) -> None:
        begin.wait()
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="pome-read") as reader:
                ahead = fetch(reader)
                while ahead is not None:
                    unit, data = ahead
                    ready = data.result()
                    # Near the end no unit is read ahead that another worker could begin at once.
                    ahead = fetch(reader) if todo.qsize() >= len(workers) else None
                    if stop.is_set():
                        break
                    tell(_Done(work(unit, ready, device)))
                    del ready, data  # else the worker holds one unit's bytes while it waits for the next
                    ahead = ahead or fetch(reader)
        except BaseException as error:
            stop.set()
            tell(error)
        finally:
            tell(None)

    workers = [threading.Thread(target=run_worker, args=(device,), daemon=True) for device in devices[: len(units)]]
    failure: BaseException | None = None
    patient = True
    try:
        for worker in workers:
            worker.start()  # none begins before all are there, so that an interrupt here loses no result
        running = len(workers)
        while running:
            try:
                with more:  # an interrupt during this wait loses no result
                    begin.set()
                    more.wait_for(lambda: done)
            except KeyboardInterrupt as interrupt:
                if isinstance(failure, KeyboardInterrupt):
                    patient = False
                    raise
                # The workers finish their units, which are yielded so that no work is lost. Then it is raised.
                stop.set()
                failure = interrupt
                continue
            item = done.popleft()
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
        begin.set()
        for worker in workers if patient else ():
            if worker.is_alive():  # one that was not started cannot be joined
                worker.join()
