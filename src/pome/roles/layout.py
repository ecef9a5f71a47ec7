"""The matrices of a stored tensor: rows, columns, orientation and stacking. No torch, no I/O.

For a stored 2-D tensor `t` (or one expert of a stacked 3-D one), the matrix of a part is

    axis, count, period, start, size = part.block  # None: the whole of t
    x = t.unflatten(axis, (count, period)).narrow(axis + 1, start, size).flatten(axis, axis + 1)
    W = x.T if layout.transposed else x  # (fan_out, fan_in)

The parts of a layout share no entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """Which rows (axis 0) or columns (axis 1) of a stored 2-D tensor belong to one matrix.

    The axis is read as `count` groups of `period` entries; of each group the entries `start : start + size` are
    taken. A contiguous half is count=1; gpt-oss's interleaved columns `1::2` are count=F, period=2, start=1,
    size=1; the queries of GPT-NeoX's per-head q, k, v are count=heads, period=3*head_dim, start=0, size=head_dim.
    """

    axis: int
    count: int
    period: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix inside a stored 2-D tensor (or inside every expert of a 3-D one)."""

    role: str
    label: str | None = None  # None for a whole matrix, else such as "half=up" or "qkv=q"
    block: Block | None = None  # None: every row and column


@dataclass(frozen=True, slots=True)
class Layout:
    """How one stored tensor splits into matrices.

    Two layouts of the same tensor are equal exactly when both sides split it the same way, so a base and a
    fine-tuned checkpoint whose configs disagree (a square weight stored (in, out) on one side and (out, in) on
    the other, other head counts, other halves) are told apart by `base_layout != ft_layout`.
    """

    parts: tuple[Part, ...]
    transposed: bool = False  # stored (in, out): the matrix is the transpose of what is stored
    stacked: bool = False  # 3-D, experts first: every expert holds these parts


OTHER = Layout((Part("other"),))  # what no rule knows


def matrix_shape(layout: Layout, part: Part, shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan_out, fan_in) of the matrix of `part` in a tensor stored with `shape`: 2-D, or 3-D when stacked."""
    rows, columns = shape[-2:]
    if part.block is not None:
        taken = part.block.count * part.block.size
        rows, columns = (taken, columns) if part.block.axis == 0 else (rows, taken)
    return (columns, rows) if layout.transposed else (rows, columns)


def split_runs(axis: int, count: int, sizes: dict[str, int], key: str) -> tuple[Part, ...]:
    """Parts that follow each other in each of `count` groups along `axis`; `sizes` is role -> entries a group."""
    period, start, parts = sum(sizes.values()), 0, []
    for role, size in sizes.items():
        parts.append(Part(role, f"{key}={role}", Block(axis, count, period, start, size)))
        start += size
    return tuple(parts)
