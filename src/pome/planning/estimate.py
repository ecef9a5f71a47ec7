"""Estimate of an edit before it runs: operations by route, bytes, memory, and time from a device's rates. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pome.config.spec import EditSpec
from pome.planning.devices import Device
from pome.planning.flops import ROUTES, find_route
from pome.planning.rates import Rates, measure_size
from pome.planning.units import Plan, Unit

LEAST_SECONDS = 0.5
Task = tuple[str, int, int, int]  # route, long side, short side, k


@dataclass(frozen=True)
class RouteWork:
    """Work of one route: matrices, operations, and seconds where the device's rate is known."""

    matrices: int
    flops: float
    seconds: float | None


@dataclass(frozen=True)
class Files:
    """Bytes of files that an edit copies and hashes, beside those of its units."""

    copied: int
    hashed: int


@dataclass(frozen=True)
class Estimate:
    """Cost of an edit. Times are seconds, sizes bytes; a time is None where a rate that it needs was not measured."""

    device: str
    measured: str | None  # when and how the rates were measured
    routes: dict[str, RouteWork]
    bytes_read: int
    bytes_written: int
    bytes_copied: int
    bytes_hashed: int
    unit_memory: int  # of the largest unit
    memory: int  # of the whole run
    start_seconds: float | None
    copy_seconds: float | None
    edit_seconds: float | None
    hash_seconds: float | None

    @property
    def seconds(self) -> float | None:
        """The whole command; None where one part of it is not known."""
        parts = (self.start_seconds, self.copy_seconds, self.edit_seconds, self.hash_seconds)
        return sum(part for part in parts if part is not None) if None not in parts else None

    @property
    def unmeasured(self) -> list[str]:
        """The stages and routes without a known rate."""
        parts = {"start": self.start_seconds, "copies": self.copy_seconds, "hashes": self.hash_seconds}
        missing = [f"route {route}" for route, work in self.routes.items() if work.seconds is None]
        return missing + [name for name, seconds in parts.items() if seconds is None]

    def to_json(self) -> dict[str, Any]:
        """The document of `pome estimate --json`."""
        return {
            **vars(self),
            "routes": {route: vars(work) for route, work in self.routes.items()},
            "seconds": self.seconds,
        }


def estimate_plan(
    plan: Plan, spec: EditSpec, files: Files, device: Device, rates: Rates | None, planning_seconds: float = 0.0
) -> Estimate:
    """The estimate of a plan on a device, by its rates (None: nobody measured it).

    `planning_seconds` is what opening and planning the pair took just now: the command does it twice.
    """
    counts: dict[Task, int] = {}
    for unit in plan.units:
        for task in list_tasks(unit, spec):
            counts[task] = counts.get(task, 0) + 1
    routes: dict[str, RouteWork] = {}
    for (route, m, n, k), count in counts.items():
        flops = count * ROUTES[route](m, n, k)
        rate = rates.find_rate(route, measure_size(m, n)) if rates else None
        before = routes.get(route, RouteWork(0, 0.0, 0.0))
        seconds = before.seconds + flops / rate if rate and before.seconds is not None else None
        routes[route] = RouteWork(before.matrices + count, before.flops + flops, seconds)
    found = [work.seconds for work in routes.values()]
    start = rates.startup_seconds if rates else None
    return Estimate(
        device=device.name,
        measured=rates.measured if rates else None,
        routes=routes,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        bytes_copied=files.copied,
        bytes_hashed=files.hashed,
        unit_memory=max((unit.workspace for unit in plan.units), default=0),
        memory=plan.expect_memory(device.cores) if device.on_cpu else plan.expect_memory(1),
        start_seconds=None if start is None else start + 2.0 * planning_seconds,
        copy_seconds=files.copied / rates.copy_bytes if rates and rates.copy_bytes else None,
        edit_seconds=None if None in found else sum(seconds or 0.0 for seconds in found),
        hash_seconds=files.hashed / rates.hash_bytes if rates and rates.hash_bytes else None,
    )


def list_tasks(unit: Unit, spec: EditSpec) -> Iterator[Task]:
    """Computations of a unit: a route for each matrix, and a merge where an adapter changes more than those."""
    if unit.change is not None:
        ranks = [low.rank for low in unit.change.lows]
        if not unit.parts or not unit.change.is_plain:
            rows, columns = unit.shape
            yield "merge", max(rows, columns), min(rows, columns), max(ranks, default=1) // 2
    resolved = spec.resolve(unit.name) if unit.parts else spec
    for m, n in unit.matrices:
        route = find_route(unit, m, n, resolved)
        most = max((low.rank for low in unit.change.lows), default=min(m, n)) if unit.change else min(m, n)
        full = most if route == "factors" else min(m, n)
        # A rule that looks at the singular values is taken for a half.
        k = {"ratio": max(1, round(resolved.rank_ratio * full)), "fixed": min(resolved.rank or full, full)}
        yield route, max(m, n), min(m, n), most // 2 if route == "factors" else k.get(resolved.rank_rule, full // 2)


class Tally:
    """Seconds of the units that a run has worked on, for the rates that it leaves."""

    def __init__(self, spec: EditSpec) -> None:
        self.spec = spec
        self.sums: dict[tuple[str, float], list[float]] = {}  # route and size -> operations and seconds

    def add(self, unit: Unit, seconds: float) -> None:
        """A worker took so many seconds for a unit."""
        tasks = list(list_tasks(unit, self.spec))
        flops = [ROUTES[route](m, n, k) for route, m, n, k in tasks]
        for (route, m, n, _), count in zip(tasks, flops, strict=True):
            sums = self.sums.setdefault((route, measure_size(m, n)), [0.0, 0.0])
            sums[0] += count
            sums[1] += seconds * count / sum(flops)

    def find_points(self, wall: float) -> dict[str, tuple[tuple[float, float], ...]]:
        """Operations a second of all workers together, by route and size, where all took `wall` seconds.

        What took less than LEAST_SECONDS in all tells little, and is left out.
        """
        total = sum(seconds for _, seconds in self.sums.values())
        points: dict[str, list[tuple[float, float]]] = {}
        for (route, size), (flops, seconds) in self.sums.items():
            if wall * seconds / total > LEAST_SECONDS:
                points.setdefault(route, []).append((size, flops * total / (seconds * wall)))
        return {route: tuple(sorted(found)) for route, found in points.items()}
