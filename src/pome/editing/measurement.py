"""Measurement of a device's rates: the edit of matrices by route and size, copies and hashes. It takes seconds."""

from __future__ import annotations

import datetime
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from itertools import repeat
from typing import NamedTuple

import torch

import pome
from pome.config.spec import EditSpec
from pome.editing.unit import TORCH_DTYPES, patch_unit, to_bytes
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
Sample = tuple[Unit, bytearray, bytearray]  # a unit, its bytes in FT and in BASE


class Timed(NamedTuple):
    """Seconds that a device takes for one unit, on the mean over all of its workers, and what solved it."""

    seconds: float
    solver: str


def make_sample(m: int, n: int, dtype: str = "BF16", seed: int = 0) -> Sample:
    """A unit of one m x n matrix whose delta has what those of fine-tuning have: strong directions over noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = (draw(m, n) * 0.02).to(TORCH_DTYPES[dtype])
    strong = min(64, min(m, n) // 4)
    left, right = draw(m, strong).div_(m**0.5), draw(n, strong).div_(n**0.5)
    ft = base.double() + 1e-4 * draw(m, n) + 0.5 * (left * torch.logspace(0, -2, strong)) @ right.T
    name, size = "layers.0.mlp.up_proj.weight", base.nbytes
    unit = Unit(
        name=name, expert=None, parts=(Part("up"),), transposed=False, shape=(m, n), file="model.safetensors",
        base_name=name, dtype=dtype, start=0, nbytes=size, base_dtype=dtype, base_start=0, base_nbytes=size,
        out_dtype=dtype, out_start=0, out_nbytes=size,
    )  # fmt: skip
    return unit, to_bytes(ft.to(TORCH_DTYPES[dtype])), to_bytes(base)


def time_units(sample: Sample, devices: list[str], threads: int, count: int) -> Timed:
    """The edit of `count` units like the sample in memory, by a worker for each of `devices`."""
    unit, ft, base = sample
    spec = EditSpec()

    def read(_: Unit) -> tuple[bytearray, bytearray]:
        return bytearray(ft), base

    def work(unit: Unit, data: tuple[bytearray, bytearray], device: str) -> str:
        torch.set_num_threads(threads)
        return patch_unit(unit, *data, spec, device).tensors[0].solver

    before, begun = torch.get_num_threads(), time.perf_counter()
    solvers = list(map_units(list(repeat(unit, count)), devices, read, work))
    seconds = time.perf_counter() - begun
    torch.set_num_threads(before)
    return Timed(seconds / count, solvers[-1])


def measure_shapes(
    shapes: Iterable[tuple[int, int, str]], devices: list[str], cores: int, until: float
) -> dict[str, Points]:
    """Operations a second by route and size, of matrices m x n stored in a dtype, until the monotonic time `until`.

    On the CPU by the split of its cores. Each is the best of ROUNDS: what disturbs a round only makes it longer.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for m, n, dtype in shapes:
        if time.monotonic() > until:
            break
        sample = make_sample(m, n, dtype)
        threads = sample[0].count_threads(cores) if devices == ["cpu"] else cores
        workers = ["cpu"] * (cores // threads) if devices == ["cpu"] else devices
        best = time_units(sample, workers, threads, len(workers)).seconds  # the first loads what torch needs
        count = len(workers) * max(1, round(ROUND_SECONDS / best / len(workers)))
        for _ in range(ROUNDS):
            if time.monotonic() < until:
                best = min(best, time_units(sample, workers, threads, count).seconds)
        for route, long, short, k in list_tasks(sample[0], EditSpec()):
            rate = ROUTES[route](long, short, k) / best
            points.setdefault(route, []).append((measure_size(long, short), rate))
    return {route: tuple(sorted(found)) for route, found in points.items()}


def shrink(m: int, n: int) -> tuple[int, int]:
    """The shape that is measured in the place of a large one: a short side of at most MOST_SIDE, the same ratio."""
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


def measure_device(
    shapes: Iterable[tuple[int, int, str]], devices: list[str], cores: int, folder: str, seconds: float
) -> Rates:
    """The rates of this machine's devices for edits of such matrices, in about so many seconds.

    `startup_seconds` is for the caller to fill in, who saw torch load.
    """
    until = time.monotonic() + seconds
    return Rates(
        f"{datetime.date.today().isoformat()}, by pome {pome.__version__} with torch {torch.__version__}",
        copy_bytes=measure_copy(folder),
        hash_bytes=measure_hash(cores),
        routes=measure_shapes(shapes, devices, cores, until),
    )
