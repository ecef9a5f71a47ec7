"""Units made by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

from pome.planning.units import Unit
from pome.roles.layout import Part

UP = Part("up")


def make_unit(shape: tuple[int, int] = (40, 16), dtypes: tuple[str, str, str] = ("F32",) * 3, **changes: Any) -> Unit:
    """A unit of FT, BASE and OUT in these dtypes, at offsets that differ."""
    sizes = [shape[0] * shape[1] * {"F64": 8, "F32": 4, "BF16": 2}[dtype] for dtype in dtypes]
    unit = Unit(
        name="w", expert=None, parts=(UP,), transposed=False, shape=shape, file="f", base_name="b",
        dtype=dtypes[0], start=100, nbytes=sizes[0],
        base_dtype=dtypes[1], base_start=200, base_nbytes=sizes[1],
        out_dtype=dtypes[2], out_start=300, out_nbytes=sizes[2],
    )  # fmt: skip
    return dataclasses.replace(unit, **changes)
