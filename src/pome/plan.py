"""Which matrices to edit, which to keep and why, how many bytes move; reads no tensor data and loads no torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pome.checkpoint.adapter import Change
from pome.checkpoint.fitting import read_adapter
from pome.checkpoint.header import DTYPE_BITS, Header, build_header, parse_header
from pome.checkpoint.source import Checkpoint
from pome.errors import PairingError, SelectionError, printable
from pome.pairing import pair_names
from pome.quantization import declared_method, find_quantized
from pome.roles import Layout, Part, describe, matrix_shape
from pome.selection import EDITABLE, explain_empty, refuse_quantized, select
from pome.spec import EditSpec

STORED_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
TORCH_BYTES = 350 << 20  # the resident size of a process that has imported torch and computed once


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
    change: Change | None = None  # an adapter's: then all else that is said of FT here is BASE's

    @property
    def key(self) -> str:
        return self.name if self.expert is None else f"{self.name}#{self.expert}"

    def label(self, part: Part) -> str | None:
        """The manifest's `part`: None for a whole 2-D tensor, else such as `expert=3,half=up`."""
        labels = [f"expert={self.expert}" if self.expert is not None else None, part.label]
        return ",".join(label for label in labels if label) or None


@dataclass(frozen=True)
class Kept:
    """A tensor (or one matrix in it) that the selection matched but that is not edited."""

    name: str
    reason: str
    part: str | None = None


@dataclass(frozen=True)
class Plan:
    """What an edit will do. `layouts` holds the new header of every file whose layout changes (`--dtype`)."""

    units: tuple[Unit, ...]
    kept: tuple[Kept, ...]
    pairs: dict[str, str]
    matched: int
    tensor_count: int
    layouts: dict[str, tuple[bytes, Header]]
    merged: tuple[str, ...] = ()  # tensors that an adapter changes and that are, wholly or in part, not edited

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
        """Expected peak of resident memory in bytes: torch, two units in flight, and the workspace of the largest."""
        work = 0
        for unit, part in self.matrices():
            m, n = fan_out_in(unit, part)
            short = min(m, n)
            wide = 8 if "F64" in (unit.dtype, unit.base_dtype) else 4
            # delta, edit, polar factor and its product on the long side; eigenvectors and workspace on the short one
            work = max(work, 4 * wide * m * n + 5 * 8 * short * short + 2 * (unit.nbytes + unit.base_nbytes))
        # An adapter's other tensors are merged: their change and the sum in float32, beside the bytes of two units.
        work = max([work, *(6 * unit.nbytes + 2 * unit.base_nbytes for unit in self.units if not unit.parts)])
        return TORCH_BYTES + work

    def to_json(self) -> dict[str, Any]:
        """The document of `--dry-run --json`."""
        edit = [
            {
                "name": unit.name,
                "part": unit.label(part),
                "file": unit.file,
                "role": part.role,
                "shape": list(fan_out_in(unit, part)),
                "dtype": unit.out_dtype,
            }
            for unit, part in self.matrices()
        ]
        keep = [{"name": kept.name, "part": kept.part, "reason": kept.reason} for kept in self.kept]
        totals = {"bytes_read": self.bytes_read, "bytes_written": self.bytes_written, "memory_bytes": self.memory}
        return {"edit": edit, "keep": keep, **totals}


def fan_out_in(unit: Unit, part: Part) -> tuple[int, int]:
    """(fan_out, fan_in) of a part's matrix, after transposition."""
    return matrix_shape(Layout(unit.parts, unit.transposed), part, unit.shape)


def make_plan(base: Checkpoint, ft: Checkpoint, spec: EditSpec) -> Plan:
    """Match the selection against FT, pair with BASE, and decide edit or keep for each tensor.

    Raises SelectionError when nothing can be edited, PairingError when a pair disagrees in shape or orientation.
    """
    if base.adapter_config is not None:
        raise PairingError(f"{printable(base.source)}: an adapter; give as BASE the model that it was trained on")
    if ft.adapter_config is not None:
        return _plan_adapter(base, ft, spec)
    if spec.out_format == "adapter":
        raise PairingError(
            f"{printable(ft.source)}: a full checkpoint, of which no adapter is made; leave --out-format at full"
        )
    ft_shapes = {name: entry.shape for name, (_, entry) in ft.tensors.items()}
    base_shapes = {name: entry.shape for name, (_, entry) in base.tensors.items()}
    pairs = pair_names(base_shapes, ft_shapes)
    for side in (ft, base):
        refuse_quantized(side, spec)
    chosen = list(select(ft, spec))
    if not chosen:
        raise SelectionError(explain_empty(ft, spec))
    kept: list[Kept] = []
    edits: list[tuple[str, Layout]] = []
    for name, layout in chosen:
        reason = _find_obstacle(name, layout, base, ft, pairs, spec)
        if reason is None:
            edits.append((name, layout))
        else:
            kept.append(Kept(name, reason))
    if not edits:
        reasons = Counter(item.reason for item in kept)
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise SelectionError(
            f"{printable(ft.source)}: {len(kept)} tensors match, but none can be edited ({listed}); "
            f"is {printable(base.source)} the model that this one was trained from?"
        )
    out_dtypes = {} if spec.dtype == "keep" else {name: STORED_NAMES[spec.dtype] for name, _ in edits}
    for name in out_dtypes:
        if ft.tensors[name][1].shape != base.tensors[pairs[name]][1].shape:
            raise PairingError(f"{ft.where(name)}: only its common rows are edited; leave --dtype at keep for that")
    layouts = _lay_out(ft, out_dtypes)
    units = [unit for name, layout in edits for unit in _split(name, layout, pairs[name], base, ft, layouts)]
    units.sort(key=lambda unit: (unit.file, unit.start))
    return Plan(tuple(units), tuple(kept), pairs, len(chosen), len(ft.tensors), layouts)


