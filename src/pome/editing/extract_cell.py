"""Extraction of one product B A: from the bytes of FT and BASE to the factors of a LoRA and their record."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.editing.lora_merge import Data, read_unit
from pome.editing.unit import (
    TORCH_DTYPES,
    check_finite,
    describe_part,
    equalize_part,
    measure_norm,
    put_view,
    record_part,
    take,
    to_bytes,
)
from pome.errors import NumericalError
from pome.kernel.factorisation import factorise
from pome.kernel.noise import storage_noise_floor
from pome.kernel.precision import full_precision
from pome.manifest import KeptRecord, TensorRecord
from pome.planning.extract_plan import Cell, Lora, Piece

# A product of two rounded factors is off by about the root of two roundings. What is far beyond that was no rounding.
MOST_LOST, MOST_EPS = 1e-4, 4.0


@dataclass(frozen=True)
class Extracted:
    """Result for one cell: B (out, k) and A (k, in) of its LoRA, and the record. No factors where its delta is zero."""

    cell: Cell
    factors: tuple[Tensor, Tensor] | None
    record: TensorRecord | KeptRecord
    kernel_seconds: float

    def to_bytes(self) -> bytearray:
        """B, then A, as they lie in the scratch file."""
        return bytearray().join(map(to_bytes, self.factors or ()))


def read_cell(cell: Cell, ft: Checkpoint, base: Checkpoint) -> dict[str, Data]:
    """The data of the units that a cell has matrices of, by their keys."""
    units = {piece.unit.key: piece.unit for piece in cell.pieces}
    return {key: read_unit(unit, ft, base) for key, unit in units.items()}


def extract_cell(cell: Cell, lora: Lora, data: dict[str, Data], spec: EditSpec, device: str) -> Extracted:
    """The factors of a cell's update. Raises NumericalError, as an edit does."""
    begun = time.perf_counter()
    sides = [load_piece(piece, data[piece.unit.key]) for piece in cell.pieces]
    tuned, pretrained = (torch.cat(side) if len(side) > 1 else side[0] for side in zip(*sides, strict=True))
    # The factors are rounded to float32 or less, so that float32 will do for them even where W and W_base cancel.
    working = torch.promote_types(torch.promote_types(tuned.dtype, pretrained.dtype), torch.float32)
    D = tuned.to(working, copy=True).sub_(pretrained)
    if not all(map(math.isfinite, map(float, torch.aminmax(D)))):
        for piece, side in zip(cell.pieces, sides, strict=True):
            check_finite(piece.unit, piece.part, *side)
    floor = storage_noise_floor(tuned)
    unit, (part,) = cell.unit, cell.unit.parts
    spec = spec.resolve(cell.pieces[0].unit.name)
    result = equalize_part(unit, part, (D,), floor, spec, device, leading_only=True)
    if isinstance(result, KeptRecord):
        return Extracted(cell, None, result, time.perf_counter() - begun)
    value, dtype = result.value.to("cpu"), TORCH_DTYPES[unit.out_dtype]
    F, G = (factor.to("cpu", dtype) for factor in result.factors or factorise(value, result.k))
    if not bool(torch.isfinite(F).all() and torch.isfinite(G).all()):
        raise NumericalError(
            f"{describe_part(unit, part)}: its factors overflow {unit.out_dtype}; choose a smaller --beta, or leave it "
            "out with --exclude"
        )
    with full_precision(value.device):
        lost = measure_norm(value.addmm_(F.to(value), G.to(value), beta=-1.0)) / result.edit_norm
    if not lost <= MOST_LOST + MOST_EPS * torch.finfo(dtype).eps:
        raise NumericalError(
            f"{describe_part(unit, part)}: its factors lose {lost:.1e} of the update in {unit.out_dtype}; leave it out "
            "with --exclude"
        )
    B, A = place_factors(F, G, cell, lora)
    record = record_part(unit, part, result, floor, lost)
    return Extracted(cell, (B, A), record, time.perf_counter() - begun)


def load_piece(piece: Piece, data: Data) -> tuple[Tensor, Tensor]:
    """One matrix of FT and of BASE, (out, in) each, as stored but for their orientation."""
    unit, (mine, theirs) = piece.unit, data
    assert isinstance(mine, bytearray)  # FT is no adapter
    stored = (
        torch.frombuffer(mine, dtype=TORCH_DTYPES[unit.dtype]).reshape(unit.shape),
        torch.frombuffer(theirs, dtype=TORCH_DTYPES[unit.base_dtype]).reshape(unit.shape),
    )
    ft, base = (take(side, piece.part) for side in stored)
    return (ft.T, base.T) if unit.transposed else (ft, base)


def place_factors(F: Tensor, G: Tensor, cell: Cell, lora: Lora) -> tuple[Tensor, Tensor]:
    """(B, A) of a cell's LoRA from F G, whose rows are those of its pieces one after the other."""
    whole = F
    if cell.pieces[0].rows is not None:
        whole, first = F.new_zeros(lora.size[0], F.shape[1]), 0
        for piece in cell.pieces:
            assert piece.rows is not None
            view = put_view(whole, dataclasses.replace(piece.part, block=piece.rows))
            count = piece.rows.count * piece.rows.size
            view.copy_(F[first : first + count].reshape(view.shape))
            first += count
    return (G.T, whole.T) if lora.turned else (whole, G)
