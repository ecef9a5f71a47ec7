"""Workers of this machine: one for each accelerator, or as many on the CPU as the split of its cores allows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeVar

import torch

from pome.engines.local import map_units
from pome.output.progress import Progress
from pome.output.staging import Staging
from pome.planning.split import count_cores, group_units, order_units
from pome.planning.units import Unit

Data = TypeVar("Data")
Result = TypeVar("Result")


def keep_split(staging: Staging, progress: Progress) -> int:
    """The number of cores that a run splits its units over: an interrupted one's where it goes on, for its bits."""
    cores = staging.keep_cores(count_cores())
    if cores != count_cores():
        progress.note(f"going on with the split over {cores} cores of the earlier run, for the same bits")
    return cores


def map_on_devices(
    units: Sequence[Unit],
    devices: Sequence[str],
    cores: int,
    read: Callable[[Unit], Data],
    work: Callable[[Unit, Data, str], Result],
) -> Generator[Result, None, None]:
    """`map_units` over the workers that `devices` and the split of `cores` give, each unit with its own threads.

    Several accelerators take the costly units first. On the CPU the groups of the split follow each other.
    """

    def work_with(threads: int) -> Callable[[Unit, Data, str], Result]:
        def run(unit: Unit, data: Data, device: str) -> Result:
            torch.set_num_threads(threads)  # of this worker's thread alone, in OpenMP and in MKL
            return work(unit, data, device)

        return run

    with use_threads(torch.get_num_threads()):
        if list(devices) == ["cpu"]:
            for threads, group in group_units(units, cores):
                yield from map_units(group, ["cpu"] * (cores // threads), read, work_with(threads))
        else:
            yield from map_units(order_units(list(units), len(devices)), devices, read, work_with(cores))


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Compute with `count` threads inside, in this thread and in those that begin there; as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
