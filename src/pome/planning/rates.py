"""Rates of devices: those that earlier runs left in the user's cache, and the repository's table. No torch.

A device's record says when and how it was measured, how long torch takes to load, bytes a second of copies and hashes,
and for each route (`pome.planning.flops`) points of size and operations a second, all workers of the device together.
The size of a matrix is (m n min(m, n))^(1/3).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from pome.errors import SpecError, printable

FORMAT = 1
TABLE = "measured_devices.json"
NEAR = 1.1  # a point replaces those of its route whose size is within this factor

Points = tuple[tuple[float, float], ...]  # size, operations a second


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device; None and missing routes: not measured."""

    measured: str  # date, and how
    startup_seconds: float | None = None
    copy_bytes: float | None = None  # a second
    hash_bytes: float | None = None
    routes: Mapping[str, Points] = field(default_factory=dict)

    def find_rate(self, route: str, size: float) -> float | None:
        """Operations a second at a size, interpolated between the measured ones; at the ends the nearest one's."""
        points = sorted(self.routes.get(route, ()))
        if not points:
            return None
        below = [point for point in points if point[0] <= size] or points[:1]
        above = [point for point in points if point[0] >= size] or points[-1:]
        (s, low), (t, high) = below[-1], above[0]
        share = math.log(size / s) / math.log(t / s) if t > s else 0.0
        return math.pow(low, 1.0 - share) * math.pow(high, share)

    def update(self, newer: Rates) -> Rates:
        """These rates, with later measurements in the place of those that they replace."""
        routes = dict(self.routes)
        for route, points in newer.routes.items():
            old = [p for p in routes.get(route, ()) if not any(1 / NEAR < p[0] / q[0] < NEAR for q in points)]
            routes[route] = tuple(sorted([*old, *points]))
        given = {key: value for key, value in vars(newer).items() if value is not None and key != "routes"}
        return replace(self, **given, routes=routes)


def measure_size(m: int, n: int) -> float:
    """(m n min(m, n))^(1/3), by which rates are interpolated."""
    return math.pow(m * n * min(m, n), 1 / 3)


def find_cache() -> Path:
    """The user's file of rates: in $XDG_CACHE_HOME, else in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~/.cache"))
    return folder / "pome" / "rates.json"


def read_table() -> dict[str, Rates]:
    """The devices that were measured for the repository."""
    return _parse((resources.files("pome.planning") / TABLE).read_text("utf-8"))


def read_cache() -> dict[str, Rates]:
    """The devices of earlier runs; none where the file is missing or not what this release writes."""
    try:
        return _parse(find_cache().read_text("utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def find_rates(device: str) -> Rates | None:
    """The rates of a device, from earlier runs here and else from the table; None where it was never measured."""
    known = [devices[device] for devices in (read_table(), read_cache()) if device in devices]
    return known[0].update(known[-1]) if known else None


def match_device(text: str) -> str:
    """The one measured device whose name holds a text, in any case; the text itself where there is none.

    Raises SpecError where there are several.
    """
    names = sorted({*read_table(), *read_cache()})
    found = [name for name in names if text.lower() == name.lower()]
    found = found or [name for name in names if text.lower() in name.lower()]
    if len(found) > 1:
        named = "; ".join(map(printable, found))
        raise SpecError(f"on: {printable(text)!r} is in the names of {named}; give more of one", options=["on"])
    return found[0] if found else text


def leave_rates(device: str, rates: Rates) -> None:
    """Add what a run measured to the user's cache, in one rename. A cache that cannot be written is no error."""
    path = find_cache()
    try:
        devices = read_cache()
        devices[device] = devices.get(device, Rates("")).update(rates)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        scratch.write_text(to_json(devices), "utf-8")
        os.replace(scratch, path)
    except OSError:
        return


def to_json(devices: Mapping[str, Rates]) -> str:
    """The text of a file of rates."""
    rows = {name: asdict(rates) for name, rates in sorted(devices.items())}
    return json.dumps({"format": FORMAT, "devices": rows}, indent=1) + "\n"


def _parse(text: str) -> dict[str, Rates]:
    """The devices of a file of rates. Raises ValueError, TypeError, KeyError or AttributeError for another one."""
    document = json.loads(text)
    if document["format"] != FORMAT:
        raise ValueError("another format")
    return {name: _parse_device(**row) for name, row in document["devices"].items()}


def _parse_device(measured: str, routes: Mapping[str, Any], **numbers: Any) -> Rates:
    points = {route: tuple((_positive(s), _positive(r)) for s, r in rows) for route, rows in routes.items()}
    seconds = {key: None if value is None else _positive(value) for key, value in numbers.items()}
    return Rates(str(measured), routes=points, **seconds)


def _positive(value: Any) -> float:
    number = float(value)
    if not 0.0 < number < math.inf:
        raise ValueError("a rate is a positive number")
    return number
