"""Measurement of a device's rates: the edit of matrices by route and size, copies and hashes. It takes seconds."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from itertools import repeat
from typing import NamedTuple

import torch

import pome
from pome.checkpoint.lora import AdapterChange, AdapterSlice, LowRank
from pome.config.spec import EditSpec
from pome.editing.lora_merge import make_patch
from pome.editing.unit import TORCH_DTYPES, Patch, to_bytes
from pome.editing.workers import use_threads
from pome.engines.local import map_units
from pome.output.clone import copy_file
from pome.output.durable import sync_file
from pome.planning.estimate import list_tasks
from pome.planning.flops import ROUTES
from pome.planning.rates import Points, Rates, measure_size
from pome.planning.units import Unit
from pome.roles.layout import Part

FILE_BYTES = 128 << 20
MOST_SIDE = 2048  # of a matrix that is measured in seconds; beyond it rates hardly grow
ROUND_SECONDS = 0.5
ROUNDS = 3
MOST_PROBES = 6
Data = tuple[bytearray | dict[str, AdapterSlice], bytearray]  # of a unit, as it is read: of FT and of BASE


class Probe(NamedTuple):
    """What is measured: a matrix m x n stored in a dtype, edited from a full FT (rank 0), or by an adapter's factors of
    a rank, or only merged with them."""

    m: int
    n: int
    dtype: str = "BF16"
    rank: int = 0
    edited: bool = True


def make_sample(probe: Probe) -> tuple[Unit, Data]:
    """A unit and its data; a full delta has what those of fine-tuning have, strong directions over noise."""
    m, n, dtype, rank, edited = probe
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = (draw(m, n) * 0.02).to(TORCH_DTYPES[dtype])
    name, size = "layers.0.mlp.up_proj.weight", base.nbytes
    parts = (Part("up"),) if edited else ()
    unit = Unit(
        name=name, expert=None, parts=parts, transposed=False, shape=(m, n), file="model.safetensors",
        base_name=name, dtype=dtype, start=0, nbytes=size, base_dtype=dtype, base_start=0, base_nbytes=size,
        out_dtype=dtype, out_start=0, out_nbytes=size,
    )  # fmt: skip
    if rank:
        low = LowRank("up_proj", "a", "b", rank, 1.0, "linear", False)
        factors = {"a": draw(rank, n) * 0.01, "b": draw(m, rank) * 0.01}
        slices = {key: AdapterSlice("F32", tuple(A.shape), to_bytes(A)) for key, A in factors.items()}
        return dataclasses.replace(unit, change=AdapterChange(name, lows=(low,))), (slices, to_bytes(base))
    strong = min(64, min(m, n) // 4)
    left, right = draw(m, strong).div_(m**0.5), draw(n, strong).div_(n**0.5)
    ft = base.double() + 1e-4 * draw(m, n) + 0.5 * (left * torch.logspace(0, -2, strong)) @ right.T
    return unit, (to_bytes(ft.to(TORCH_DTYPES[dtype])), to_bytes(base))


def time_units(unit: Unit, data: Data, devices: list[str], threads: int, count: int) -> float:
    """Seconds a unit of the edit of `count` such units in memory, by a worker for each of `devices`."""
    spec = EditSpec()

    def read(_: Unit) -> Data:
        return bytearray(data[0]) if isinstance(data[0], bytearray) else data[0], data[1]

    def work(unit: Unit, data: Data, device: str) -> Patch:
        torch.set_num_threads(threads)
        return make_patch(unit, data, spec, device)

    with use_threads(torch.get_num_threads()):
        begun = time.perf_counter()
        for patch in map_units(list(repeat(unit, count)), devices, read, work):
            json.dumps([record.to_mapping() for record in patch.tensors])  # as the journal has it
        return (time.perf_counter() - begun) / count


def measure_routes(probes: Iterable[Probe], devices: list[str], cores: int, until: float) -> dict[str, Points]:
    """Operations a second by route and size, until the monotonic time `until`; on the CPU by the split of its cores.

    Each is the median of ROUNDS: a run will meet the same other work on the machine.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for probe in probes:
        if time.monotonic() > until:
            break
        unit, data = make_sample(probe)
        threads = unit.count_threads(cores) if devices == ["cpu"] else cores
        workers = ["cpu"] * (cores // threads) if devices == ["cpu"] else devices
        first = time_units(unit, data, workers, threads, len(workers))  # which loads what torch needs
        count = len(workers) * max(1, round(ROUND_SECONDS / first / len(workers)))
        rounds: list[float] = []
        while len(rounds) < ROUNDS and (not rounds or time.monotonic() < until):
            rounds.append(time_units(unit, data, workers, threads, count))
        seconds = statistics.median(rounds)
        for route, long, short, k in list_tasks(unit, EditSpec()):
            rate = ROUTES[route](long, short, k) / seconds
            points.setdefault(route, []).append((measure_size(long, short), rate))
    return {route: tuple(sorted(found)) for route, found in points.items()}


def choose_probes(units: Iterable[Unit]) -> list[Probe]:
    """Samples for the units of a plan: the shapes that cost most, each at a size that takes seconds at most."""
    costs: dict[Probe, float] = {}
    for unit in units:
        lows = unit.change.lows if unit.change else ()
        rank = max((low.rank for low in lows), default=0) if unit.change and unit.change.is_plain else 0
        for m, n in unit.matrices or ([unit.shape] if rank else []):
            probe = Probe(*shrink(max(m, n), min(m, n)), unit.dtype, rank, bool(unit.parts))
            costs[probe] = costs.get(probe, 0.0) + unit.work
    return sorted(costs, key=lambda probe: -costs[probe])[:MOST_PROBES]


def shrink(m: int, n: int) -> tuple[int, int]:
    """The shape measured in place of a large one: a short side of at most MOST_SIDE, and the same ratio."""
    factor = min(1.0, MOST_SIDE / min(m, n))
    return round(m * factor), round(n * factor)


def measure_copy(folder: str) -> float:
    """Bytes a second of a copy in a folder, synced to its disk."""
    with tempfile.TemporaryFile(dir=folder) as source, tempfile.TemporaryFile(dir=folder) as copy:
        source.write(os.urandom(1 << 20) * (FILE_BYTES >> 20))
        source.flush()
        sync_file(source.fileno())
        begun = time.perf_counter()
        copy_file(source.fileno(), copy.fileno(), FILE_BYTES, lambda _: None)
        sync_file(copy.fileno())
        return FILE_BYTES / (time.perf_counter() - begun)


def measure_hash(cores: int) -> float:
    """Bytes a second of SHA-256, two files at a time where there are two cores."""
    data = bytes(FILE_BYTES)
    begun = time.perf_counter()
    hashlib.sha256(data)
    return FILE_BYTES / (time.perf_counter() - begun) * min(2, cores)


def measure_device(probes: Iterable[Probe], devices: list[str], cores: int, folder: str, seconds: float) -> Rates:
    """The rates of this machine's devices for edits of such matrices, in about so many seconds.

    `startup_seconds` is for the caller to fill in, who saw torch load.
    """
    until = time.monotonic() + seconds
    return Rates(
        f"{datetime.date.today().isoformat()}, by pome {pome.__version__} with torch {torch.__version__}",
        copy_bytes=measure_copy(folder),
        hash_bytes=measure_hash(cores),
        routes=measure_routes(probes, devices, cores, until),
    )
