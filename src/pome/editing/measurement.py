"""Measurement of a device's rates: the seconds of an edit by route and size, of copies, hashes and the start."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from itertools import repeat
from typing import NamedTuple

import torch

from pome.config.spec import EditSpec
from pome.editing.unit import TORCH_DTYPES, patch_unit, to_bytes
from pome.engines.local import map_units
from pome.planning.units import Unit
from pome.roles.layout import Part

STORED = {"F32": 4, "BF16": 2, "F64": 8}
Sample = tuple[Unit, bytearray, bytearray]  # a unit, its bytes in FT and in BASE


def make_sample(m: int, n: int, dtype: str = "BF16", seed: int = 0) -> Sample:
    """A unit of one m x n matrix whose delta has what those of fine-tuning have: strong directions over noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = (draw(m, n) * 0.02).to(TORCH_DTYPES[dtype])
    strong = min(64, min(m, n) // 4)
    left, right = draw(m, strong).div_(m**0.5), draw(n, strong).div_(n**0.5)
    ft = base.double() + 1e-4 * draw(m, n) + (left * torch.logspace(-0.3, -2.3, strong)) @ right.T
    size = m * n * STORED[dtype]
    name = "model.layers.0.mlp.up_proj.weight"
    unit = Unit(
        name, None, (Part("up"),), False, (m, n), "model.safetensors", name, dtype, 0, size, dtype, 0, size, dtype, 0,
        size,
    )  # fmt: skip
    return unit, to_bytes(ft.to(TORCH_DTYPES[dtype])), to_bytes(base)


class Timed(NamedTuple):
    """Seconds that a device takes for one unit, on the mean over all of its workers, and what solved it."""

    seconds: float
    solver: str


def time_units(sample: Sample, devices: list[str], threads: int, count: int) -> Timed:
    """The edit of `count` units like the sample, by a worker for each of `devices`, in memory."""
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
