"""Plan of an edit: matrices to edit, tensors to keep and why. It reads no tensor data and loads no torch."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import PairingError, SelectionError, printable
from pome.manifest import KeptRecord
from pome.planning.counts import refuse_other_counts
from pome.planning.lora_plan import plan_adapter
from pome.planning.missing import refuse_missing
from pome.planning.obstacles import MISSING, find_obstacle, find_unfit, refuse_doubtful_squares, refuse_dtype
from pome.planning.partners import Found, Partners
from pome.planning.selection import explain_empty, find_placeholders, refuse_quantized, refuse_wrapped, select
from pome.planning.units import STORED_NAMES, Plan, lay_out, split_units, split_units_across
from pome.roles.layout import Layout


def make_plan(base: Checkpoint, ft: Checkpoint, spec: EditSpec) -> Plan:
    """Match the selection against FT, find each matrix's partner in BASE, and decide edit or keep.

    Raises SelectionError when nothing can be edited, PairingError when a pair disagrees in shape, orientation or depth,
    and when a whole group of what was selected has no partner.
    """
    if base.adapter_config is not None:
        raise PairingError(f"{printable(base.source)}: an adapter; give as BASE the model that it was trained on")
    if ft.adapter_config is not None:
        return plan_adapter(base, ft, spec)
    if spec.out_format == "adapter":
        raise PairingError(
            f"{printable(ft.source)}: a full checkpoint, of which no adapter is made; leave --out-format at full"
        )
    configs = base.config, ft.config
    base, ft = _share_config(base, ft), _share_config(ft, base)
    for side in (ft, base):
        refuse_quantized(side, spec)
        refuse_wrapped(side, spec)
    partners = Partners(base, ft)
    kept = find_placeholders(base, ft, partners.names, spec)
    empty = {item.name for item in kept}
    chosen = {n: layout for n, layout in select(ft, spec, partners.reshaped) if n not in empty}
    if not chosen:
        raise SelectionError(_list_reasons(base, ft, kept) if kept else explain_empty(ft, spec))
    edits: dict[str, Layout] = {}
    across: dict[str, Found] = {}
    for name, layout in chosen.items():
        found = _find_across(name, layout, partners)
        reason = None if found else find_obstacle(name, layout, base, ft, partners.names, spec)
        if reason is not None:
            kept.append(KeptRecord(name, None, reason))
            continue
        edits[name] = layout
        if found:
            across[name] = found
    plain = [name for name in edits if name not in across]
    refuse_doubtful_squares(plain, base, ft, partners.names)
    if not edits:
        raise SelectionError(_list_reasons(base, ft, kept))
    first = {name: next(iter(found.values())).name for name, found in across.items()}
    refuse_other_counts({name: first.get(name) or partners.names[name] for name in edits}, base, ft, configs, spec)
    out_dtypes = {} if spec.dtype == "keep" else dict.fromkeys(edits, STORED_NAMES[spec.dtype])
    for name in out_dtypes:
        if name not in across and name in partners.reshaped:
            raise PairingError(f"{ft.where(name)}: only its common rows are edited; leave --dtype at keep for that")
    layouts = lay_out(ft, out_dtypes)
    units = [u for n in plain for u in split_units(n, edits[n], partners.names[n], base, ft, layouts)]
    units += [unit for n, found in across.items() for unit in split_units_across(n, edits[n], found, ft, layouts)]
    units.sort(key=lambda unit: (unit.file, unit.start))
    for name, found in across.items():
        layout, shape = edits[name], ft.tensors[name][1].shape
        for i in range(shape[0]) if layout.stacked else (None,):
            labels = [p.label for p in layout.parts if (i, p) not in found]
            expert = None if i is None else f"expert={i}"
            kept += [KeptRecord(name, ",".join(filter(None, (expert, label))) or None, MISSING) for label in labels]
    refuse_missing(chosen, kept, ft, base, spec)
    return Plan(tuple(units), tuple(kept), len(ft.tensors), layouts)


def _find_across(name: str, layout: Layout, partners: Partners) -> Found:
    """Ranges of BASE for the matrices of a tensor that has no partner of its own name and shape."""
    base, ft = partners.base, partners.ft
    if find_unfit(name, layout, ft) is not None or not partners.need_matrices(name, layout):
        return {}
    found = partners.find_matrices(name, layout)
    if found:
        refuse_dtype(ft.where(name), ft.tensors[name][1].dtype)
    for lies in found.values():
        refuse_dtype(base.where(lies.name), lies.dtype)
    return found


def _list_reasons(base: Checkpoint, ft: Checkpoint, kept: list[KeptRecord]) -> str:
    reasons = Counter(item.reason for item in kept)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    return (
        f"{printable(ft.source)}: {len(kept)} tensors match, but none can be edited ({listed}); "
        f"is {printable(base.source)} the model that this one was trained from?"
    )


def _share_config(side: Checkpoint, other: Checkpoint) -> Checkpoint:
    """A side, with the other's config where it has none: the architecture is the same, the quantization may differ."""
    if side.config is not None or other.config is None:
        return side
    return replace(side, config={key: said for key, said in other.config.items() if key != "quantization_config"})


def check_overrides(plan: Plan, spec: EditSpec) -> None:
    """Raise SelectionError for an override that no edited tensor's name matches: a slip of its pattern."""
    for override in spec.overrides:
        if not any(re.search(override.match, unit.name) for unit in plan.units if unit.parts):
            raise SelectionError(
                f"overrides: {printable(override.match)!r} matches no edited tensor; --dry-run --json lists their names"
            )
