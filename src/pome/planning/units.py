"""Units of a plan, byte ranges that hold whole matrices, and the plan of what an edit does to them. No torch."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pome.checkpoint.header import DTYPE_BITS, Header, build_header, order_entries, parse_header
from pome.checkpoint.lora import AdapterChange, LowRank
from pome.checkpoint.source import Checkpoint
from pome.manifest import KeptRecord
from pome.planning.split import count_cores, find_threads, group_units
from pome.roles.layout import Block, Layout, Part, matrix_shape

STORED_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
Layouts = dict[str, tuple[bytes, Header]]  # file -> its new header, as bytes and read
Added = dict[str, list[tuple[str, str, tuple[int, ...]]]]  # file -> name, dtype and shape of tensors that FT lacks
BYTE_WORK = 32.0  # to read, merge or write a byte takes about as long as so many multiply-adds
FLOAT64_ENTRIES = 1 << 20  # entries of a matrix that is worked on in float64
TORCH_BYTES = 350 << 20  # the resident size of a process that has imported torch and computed once


@dataclass(frozen=True, slots=True)
class BaseRange:
    """Where BASE stores one matrix: a byte range of a tensor of its own, or of one that holds others beside it."""

    name: str
    dtype: str
    start: int
    nbytes: int
    shape: tuple[int, int]  # of the range, as stored
    block: Block | None  # which rows or columns of the range; None: all
    transposed: bool  # stored (in, out)


@dataclass(frozen=True, slots=True)
class Copy:
    """Where a tied weight is stored once more: its name, its file in the output, and the first byte there."""

    name: str
    file: str
    out_start: int


@dataclass(frozen=True, slots=True)
class Unit:
    """A contiguous byte range of one stored tensor that holds whole matrices: a 2-D tensor, or one expert of a 3-D one.

    Units are independent and idempotent: the same bytes go to the same range, in any order, any number of times.
    """

    name: str
    expert: int | None
    parts: tuple[Part, ...]  # the selected matrices, others in the range stay FT's
    transposed: bool
    shape: tuple[int, int]  # as stored
    file: str
    base_name: str
    dtype: str  # of FT, as are start and nbytes
    start: int
    nbytes: int
    base_dtype: str
    base_start: int
    base_nbytes: int
    out_dtype: str
    out_start: int
    out_nbytes: int
    # Where BASE stores the matrix of each part, if not in one range that is laid out as FT's. The fields of BASE above
    # then hold the first one's name and start, the widest dtype and the bytes of all.
    base_parts: tuple[BaseRange, ...] = ()
    change: AdapterChange | None = None  # the change of an adapter: then the fields of FT here describe BASE's tensor
    copies: tuple[Copy, ...] = ()  # of a tied weight: the same bytes go there

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """(file, first byte) of every range of the output that the unit's bytes go to."""
        return ((self.file, self.out_start), *((copy.file, copy.out_start) for copy in self.copies))

    @property
    def key(self) -> str:
        return json.dumps([self.name, self.expert])  # a name may hold any character: no two units share a key

    @property
    def work(self) -> float:
        """What the unit costs beside others, for an estimate of the time left: m n min(m, n) of each matrix, and the
        bytes that are moved."""
        return sum(m * n * min(m, n) for m, n in self.matrices) + BYTE_WORK * (
            self.nbytes + self.base_nbytes + self.out_nbytes
        )

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(fan_out, fan_in) of each part."""
        return [fan_out_in(self, part) for part in self.parts]

    @property
    def workspace(self) -> int:
        """Expected bytes of memory that a worker takes at it: the unit, the next one that is read, and what is
        computed."""
        stored = 8 if "F64" in (self.dtype, self.base_dtype) else 4
        work = 0
        for m, n in self.matrices:
            wide = 8 if m * n <= FLOAT64_ENTRIES else stored
            # delta, edit, polar factor and its product on the long side, in float32 sums over them too; eigenvectors
            # and workspace on the short one
            work = max(work, (5 if wide == 4 else 4) * wide * m * n + 5 * 8 * min(m, n) ** 2)
        # An adapter's other tensors are merged: their change and the sum in float32.
        return (work or 4 * self.nbytes) + 2 * (self.nbytes + self.base_nbytes)

    def count_threads(self, cores: int) -> int:
        """Threads that the unit is worked on with, of so many cores."""
        return find_threads(max(map(min, self.matrices), default=0), self.workspace, cores)

    def label(self, part: Part) -> str | None:
        """The manifest's `part`: None for a whole 2-D tensor, else such as `expert=3,half=up`."""
        labels = [f"expert={self.expert}" if self.expert is not None else None, part.label]
        return ",".join(label for label in labels if label) or None