def check_overrides(plan: Plan, spec: EditSpec) -> None:
    """Raise SelectionError for an override that no edited tensor's name matches: a slip of its pattern."""
    for override in spec.overrides:
        if not any(re.search(override.match, unit.name) for unit in plan.units if unit.parts):
            raise SelectionError(
                f"overrides: {printable(override.match)!r} matches no edited tensor; --dry-run --json lists their names"
            )


def _plan_adapter(base: Checkpoint, ft: Checkpoint, spec: EditSpec) -> Plan:
    """The plan for an adapter as FT: BASE's tensors that it changes, the selected ones edited, the others merged."""
    quantized = find_quantized(base.tensors, base.config)
    method = declared_method(base.config) or (quantized[0].format if quantized else None)
    if method:
        raise PairingError(
            f"{printable(base.source)}: quantized ({method}), and an adapter cannot be merged into that; give the "
            "unquantized model that it was quantized from as BASE"
        )
    changes = read_adapter(ft, base)
    for name in changes:
        _, entry = base.tensors[name]
        if entry.dtype not in EDITABLE:
            raise PairingError(
                f"{base.where(name)}: stored as {entry.dtype}, and an adapter cannot be merged into that; give the "
                "unquantized model as BASE"
            )
    pairs = {name: name for name in base.tensors}
    chosen = list(select(base, spec))
    if not chosen:
        raise SelectionError(explain_empty(base, spec))
    kept: list[Kept] = []
    edits: dict[str, Layout] = {}
    for name, layout in chosen:
        reason = "the adapter does not change it"
        if name in changes:
            reason = _find_obstacle(name, layout, base, base, pairs, spec) or ""
        if not reason and spec.out_format == "adapter":
            reason = _find_obstacle_in_adapter(changes[name], ft) or ""
        if reason:
            kept.append(Kept(name, reason))
        else:
            edits[name] = layout
    if not edits:
        roles = Counter(
            part.role for name in changes for part in describe(name, base.tensors[name][1].shape, base.config).parts
        )
        said = ", ".join(f"{count} x {role}" for role, count in roles.most_common())
        raise SelectionError(
            f"{printable(ft.source)}: the adapter changes none of the {len(chosen)} tensors that match (it changes "
            f"{said}); choose of these with --layers"
        )
    if spec.out_format == "adapter":
        return _plan_edited_adapter(base, ft, spec, changes, edits, kept, len(chosen))
    out_dtypes = {} if spec.dtype == "keep" else dict.fromkeys(edits, STORED_NAMES[spec.dtype])
    layouts = _lay_out(base, out_dtypes)
    units = []
    merged = []
    for name, change in changes.items():
        shape = base.tensors[name][1].shape
        whole = describe(name, shape, base.config)
        layout = edits.get(name, Layout((), whole.transposed, len(shape) == 3))
        units += [replace(unit, change=change) for unit in _split(name, layout, name, base, base, layouts)]
        if name not in edits or set(layout.parts) != set(whole.parts):
            merged.append(name)
    units.sort(key=lambda unit: (unit.file, unit.start))
    return Plan(tuple(units), tuple(kept), pairs, len(chosen), len(base.tensors), layouts, tuple(sorted(merged)))


def _find_obstacle_in_adapter(change: Change, ft: Checkpoint) -> str | None:
    """Why a selected change cannot be edited inside the adapter, or None; an error where the user must decide."""
    if change.low is None or change.whole is not None:
        return "the adapter holds it whole, and it is copied so"
    if change.low.magnitude is not None:
        raise PairingError(
            f"{ft.where(change.low.magnitude)}: the edit of a DoRA is no DoRA; leave {printable(change.name)} out with "
            "--exclude, or write a full checkpoint (--out-format full)"
        )
    return None


