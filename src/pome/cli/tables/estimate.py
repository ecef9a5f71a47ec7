"""Output of `pome estimate`: operations by route, bytes, memory, time."""

from __future__ import annotations

from pome.cli.tables.fitted import FittedTable
from pome.cli.tables.text import show_bytes, show_seconds
from pome.planning.estimate import Estimate


def make_route_table(cost: Estimate) -> FittedTable:
    """A row for each route: matrices, operations, time."""
    table = FittedTable("route", "matrices", "operations", "time", where="--json has them")
    for route, work in cost.routes.items():
        time = "-" if work.seconds is None else show_seconds(work.seconds)
        table.add_row(route, str(work.matrices), f"{work.flops:.2g}", time)
    return table


def describe_cost(cost: Estimate) -> list[str]:
    """Device, bytes, memory and time of an edit."""
    return [
        f"device {cost.device}",
        f"units: {show_bytes(cost.bytes_read)} to read, {show_bytes(cost.bytes_written)} to write",
        f"files: {show_bytes(cost.bytes_copied)} to copy, {show_bytes(cost.bytes_hashed)} to hash",
        f"memory: {show_bytes(cost.unit_memory)} for the largest unit, {show_bytes(cost.memory)} in all",
        describe_time(cost),
    ]


def describe_time(cost: Estimate) -> str:
    """The expected time and where its rates are from, or why there is none."""
    if cost.measured is None:
        return f"no time: nobody measured {cost.device}; --on this of `pome estimate` does"
    rates = f"rates of {cost.measured}"
    if cost.seconds is None:
        return f"no time: {', '.join(cost.unmeasured)} not measured ({rates})"
    names = ("start", "copy", "edit", "hash")
    parts = [f"{name} {show_seconds(getattr(cost, f'{name}_seconds'))}" for name in names]
    return f"expected time {show_seconds(cost.seconds)}: {', '.join(parts)} ({rates})"
