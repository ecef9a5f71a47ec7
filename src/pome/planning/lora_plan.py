"""The plan where FT is an adapter: what is edited, what is merged, and what an edited adapter holds. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from pome.checkpoint.header import DTYPE_BITS
from pome.checkpoint.lora import AdapterChange
from pome.checkpoint.lora_match import read_adapter
from pome.checkpoint.quantization import declared_method, find_quantized
from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import PairingError, SelectionError, printable
from pome.manifest import KeptRecord
from pome.planning.obstacles import find_obstacle
from pome.planning.selection import EDITABLE, explain_empty, find_tensor_layouts, select
from pome.planning.units import STORED_NAMES, Plan, lay_out, split_units
from pome.roles.layout import Layout


def plan_adapter(base: Checkpoint, ft: Checkpoint, spec: EditSpec) -> Plan:
    """The plan for an adapter as FT: BASE's tensors that it changes, the selected ones edited, the others merged."""
    quantized = find_quantized(base.tensors, base.config)
    method = declared_method(base.config) or (quantized[0].format if quantized else None)
    if method:
        raise PairingError(
            f"{printable(base.source)}: quantized ({method}), and an adapter cannot be merged into that; give the "
            "unquantized model that it was quantized from as BASE"
        )
    changes = read_adapter(ft, base, merges=spec.out_format == "full")
    for name in changes:
        _, entry = base.tensors[name]
        if entry.dtype not in EDITABLE:
            raise PairingError(
                f"{base.where(name)}: stored as {entry.dtype}, and an adapter cannot be merged into that; give the "
                "unquantized model as BASE"
            )
    pairs = {name: name for name in base.tensors}
    described = find_tensor_layouts(base)
    chosen = list(select(base, spec))
    if not chosen:
        raise SelectionError(explain_empty(base, spec))
    kept: list[KeptRecord] = []
    edits: dict[str, Layout] = {}
    for name, layout in chosen:
        reason = "the adapter does not change it"
        if name in changes:
            reason = find_obstacle(name, layout, base, base, pairs, spec) or ""
        if not reason and spec.out_format == "adapter":
            reason = _find_obstacle_in_adapter(changes[name], ft) or ""
        if reason:
            kept.append(KeptRecord(name, None, reason))
        else:
            edits[name] = layout
    if not edits:
        roles = Counter(part.role for name in changes for part in described[name].parts)
        said = ", ".join(f"{count} x {role}" for role, count in roles.most_common())
        raise SelectionError(
            f"{printable(ft.source)}: the adapter changes none of the {len(chosen)} tensors that match (it changes "
            f"{said}); choose of these with --layers"
        )
    if spec.out_format == "adapter":
        return _plan_edited_adapter(base, ft, spec, changes, edits, kept)
    out_dtypes = {} if spec.dtype == "keep" else dict.fromkeys(edits, STORED_NAMES[spec.dtype])
    layouts = lay_out(base, out_dtypes)
    units = []
    merged = []
    for name, change in changes.items():
        shape = base.tensors[name][1].shape
        whole = described[name]
        layout = edits.get(name, Layout((), whole.transposed, len(shape) == 3))
        units += [replace(unit, change=change) for unit in split_units(name, layout, name, base, base, layouts)]
        if name not in edits or set(layout.parts) != set(whole.parts):
            merged.append(name)
    units.sort(key=lambda unit: (unit.file, unit.start))
    return Plan(tuple(units), tuple(kept), len(base.tensors), layouts, tuple(sorted(merged)))


def _find_obstacle_in_adapter(change: AdapterChange, ft: Checkpoint) -> str | None:
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
    changes: dict[str, AdapterChange],
    edits: dict[str, Layout],
    kept: list[KeptRecord],
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
        for unit in split_units(name, layout, name, base, base, {}):
            size = change.low.rank * sum(unit.shape) * DTYPE_BITS[dtype] // 8  # at most: the kept directions are fewer
            size = size if unit.parts else 0
            units.append(
                replace(unit, change=change, file=file, out_dtype=dtype, out_nbytes=size, nbytes=size, base_nbytes=size)
            )
    order = {name: at for at, name in enumerate(sorted(edited, key=lambda name: ft.tensors[name][1].start))}
    units.sort(key=lambda unit: order[unit.change.low.a] if unit.change and unit.change.low else 0)
    return Plan(tuple(units), tuple(kept), len(base.tensors), {})
