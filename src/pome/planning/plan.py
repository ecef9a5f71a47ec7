"""Which matrices to edit, which to keep and why; reads no tensor data and loads no torch."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import PairingError, SelectionError, printable
from pome.manifest import KeptRecord
from pome.planning.lora_plan import plan_adapter
from pome.planning.obstacles import find_obstacle, refuse_doubtful_squares
from pome.planning.selection import explain_empty, refuse_quantized, select
from pome.planning.units import STORED_NAMES, Plan, lay_out, split_units
from pome.roles.layout import Layout
from pome.roles.pairing import pair_names


def make_plan(base: Checkpoint, ft: Checkpoint, spec: EditSpec) -> Plan:
    """Match the selection against FT, pair with BASE, and decide edit or keep for each tensor.

    Raises SelectionError when nothing can be edited, PairingError when a pair disagrees in shape or orientation.
    """
    if base.adapter_config is not None:
        raise PairingError(f"{printable(base.source)}: an adapter; give as BASE the model that it was trained on")
    if ft.adapter_config is not None:
        return plan_adapter(base, ft, spec)
    if spec.out_format == "adapter":
        raise PairingError(
            f"{printable(ft.source)}: a full checkpoint, of which no adapter is made; leave --out-format at full"
        )
    base, ft = _share_config(base, ft), _share_config(ft, base)
    ft_shapes = {name: entry.shape for name, (_, entry) in ft.tensors.items()}
    base_shapes = {name: entry.shape for name, (_, entry) in base.tensors.items()}
    pairs = pair_names(base_shapes, ft_shapes)
    for side in (ft, base):
        refuse_quantized(side, spec)
    reshaped = {name for name, other in pairs.items() if ft_shapes[name] != base_shapes[other]}
    chosen = list(select(ft, spec, reshaped))
    if not chosen:
        raise SelectionError(explain_empty(ft, spec))
    kept: list[KeptRecord] = []
    edits: list[tuple[str, Layout]] = []
    for name, layout in chosen:
        reason = find_obstacle(name, layout, base, ft, pairs, spec)
        if reason is None:
            edits.append((name, layout))
        else:
            kept.append(KeptRecord(name, None, reason))
    refuse_doubtful_squares((name for name, _ in edits), base, ft, pairs)
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
    layouts = lay_out(ft, out_dtypes)
    units = [unit for name, layout in edits for unit in split_units(name, layout, pairs[name], base, ft, layouts)]
    units.sort(key=lambda unit: (unit.file, unit.start))
    return Plan(tuple(units), tuple(kept), len(ft.tensors), layouts)


def _share_config(side: Checkpoint, other: Checkpoint) -> Checkpoint:
    """A side without a config is of the other's architecture; how its weights are quantized only its own would tell."""
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
