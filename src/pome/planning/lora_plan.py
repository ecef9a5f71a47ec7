"""The plan where FT is an adapter: tensors to edit, to merge, and to hold in an edited adapter. No torch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from pome.checkpoint.header import DTYPE_BITS
from pome.checkpoint.lora import AdapterChange, LowRank, MatchedAdapter
from pome.checkpoint.lora_config import LoraConfig
from pome.checkpoint.lora_match import match_adapter
from pome.checkpoint.quantization import BLOCK_FP8, declared_method, find_quantized
from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import PairingError, SelectionError, printable
from pome.manifest import KeptRecord
from pome.planning.lora_notes import note_origin
from pome.planning.obstacles import find_obstacle
from pome.planning.selection import EDITABLE, explain_empty, find_tensor_layouts, refuse_wrapped, select
from pome.planning.units import STORED_NAMES, Added, Layouts, Plan, Unit, lay_out, split_units
from pome.roles.layout import Layout


def plan_adapter(base: Checkpoint, ft: Checkpoint, spec: EditSpec) -> Plan:
    """The plan for an adapter as FT: BASE's tensors that it changes, the selected ones edited, the others merged."""
    _refuse_quantized(base)
    refuse_wrapped(base, spec)
    found = match_adapter(ft, base, merges=spec.out_format == "full")
    changes = {name: change for name, change in found.changes.items() if not change.added}
    notes = (*found.notes, *note_origin(base, ft))
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
            reason = _find_obstacle_in_adapter(changes[name], layout, ft) or ""
        if reason:
            kept.append(KeptRecord(name, None, reason))
        else:
            edits[name] = layout
    if not edits:
        roles = Counter(part.role for name in changes for part in described[name].parts)
        said = ", ".join(f"{count} x {role}" for role, count in roles.most_common()) or "nothing that BASE has"
        raise SelectionError(
            f"{printable(ft.source)}: the adapter changes none of the {len(chosen)} tensors that match (it changes "
            f"{said}); choose of these with --layers"
        )
    if spec.out_format == "adapter":
        plan = _plan_edited_adapter(base, ft, spec, found, edits)
        return replace(plan, kept=tuple(kept), notes=notes)
    out_dtypes = {} if spec.dtype == "keep" else dict.fromkeys(edits, STORED_NAMES[spec.dtype])
    added = _place_added(base, ft, found)
    layouts = lay_out(base, out_dtypes, added)
    units = []
    merged = []
    for name, change in changes.items():
        shape = base.tensors[name][1].shape
        whole = described[name]
        layout = edits.get(name, Layout((), whole.transposed, len(shape) == 3))
        units += [
            replace(unit, change=change.of_expert(unit.expert))
            for unit in split_units(name, layout, name, base, base, layouts)
        ]
        if name not in edits or set(layout.parts) != set(whole.parts):
            merged.append(name)
    for file, entries in added.items():
        for name, _, _ in entries:
            units.append(_make_added_unit(name, file, found.changes[name], layouts))
            merged.append(name)
    units.sort(key=lambda unit: (unit.file, unit.start))
    return Plan(
        tuple(units),
        tuple(kept),
        len(base.tensors),
        layouts,
        tuple(sorted(merged)),
        notes=notes,
    )


def _refuse_quantized(base: Checkpoint) -> None:
    """Raise PairingError for a base that an adapter cannot be merged into."""
    quantized = find_quantized(base.tensors, base.config)
    # config.json still declares the quantization of weights that were dequantized.
    method = "" if base.dequantized else declared_method(base.config)
    method = method or (quantized[0].format if quantized else "")
    if not method:
        return
    way_out = "give the unquantized model that it was quantized from as BASE"
    if quantized and all(found.format == BLOCK_FP8 for found in quantized):
        way_out = f"give --dequantize, or {way_out.removeprefix('give ')}"
    raise PairingError(
        f"{printable(base.source)}: quantized ({method}), and an adapter cannot be merged into that; {way_out}"
    )


def _place_added(base: Checkpoint, ft: Checkpoint, found: MatchedAdapter) -> Added:
    """The tensors that BASE lacks, in its last file and in the dtype that most of its tensors have."""
    new = [change for change in found.changes.values() if change.added]
    if not new:
        return {}
    dtypes = Counter(entry.dtype for _, entry in base.tensors.values() if entry.dtype in EDITABLE)
    dtype, file = dtypes.most_common(1)[0][0], max(base.files)
    return {file: [(change.name, dtype, ft.tensors[str(change.whole)][1].shape) for change in new]}