def _plan_edited_adapter(
    base: Checkpoint,
    ft: Checkpoint,
    spec: EditSpec,
    changes: dict[str, Change],
    edits: dict[str, Layout],
    kept: list[Kept],
    matched: int,
) -> Plan:
    """The plan for an adapter as the output: units of the LoRAs with a selected matrix, in the adapter's own order."""
    edited = {change.low.a for name in edits if (change := changes[name]).low is not None}
    units = []
    for name, change in changes.items():
        if change.low is None or change.low.a not in edited:
            continue
        file, entry = ft.tensors[change.low.a]
        shape = base.tensors[name][1].shape
        layout = edits.get(name, Layout((), False, len(shape) == 3))
        dtype = entry.dtype if spec.dtype == "keep" else STORED_NAMES[spec.dtype]
        for unit in _split(name, layout, name, base, base, {}):
            size = change.low.rank * sum(unit.shape) * DTYPE_BITS[dtype] // 8  # at most: the kept directions are fewer
            size = size if unit.parts else 0
            units.append(
                replace(unit, change=change, file=file, out_dtype=dtype, out_nbytes=size, nbytes=size, base_nbytes=size)
            )
    order = {name: at for at, name in enumerate(sorted(edited, key=lambda name: ft.tensors[name][1].start))}
    units.sort(key=lambda unit: order[unit.change.low.a] if unit.change and unit.change.low else 0)
    return Plan(tuple(units), tuple(kept), {name: name for name in base.tensors}, matched, len(base.tensors), {})


def _find_obstacle(
    name: str, layout: Layout, base: Checkpoint, ft: Checkpoint, pairs: dict[str, str], spec: EditSpec
) -> str | None:
    """Why a selected tensor cannot be edited, or None. A pair that must fit and does not is an error."""
    _, entry = ft.tensors[name]
    where = ft.where(name)
    if len(entry.shape) < 2 or (len(entry.shape) > 2 and not layout.stacked):
        return f"not a matrix: its shape is {list(entry.shape)}"
    if not all(entry.shape):
        return "it is empty"
    if name not in pairs:
        return "BASE has no such tensor"
    _, base_entry = base.tensors[pairs[name]]
    roles = {part.role for part in layout.parts}
    if roles == {"other"} and entry.dtype in ("I64", "BOOL"):
        return f"it holds no weights ({entry.dtype})"  # positions and masks, which some checkpoints store
    for side, dtype in ((where, entry.dtype), (base.where(pairs[name]), base_entry.dtype)):
        if dtype not in EDITABLE:
            raise PairingError(
                f"{side}: stored as {dtype}, which cannot be edited; save the checkpoint in bfloat16 first, or leave "
                "the tensor out with --exclude"
            )
    if entry.shape != base_entry.shape:
        if roles <= {"embed", "head"}:
            if spec.common_rows and len(entry.shape) == 2 and entry.shape[1] == base_entry.shape[1]:
                return None
            return (
                f"its shape is {list(entry.shape)}, BASE's {list(base_entry.shape)} (another vocabulary; --common-rows "
                "edits the rows that both have)"
            )
        if roles == {"other"} and "other" in spec.layers:  # everything was asked for, not this tensor by a pattern
            return f"its shape is {list(entry.shape)}, BASE's {list(base_entry.shape)}"
        raise PairingError(
            f"{where}: its shape {list(entry.shape)} is not BASE's {list(base_entry.shape)}; is "
            f"{printable(base.source)} the model it was trained from? leave it out with --exclude to edit the others"
        )
    if base.config is not None and ft.config is not None:
        cuts = [describe(name, entry.shape, ft.config), describe(pairs[name], base_entry.shape, base.config)]
        if cuts[0] != cuts[1]:
            models = [printable(str((side.config or {}).get("model_type"))) for side in (ft, base)]
            raise PairingError(
                f"{where}: FT ({models[0]}) and BASE ({models[1]}) store it differently (orientation, heads, halves), "
                "though the shapes agree; convert one checkpoint to the other's architecture"
            )
    return None


def _split(
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


def _lay_out(ft: Checkpoint, out_dtypes: dict[str, str]) -> dict[str, tuple[bytes, Header]]:
    """New headers, from dtypes and shapes alone, of the files in which a tensor changes its dtype; order as in FT."""
    changed = {name for name, dtype in out_dtypes.items() if ft.tensors[name][1].dtype != dtype}
    layouts = {}
    for file in {ft.tensors[name][0] for name in changed}:
        header = ft.files[file].header
        ordered = sorted(header.tensors.values(), key=lambda entry: (entry.start, entry.end))
        entries = [(e.name, out_dtypes.get(e.name, e.dtype), e.shape) for e in ordered]
        raw = build_header(entries, header.metadata)
        data = sum(math.prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in entries)
        layouts[file] = raw, parse_header(raw[8:], len(raw) + data, file)
    return layouts
