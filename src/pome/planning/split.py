"""Split of a CPU's cores: small matrices side by side, each on one thread, large ones with all cores. No torch.

A matrix takes one core for each SIDE rows of its short side, and for each CORE_BYTES of its workspace; as many such
matrices are worked on at a time as there are cores for. scripts/bench_split.py measures both ways by size, and
docs/performance.md has its table: side by side is faster at every size that was measured, but beyond SIDE by less than
a fifth, and it takes the memory of several matrices.

How many threads work on a matrix decides its last bits. They follow from its shape and the number of cores alone, and
a run that goes on keeps the number that it began with.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pome.planning.units import Unit

SIDE = 1536
CORE_BYTES = 1 << 30
_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container


def count_cores() -> int:
    """Cores that this process may use: OMP_NUM_THREADS, else the physical ones it is bound to, within its quota."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if said.isdecimal() and int(said) > 0:
        return int(said)
    bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = len({_read(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in bound})
    quota, _, period = _read(_QUOTA).partition(" ")
    if quota.isdecimal() and period.isdecimal():
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def _read(path: Path) -> str:
    """The text of a small file of the system; empty where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def find_threads(short: int, workspace: int, cores: int) -> int:
    """Threads, of `cores`, for a matrix with that short side and workspace in bytes: a number that leaves none over."""
    wanted = min(cores, max(-(-short // SIDE), -(-workspace // CORE_BYTES)))
    return next(count for count in range(1, cores + 1) if cores % count == 0 and count >= wanted)


def group_units(units: Iterable[Unit], cores: int) -> list[tuple[int, list[Unit]]]:
    """The units by the number of their threads, most first: those of a group run side by side."""
    groups: dict[int, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.count_threads(cores), []).append(unit)
    return [(threads, order_units(groups[threads], cores // threads)) for threads in sorted(groups, reverse=True)]


def order_units(units: list[Unit], workers: int) -> list[Unit]:
    """The units in their order, which is that of their files, where one worker does all. Else the costly ones come
    first, so that no worker waits long for another at the end."""
    return units if workers == 1 else sorted(units, key=lambda unit: -unit.work)
