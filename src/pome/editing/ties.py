"""Tied weights that a checkpoint stores twice, such as embeddings and the head that is the same tensor.

The model has such a weight once, so its edit goes to all its copies. They are found by a sample of their bytes, which
is read only where one of them is selected.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import CheckpointError, printable
from pome.manifest import KeptRecord
from pome.planning.selection import find_tensor_layouts
from pome.planning.units import STORED_NAMES, Copy, Plan, Unit, lay_out

TIED_ROLES = {"embed", "head"}
_PIECE = 8 << 20
_SAMPLE = 1 << 16  # bytes from each end of a tensor


def find_copies(side: Checkpoint, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Embeddings and heads among `names` -> other tensors of the checkpoint that are the same one, stored again.

    Same means equal shape, dtype and bytes (a sample of these; the edit compares all). A head is a copy of the
    embeddings unless the config says that they are not tied.
    """
    if not set(names) & side.tensors.keys():
        return {}
    roles = {
        name: {part.role for part in layout.parts}
        for name, layout in find_tensor_layouts(side).items()
        if layout.parts and len(side.tensors[name][1].shape) == 2
    }
    tied = {name: found for name, found in roles.items() if found <= TIED_ROLES}
    config = side.config or {}
    untied = config.get("tie_word_embeddings") is False
    copies = {}
    for name in names:
        if name not in tied:
            continue
        _, entry = side.tensors[name]
        same = [
            other
            for other in tied
            if other != name
            and (side.tensors[other][1].shape, side.tensors[other][1].dtype) == (entry.shape, entry.dtype)
            and not (untied and tied[other] != tied[name])
        ]
        mine = _read_sample(side, name) if same else []
        found = tuple(other for other in same if _read_sample(side, other) == mine)
        if found:
            copies[name] = found
    return copies


def _read_sample(side: Checkpoint, name: str) -> list[bytearray]:
    _, entry = side.tensors[name]
    count = min(_SAMPLE, entry.nbytes)
    return [side.read(name, start, count) for start in (entry.start, entry.end - count)]


def keep_ties(plan: Plan, base: Checkpoint, ft: Checkpoint, spec: EditSpec) -> Plan:
    """The plan in which a tensor that is stored several times is edited once, and written to all its copies."""
    if ft.adapter_config is not None and spec.out_format == "adapter":
        return plan
    side = base if ft.adapter_config is not None else ft
    # What an adapter changes is to stay tied too, also where it is merged and not edited.
    edited = [unit.name for unit in plan.units if unit.change or {part.role for part in unit.parts} & TIED_ROLES]
    # An adapter may hold both, trained apart; they are no copies of each other then.
    own = {unit.name for unit in plan.units if unit.change is not None}
    copies = {
        name: tuple(other for other in others if other not in own) for name, others in find_copies(side, edited).items()
    }
    dropped: dict[str, str] = {}
    for name, others in copies.items():
        if name not in dropped:
            dropped |= dict.fromkeys(others, name)
    if not dropped:
        return plan
    kept = [item for item in plan.kept if item.name not in dropped]
    matched = {item.name for item in plan.kept} | set(edited)
    kept += [
        KeptRecord(name, None, f"it is {printable(first)}, stored again, and is written with it")
        for name, first in dropped.items()
        if name in matched
    ]
    units = [unit for unit in plan.units if unit.name not in dropped]
    layouts = plan.layouts
    if spec.dtype != "keep":
        changed = {unit.name for unit in units if unit.out_dtype != unit.dtype} | dropped.keys()
        layouts = lay_out(side, dict.fromkeys(changed, STORED_NAMES[spec.dtype]))
    whole = replace(plan, kept=tuple(kept), layouts=layouts)
    tied = {name: [other for other, first in dropped.items() if first == name] for name in dropped.values()}
    return replace(whole, units=tuple(_place(unit, whole, side, tied.get(unit.name, [])) for unit in units))


def _place(unit: Unit, plan: Plan, side: Checkpoint, others: list[str]) -> Unit:
    """A unit at its position in the plan's layouts, with those of its copies."""

    def locate(name: str) -> tuple[str, int]:
        file, entry = side.tensors[name]
        entry = plan.layouts[file][1].tensors[name] if file in plan.layouts else entry
        return file, entry.start + (unit.expert or 0) * unit.out_nbytes

    copies = tuple(Copy(other, *locate(other)) for other in others)
    start = locate(unit.name)[1] if unit.file in plan.layouts else unit.out_start
    return replace(unit, out_start=start, copies=copies)


def check_copies(unit: Unit, side: Checkpoint) -> None:
    """Raise CheckpointError if a tensor and what the sample took for its copy differ."""
    for copy in unit.copies:
        if not hold_same_bytes(side, unit.name, copy.name):
            raise CheckpointError(
                f"{side.where(copy.name)}: begins and ends as {printable(unit.name)} does, and differs from it; leave "
                "one of the two out with --exclude"
            )


def hold_same_bytes(side: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of one checkpoint hold the same bytes."""
    (_, a), (_, b) = side.tensors[one], side.tensors[other]
    if a.nbytes != b.nbytes:
        return False
    for at in range(0, a.nbytes, _PIECE):
        count = min(_PIECE, a.nbytes - at)
        if side.read(one, a.start + at, count) != side.read(other, b.start + at, count):
            return False
    return True


def describe_ties(plan: Plan) -> list[str]:
    """A notice for each tensor that is stored several times."""
    return [
        f"{printable(unit.name)} and {', '.join(printable(copy.name) for copy in unit.copies)} are one tensor, stored "
        "again; the edit goes to all"
        for unit in plan.units
        if unit.copies
    ]
