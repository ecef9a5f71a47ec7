"""The plan of an extraction: which LoRA of the model's modules holds which matrices of FT. No torch, no data read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pome.checkpoint.leftovers import ADAPTER_WEIGHTS
from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import PairingError, SelectionError, SpecError, printable
from pome.manifest import KeptRecord
from pome.planning.loaded_names import LoadedNames
from pome.planning.selection import find_tensor_layouts
from pome.planning.units import Plan, Unit
from pome.roles.families import family_of
from pome.roles.layout import Block, Layout, Part, matrix_shape
from pome.roles.model_config import config_of

KEY = "base_model.model."
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_NO_LORA = {
    "embed": "an embedding, of which no LoRA is made; --save-modules takes it whole",
    "router": "a router, of which no LoRA is made; --save-modules takes it whole",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """One matrix of FT, and the rows that it has in the weight of the model (out, in): None for all."""

    unit: Unit
    part: Part
    rows: Block | None


@dataclass(frozen=True, slots=True)
class Cell:
    """One product B A: of a module, or of one expert of a stack. It is what is extracted at a time.

    unit: the matrix that its pieces are below each other, as the tables and the manifest know it.
    """

    unit: Unit
    pieces: tuple[Piece, ...]
    offset: int  # of its factors in the scratch file
    most: int  # rank that there is room for


@dataclass(frozen=True, slots=True)
class Lora:
    """One LoRA: B (out, r E) and A (r E, in) of the E experts of a parameter, one for a module.

    name: of the parameter in the model. is_module: PEFT is told its module, else the parameter. turned: the product B A
    is the transpose of the update, for PEFT takes some stacks the other way round.
    """

    name: str
    is_module: bool
    size: tuple[int, int]  # (out, in) of the update of one expert
    turned: bool
    transposed: bool  # a Conv1D
    experts: int
    dtype: str
    cells: tuple[Cell, ...]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """The name by which PEFT finds its rank and alpha."""
        return self.module if self.is_module else self.name

    @property
    def shape(self) -> tuple[int, int]:
        """(rows of B, columns of A)."""
        return self.size[::-1] if self.turned else self.size


@dataclass(frozen=True)
class ExtractPlan:
    """The LoRAs of an extraction, and the selected matrices that become none."""

    loras: tuple[Lora, ...]
    kept: tuple[KeptRecord, ...]
    base: Plan  # the matrices of FT and BASE
    names: LoadedNames

    @property
    def cells(self) -> list[Cell]:
        return [cell for lora in self.loras for cell in lora.cells]

    @property
    def plan(self) -> Plan:
        """The cells as units of a plan, for tables and progress."""
        return replace(self.base, units=tuple(cell.unit for cell in self.cells), kept=self.kept, layouts={})

    def to_json(self) -> dict[str, Any]:
        """The document of `--dry-run --json`."""
        plan = self.plan.to_json()
        loras = [
            {
                "name": lora.name,
                "target": lora.key,
                "shape": list(lora.size),
                "experts": lora.experts,
                "dtype": lora.dtype,
            }
            for lora in self.loras
        ]
        return {"loras": loras, **{("extract" if key == "edit" else key): value for key, value in plan.items()}}


def plan_extraction(plan: Plan, base: Checkpoint, spec: EditSpec) -> ExtractPlan:
    """The LoRAs for the matrices of a plan. Raises SelectionError where there are none, and PairingError in doubt."""
    pairs = {unit.name: unit.base_name for unit in plan.units if not unit.base_parts}
    names = LoadedNames(base, pairs)
    layouts = find_tensor_layouts(base)
    kept = list(plan.kept)
    groups: dict[str, dict[int, list[Piece]]] = {}
    stored: dict[str, str] = {}  # LoRA -> the first tensor of BASE in it
    for unit, part in plan.matrices():
        found = _find_base_part(unit, part, base, layouts)
        reason = _NO_LORA.get(part.role) if found else "it is one of several matrices that its module mixes"
        if found is None or reason is not None:
            kept.append(KeptRecord(unit.name, unit.label(part), str(reason)))
            continue
        name, expert, theirs = found
        loaded = names.find(name)
        rows = _turn(theirs.block, layouts[name].transposed)
        if loaded.rows is not None:
            rows = Block(0, 1, loaded.rows[1], loaded.rows[0], names.shapes[name][0])
        if rows is not None and rows.axis == 1:
            kept.append(KeptRecord(unit.name, unit.label(part), "its rows are the experts of one matrix"))
            continue
        stored.setdefault(loaded.name, name)
        at = loaded.expert if loaded.expert is not None else expert or 0
        groups.setdefault(loaded.name, {}).setdefault(at, []).append(Piece(unit, part, rows))
    if not groups:
        reasons = Counter(item.reason for item in kept)
        raise SelectionError(
            f"no LoRA can hold what is selected ({reasons.most_common(1)[0][0]}); choose other matrices with --layers"
        )
    offset = 0
    loras = []
    for name, experts in groups.items():
        lora, offset = _make_lora(name, stored[name], experts, base, names, layouts, spec, offset)
        loras.append(lora)
    _refuse_equal_sizes(loras)
    return ExtractPlan(tuple(loras), tuple(kept), plan, names)


def _find_base_part(
    unit: Unit, part: Part, base: Checkpoint, layouts: dict[str, Layout]
) -> tuple[str, int | None, Part] | None:
    """The tensor of BASE that holds a matrix of FT, the slice of it, and the matrix there."""
    if not unit.base_parts:
        return unit.base_name, unit.expert, part
    lies = unit.base_parts[unit.parts.index(part)]
    _, entry = base.tensors[lies.name]
    layout = layouts[lies.name]
    at = (lies.start - entry.start) // (entry.nbytes // entry.shape[0]) if layout.stacked else None
    same = [theirs for theirs in layout.parts if theirs.role == part.role]
    return (lies.name, at, same[0]) if len(same) == 1 else None


def _turn(block: Block | None, transposed: bool) -> Block | None:
    """The rows of a weight (out, in) that a block of the stored tensor is."""
    return replace(block, axis=1 - block.axis) if block is not None and transposed else block


def _make_lora(
    name: str,
    stored: str,
    experts: dict[int, list[Piece]],
    base: Checkpoint,
    names: LoadedNames,
    layouts: dict[str, Layout],
    spec: EditSpec,
    offset: int,
) -> tuple[Lora, int]:
    """A LoRA whose cells have their places in the scratch file from `offset` on; and where those of the next begin."""
    layout, shape = layouts[stored], base.tensors[stored][1].shape
    family = family_of(config_of(stored, base.config))
    is_module = names.is_module(name)
    loaded = names.find(stored)
    out, width = matrix_shape(Layout(layout.parts, layout.transposed), Part("whole"), shape)
    if loaded.rows is not None:
        out = loaded.rows[1]
    turned = False
    if layout.stacked or loaded.expert is not None:
        in_out = family.experts == "in_out" if family.experts else layout.transposed and not family.turned_on_load
        turned = in_out and not family.marked_in_out
    elif not is_module and not name.endswith(".weight"):
        turned = layout.transposed
    pieces = [piece for found in experts.values() for piece in found]
    dtypes = {dtype for piece in pieces for dtype in (piece.unit.dtype, piece.unit.base_dtype)}
    wide = "F64" if dtypes == {"F64"} else "F32" if dtypes & {"F32", "F64"} else pieces[0].unit.dtype
    cells = []
    for expert, found in sorted(experts.items()):
        found.sort(key=lambda piece: piece.rows.start if piece.rows is not None else 0)
        of_stack = expert if layout.stacked or loaded.expert is not None else None
        cell = _make_cell(name, of_stack, tuple(found), (out, width), wide, spec, offset)
        cells.append(cell)
        offset += cell.most * (out + width) * WIDTHS[wide]
    count = names.count_experts(stored) if layout.stacked or loaded.expert is not None else 1
    lora = Lora(name, is_module, (out, width), turned, layout.transposed and is_module, count, wide, tuple(cells))
    return lora, offset


def _make_cell(
    name: str,
    expert: int | None,
    pieces: tuple[Piece, ...],
    size: tuple[int, int],
    dtype: str,
    spec: EditSpec,
    offset: int,
) -> Cell:
    shapes = [matrix_shape(Layout(p.unit.parts, p.unit.transposed), p.part, p.unit.shape) for p in pieces]
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    role = "+".join(dict.fromkeys(piece.part.role for piece in pieces))
    label = None if rows == size[0] else role
    resolved = {piece.unit.name: spec.resolve(piece.unit.name) for piece in pieces}
    first, *others = resolved
    for other in others:
        if resolved[other] != resolved[first]:
            raise SpecError(
                f"overrides: {printable(first)} and {printable(other)} become one LoRA of {printable(name)}, and "
                "give it different options; let an override match both"
            )
    spec = resolved[first]
    most = min(rows, columns) if spec.rank is None else min(spec.rank, rows, columns)
    nbytes = most * sum(size) * WIDTHS[dtype]
    read = {piece.unit.key: piece.unit for piece in pieces}.values()
    unit = replace(
        pieces[0].unit,
        name=name,
        expert=expert,
        parts=(Part(role, label),),
        transposed=False,
        shape=(rows, columns),
        file=ADAPTER_WEIGHTS,
        nbytes=sum(one.nbytes for one in read),
        base_nbytes=sum(one.base_nbytes for one in read),
        base_parts=(),
        out_dtype=dtype,
        out_start=offset,
        out_nbytes=nbytes,
        copies=(),
    )
    return Cell(unit, pieces, offset, most)


def _refuse_equal_sizes(loras: Sequence[Lora]) -> None:
    """Raise PairingError where keys would not tell the LoRAs of two parameters of one module apart."""
    seen: dict[tuple[str, tuple[int, int]], str] = {}
    for lora in loras:
        if lora.is_module or lora.name.endswith(".weight"):
            continue
        other = seen.setdefault((lora.module, lora.shape), lora.name)
        if other != lora.name:
            raise PairingError(
                f"{printable(lora.name)} and {printable(other)} are parameters of one module and of one shape, which "
                "the keys of a LoRA do not tell apart; leave one of them out with --exclude"
            )


def name_factors(loras: Sequence[Lora]) -> Iterator[tuple[Lora, str, str]]:
    """The names of A and B in the file. PEFT wraps the parameters of one module around each other, the last outside."""
    counts = Counter(lora.module for lora in loras)
    order = {lora.name: (lora.name.rpartition(".")[2].startswith("down"), at) for at, lora in enumerate(loras)}
    for lora in sorted(loras, key=lambda lora: order[lora.name]):
        counts[lora.module] -= 1
        inner = ".base_layer" * counts[lora.module]
        yield lora, f"{KEY}{lora.module}{inner}.lora_A.weight", f"{KEY}{lora.module}{inner}.lora_B.weight"
