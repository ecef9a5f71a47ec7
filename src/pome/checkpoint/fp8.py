"""Dequantized view of fp8 weights with block scales: a file that reads as bfloat16.

Each weight W (m x n, or E x m x n) is stored as Q in fp8 beside `NAME_scale_inv`, S, with one scale for each block:
W[i, j] = Q[i, j] * S[i // b, j // c], b x c the `weight_block_size` of the config (DeepSeek-V3's layout; its own
conversion to bfloat16 does the same). Where S has one entry for the whole tensor, or for each expert, W = Q * S.
Nothing is written for it: ranges are dequantized when they are read.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pome.checkpoint.files import File, read_range
from pome.checkpoint.header import Header, TensorEntry, build_header, order_entries, parse_header
from pome.errors import CheckpointError, printable

SUFFIX = "_scale_inv"
DEFAULT_BLOCK = (128, 128)
CODES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
SCALE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PIECE = 8 << 20  # bytes of bfloat16 made in one go


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in its file."""

    file: File
    entry: TensorEntry


@dataclass(frozen=True)
class Scaled:
    """An fp8 weight with its scales, both as stored, and the size of a block (None: the whole matrix)."""

    codes: Stored
    scales: Stored
    block: tuple[int, int] | None


def find_scaled(tensors: Mapping[str, Stored], config: Mapping[str, Any] | None) -> dict[str, Scaled]:
    """Every fp8 weight of a checkpoint with its scales. Raises CheckpointError where scales and weight do not fit."""
    found = {}
    for name, codes in tensors.items():
        scales = tensors.get(name + SUFFIX)
        if scales is None or codes.entry.dtype not in CODES:
            continue
        block = _read_block(config)
        *stack, m, n = (1, 1, *codes.entry.shape)
        expected = (*stack[2:], -(-m // block[0]), -(-n // block[1]))
        matrix, known = len(codes.entry.shape) >= 2, scales.entry.dtype in SCALE_DTYPES
        if matrix and known and scales.entry.shape != expected and is_per_tensor(scales.entry.shape, codes.entry.shape):
            found[name] = Scaled(codes, scales, None)
            continue
        if not (matrix and known and scales.entry.shape == expected):
            raise CheckpointError(
                f"{scales.file.where}: tensor {printable(name + SUFFIX)}: {scales.entry.dtype} "
                f"{list(scales.entry.shape)} are not the scales of {list(codes.entry.shape)} in blocks of "
                f"{block[0]} x {block[1]}; check weight_block_size in config.json"
            )
        found[name] = Scaled(codes, scales, block)
    return found


def is_per_tensor(scales: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether scales of this shape are one for a whole weight, or one for each expert of a stack."""
    count = math.prod(scales)
    return count == 1 or (len(weight) == 3 and count == weight[0] == scales[0])


def list_gone(name: str) -> tuple[str, ...]:
    """Tensors beside an fp8 weight that its dequantized form does not have: its scales, and those of its input."""
    module = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    return name + SUFFIX, *(module + kind for kind in ("activation_scale", "input_scale"))


def _read_block(config: Mapping[str, Any] | None) -> tuple[int, int]:
    declared = (config or {}).get("quantization_config")
    size = declared.get("weight_block_size") if isinstance(declared, Mapping) else None
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        return size[0], size[1]
    return DEFAULT_BLOCK


class DequantizedFile:
    """A weight file whose fp8 weights read as BF16 and whose scales are gone. Use as any File."""

    path = None  # nothing on disk has these bytes
    sha256 = None

    def __init__(self, raw: File, header: Header, scaled: Mapping[str, Scaled], gone: set[str]) -> None:
        self.raw = raw
        self.where = raw.where
        self._old = header
        self._scaled = {name: scaled[name] for name in header.tensors if name in scaled}
        ordered = list(header.tensors.values())
        kept = order_entries(
            (e.name, "BF16" if e.name in self._scaled else e.dtype, e.shape) for e in ordered if e.name not in gone
        )
        self._head = build_header(kept, header.metadata)
        grown = sum(self._scaled[name].codes.entry.nbytes for name in self._scaled)  # one byte a weight becomes two
        lost = sum(entry.nbytes for entry in ordered if entry.name in gone)
        self.size = len(self._head) + header.file_size - header.data_start + grown - lost
        self.header = parse_header(self._head[8:], self.size, raw.where)
        self._order = [self.header.tensors[name] for name, _, _ in kept]
        self._starts = [entry.start for entry in self._order]

    @property
    def stored(self) -> Path | None:
        return self.raw.stored

    @property
    def identity(self) -> list[Any]:
        return [*self.raw.identity, "dequantized"]

    def read_into(self, view: memoryview, at: int) -> int:
        if at < len(self._head):
            piece = self._head[at : at + len(view)]
            view[: len(piece)] = piece
            return len(piece)
        if at >= self.size:
            return 0
        # The last entry that starts at or before `at`: of those that start together all but the last are empty.
        entry = self._order[bisect.bisect_right(self._starts, at) - 1]
        count = min(len(view), entry.end - at)
        if entry.name not in self._scaled:
            return self.raw.read_into(view[:count], self._old.tensors[entry.name].start + at - entry.start)
        piece = _dequantize(self._scaled[entry.name], at - entry.start, min(count, _PIECE))
        view[: len(piece)] = piece
        return len(piece)

    def check_unchanged(self) -> None:
        self.raw.check_unchanged()

    def close(self) -> None:
        self.raw.close()


def _dequantize(weight: Scaled, at: int, count: int) -> bytes:
    """`count` bytes of a weight in bfloat16, from byte `at` of it: the rows that they lie in, dequantized and cut."""
    import torch

    entry, block = weight.codes.entry, weight.block
    m, n = entry.shape[-2:]
    first, last = at // (2 * n), -(-(at + count) // (2 * n))  # rows, counted through all experts
    codes = read_range(weight.codes.file, entry.start + first * n, (last - first) * n, printable(entry.name))
    Q = torch.frombuffer(codes, dtype=getattr(torch, CODES[entry.dtype])).reshape(-1, n)
    S = _read_scales(weight.scales)
    rows = torch.arange(first, last)
    if block is None:
        each = S.flatten()
        W = (Q.float() * each[rows // m if len(each) > 1 else rows * 0][:, None]).bfloat16()
        return _cut(W, at - 2 * n * first, count)
    per_expert = -(-m // block[0])
    index = torch.div(rows, m, rounding_mode="floor") * per_expert
    index += torch.div(rows % m, block[0], rounding_mode="floor")
    spread = S[index].repeat_interleave(block[1], dim=1)[:, :n]
    W = (Q.float() * spread).bfloat16()
    return _cut(W, at - 2 * n * first, count)


def _cut(W: Any, skip: int, count: int) -> bytes:
    """`count` bytes of bfloat16 entries, after the first `skip`."""
    import torch

    out = bytearray(2 * W.numel())
    torch.frombuffer(out, dtype=torch.bfloat16).copy_(W.reshape(-1))
    return bytes(out[skip : skip + count])


@functools.lru_cache(maxsize=4)  # a weight is read in several pieces
def _read_scales(scales: Stored) -> Any:
    """S as a float32 matrix, the blocks of all experts below each other."""
    import torch

    entry = scales.entry
    data = read_range(scales.file, entry.start, entry.nbytes, printable(entry.name))
    dtype = getattr(torch, SCALE_DTYPES[entry.dtype])
    width = entry.shape[-1] if entry.shape else 1
    return torch.frombuffer(data, dtype=dtype).float().reshape(-1, width)