@dataclass(frozen=True)
class Plan:
    """What an edit will do. `layouts` holds the new header of every file whose layout changes (`--dtype`)."""

    units: tuple[Unit, ...]
    kept: tuple[KeptRecord, ...]
    tensor_count: int
    layouts: dict[str, tuple[bytes, Header]]
    merged: tuple[str, ...] = ()  # tensors that an adapter changes and that are, wholly or in part, not edited
    loras: tuple[LowRank, ...] = ()  # of an adapter as the output: all that it has
    notes: tuple[str, ...] = ()  # what a user should know of these inputs
    by_equivalence: bool = False  # whether some matrix is edited by that method, which works in float64

    def matrices(self) -> Iterator[tuple[Unit, Part]]:
        return ((unit, part) for unit in self.units for part in unit.parts)

    @property
    def bytes_read(self) -> int:
        return sum(unit.base_nbytes + (0 if unit.change else unit.nbytes) for unit in self.units)

    @property
    def bytes_written(self) -> int:
        return sum(unit.out_nbytes for unit in self.units)

    @property
    def memory(self) -> int:
        """Expected peak of resident memory in bytes, on this machine's cores."""
        return self.expect_memory(count_cores())

    def expect_memory(self, cores: int) -> int:
        """Expected peak of resident memory in bytes: torch, and the workspaces of what so many cores do side by
        side."""
        most = 0
        for threads, units in group_units(self.units, cores):
            most = max(most, sum(heapq.nlargest(cores // threads, map(self._expect_workspace, units))))
        return TORCH_BYTES + most

    def _expect_workspace(self, unit: Unit) -> int:
        if not self.by_equivalence:
            return unit.workspace
        # In float64: both weights, singular vectors and the product; eigenvectors and workspace on the short side.
        work = max((7 * 8 * m * n + 5 * 8 * min(m, n) ** 2 for m, n in unit.matrices), default=0)
        return max(unit.workspace, work + 2 * (unit.nbytes + unit.base_nbytes))

    def to_json(self) -> dict[str, Any]:
        """The document of `--dry-run --json`."""
        edit = []
        for unit, part in self.matrices():
            entry = {
                "name": unit.name,
                "part": unit.label(part),
                "file": unit.file,
                "role": part.role,
                "shape": list(fan_out_in(unit, part)),
                "dtype": unit.out_dtype,
            }
            base_name = unit.base_parts[unit.parts.index(part)].name if unit.base_parts else unit.base_name
            edit.append(entry if base_name == unit.name else {**entry, "base": base_name})
        keep = [{"name": kept.name, "part": kept.part, "reason": kept.reason} for kept in self.kept]
        totals = {"bytes_read": self.bytes_read, "bytes_written": self.bytes_written, "memory_bytes": self.memory}
        return {"edit": edit, "keep": keep, **totals}


def fan_out_in(unit: Unit, part: Part) -> tuple[int, int]:
    """(fan_out, fan_in) of a part's matrix, after transposition."""
    return matrix_shape(Layout(unit.parts, unit.transposed), part, unit.shape)


def split_units_across(
    name: str,
    layout: Layout,
    found: Mapping[tuple[int | None, Part], BaseRange],
    ft: Checkpoint,
    layouts: dict[str, tuple[bytes, Header]],
) -> Iterator[Unit]:
    """The units of one tensor whose matrices BASE stores in another way; parts that BASE lacks are left out."""
    for unit in split_units(name, layout, name, ft, ft, layouts):
        parts = tuple(part for part in layout.parts if (unit.expert, part) in found)
        ranges = tuple(found[unit.expert, part] for part in parts)
        if parts:
            dtypes = {lies.dtype for lies in ranges}
            yield replace(
                unit,
                parts=parts,
                base_name=ranges[0].name,
                base_dtype=dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32",
                base_start=ranges[0].start,
                base_nbytes=sum({(lies.name, lies.start): lies.nbytes for lies in ranges}.values()),
                base_parts=ranges,
            )


def split_units(
    name: str,
    layout: Layout,
    base_name: str,
    base: Checkpoint,
    ft: Checkpoint,
    layouts: dict[str, tuple[bytes, Header]],
) -> Iterator[Unit]:
    """The units of one tensor: itself, or each expert of a stack."""
    file, entry = ft.tensors[name]
    _, base_entry = base.tensors[base_name]
    out_entry = layouts[file][1].tensors[name] if file in layouts else entry
    count = entry.shape[0] if layout.stacked else 1
    shape = entry.shape[1:] if layout.stacked else entry.shape
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    # Resized embeddings share their first rows, and rows lie one after the other.
    rows = rows if entry.shape == base_entry.shape else min(rows, base_entry.shape[0])
    sizes = [rows * columns * DTYPE_BITS[e.dtype] // 8 for e in (entry, base_entry, out_entry)]
    for i in range(count):
        yield Unit(
            name=name,
            expert=i if layout.stacked else None,
            parts=layout.parts,
            transposed=layout.transposed,
            shape=(rows, columns),
            file=file,
            base_name=base_name,
            dtype=entry.dtype,
            start=entry.start + i * sizes[0],
            nbytes=sizes[0],
            base_dtype=base_entry.dtype,
            base_start=base_entry.start + i * sizes[1],
            base_nbytes=sizes[1],
            out_dtype=out_entry.dtype,
            out_start=out_entry.start + i * sizes[2],
            out_nbytes=sizes[2],
        )


def lay_out(ft: Checkpoint, out_dtypes: dict[str, str], added: Added | None = None) -> Layouts:
    """New headers, from dtypes and shapes alone, of the files whose layout changes.

    A layout changes where a tensor changes its dtype or where tensors are `added`.
    """
    changed = {name for name, dtype in out_dtypes.items() if ft.tensors[name][1].dtype != dtype}
    layouts = {}
    for file in {ft.tensors[name][0] for name in changed} | set(added or {}):
        header = ft.files[file].header
        given = [(e.name, out_dtypes.get(e.name, e.dtype), e.shape) for e in header.tensors.values()]
        entries = order_entries([*given, *(added or {}).get(file, [])])
        raw = build_header(entries, header.metadata)
        data = sum(math.prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in entries)
        layouts[file] = raw, parse_header(raw[8:], len(raw) + data, file)
    return layouts