def _make_added_unit(name: str, file: str, change: AdapterChange, layouts: Layouts) -> Unit:
    entry = layouts[file][1].tensors[name]
    rows, columns = math.prod(entry.shape[:-1]), entry.shape[-1] if entry.shape else 1
    return Unit(
        name=name,
        expert=None,
        parts=(),
        transposed=False,
        shape=(rows, columns),
        file=file,
        base_name=name,
        dtype=entry.dtype,
        start=entry.start,
        nbytes=entry.nbytes,
        base_dtype=entry.dtype,
        base_start=0,
        base_nbytes=0,
        out_dtype=entry.dtype,
        out_start=entry.start,
        out_nbytes=entry.nbytes,
        change=change,
    )


def _find_obstacle_in_adapter(change: AdapterChange, layout: Layout, ft: Checkpoint) -> str | None:
    """Why a selected change cannot be edited inside the adapter, or None; an error where the user must decide."""
    if not change.lows or change.whole is not None:
        return "the adapter holds it whole, and it is copied so"
    magnitude = next((low.magnitude for low in change.lows if low.magnitude is not None), None)
    if magnitude is not None:
        raise PairingError(
            f"{ft.where(magnitude)}: the edit of a DoRA is no DoRA; leave {printable(change.name)} out with "
            "--exclude, or write a full checkpoint (--out-format full)"
        )
    adapted = {low.part.block for low in change.lows if low.part is not None}
    if adapted and any(part.block not in adapted for part in layout.parts):
        return "the adapter changes a part of it, which is not the matrix that was selected"
    return None


def _plan_edited_adapter(
    base: Checkpoint, ft: Checkpoint, spec: EditSpec, found: MatchedAdapter, edits: dict[str, Layout]
) -> Plan:
    """The plan for an adapter as the output: units of the LoRAs with a selected matrix, in the adapter's own order."""
    edited = {low.a for name in edits for low in found.changes[name].lows}
    units = []
    for name, change in found.changes.items():
        if edited.isdisjoint(low.a for low in change.lows):
            continue
        shape = base.tensors[name][1].shape
        layout = edits.get(name, Layout((), False, len(shape) == 3))
        for unit in split_units(name, layout, name, base, base, {}):
            of_unit = change.of_expert(unit.expert)
            if not of_unit.lows:
                continue
            file, entry = ft.tensors[of_unit.lows[0].a]
            dtype = entry.dtype if spec.dtype == "keep" else STORED_NAMES[spec.dtype]
            # An upper bound: fewer directions are kept.
            size = sum(low.rank for low in of_unit.lows) * sum(unit.shape) * DTYPE_BITS[dtype] // 8
            size = size if unit.parts else 0
            units.append(
                replace(
                    unit, change=of_unit, file=file, out_dtype=dtype, out_nbytes=size, nbytes=size, base_nbytes=size
                )
            )
    _refuse_growing_experts(ft, found.loras, units)
    order = {name: at for at, name in enumerate(sorted(edited, key=lambda name: ft.tensors[name][1].start))}
    units.sort(key=lambda unit: min(order.get(low.a, len(order)) for low in unit.change.lows) if unit.change else 0)
    return Plan(tuple(units), (), len(base.tensors), {}, loras=tuple(found.loras))


def _refuse_growing_experts(ft: Checkpoint, loras: list[LowRank], units: list[Unit]) -> None:
    """Raise PairingError for an adapter whose ranks no config could express to PEFT.

    LoRAs of single experts keep their patterns, which a module of another rank then cannot have beside them.
    """
    config = LoraConfig(ft)
    default = (config.get("r"), config.get("lora_alpha"))
    ruled = [low for low in loras if low.kind == "expert" and (low.rank, config.resolve_alpha(low.key)) != default]
    fused = next(
        (
            unit
            for unit in units
            if any(part.block is not None for part in unit.parts)
            and unit.change
            and any(low.part is None for low in unit.change.lows)
        ),
        None,
    )
    if ruled and fused is not None:
        raise PairingError(
            f"{ft.where(ruled[0].a)}: its rank or alpha stands in a pattern for single experts, which PEFT cannot read "
            f"beside another rank of {printable(fused.name)}; leave that out with --exclude, or write a full "
            "checkpoint (--out-format full)"
        )
