"""The merge of an adapter into one unit of BASE: selected matrices are edited, all else is merged as PEFT merges it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from pome.checkpoint.lora import AdapterChange, AdapterSlice, LowRank, read_change
from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.editing import unit as patch
from pome.editing.unit import TORCH_DTYPES, Patch, check_range, edit_part, gather_base, put_view, take, to_bytes
from pome.errors import NumericalError, printable
from pome.kernel.noise import storage_noise_floor
from pome.kernel.precision import full_precision
from pome.manifest import KeptRecord, TensorRecord
from pome.planning.units import Unit
from pome.roles.layout import Part

Data = tuple[bytearray | dict[str, AdapterSlice], bytearray]


def read_unit(unit: Unit, ft: Checkpoint, base: Checkpoint) -> Data:
    """The data of one unit: FT's bytes, or an adapter's tensors by name; and BASE's bytes."""
    mine: bytearray | dict[str, AdapterSlice]
    if unit.change is not None:
        mine = read_change(ft, unit.change, unit.expert)
    else:
        mine = ft.read(unit.name, unit.start, unit.nbytes)
    if unit.change is not None and unit.change.added:
        return mine, bytearray(unit.nbytes)  # BASE has no such tensor
    if unit.base_parts:
        return mine, gather_base(unit, base)
    return mine, base.read(unit.base_name, unit.base_start, unit.base_nbytes)


def make_patch(unit: Unit, data: Data, spec: EditSpec, device: str, caches: patch.FindCache | None = None) -> Patch:
    """The patch of one unit from the data that `read_unit` gave. Raises NumericalError."""
    mine, base = data
    if isinstance(mine, dict):
        return merge_unit(unit, load_pieces(mine), base, spec, device, caches)
    return patch.patch_unit(unit, mine, base, spec, device, caches)


def see_ft(unit: Unit, data: Data) -> bytes:
    """The bytes of one unit in FT: as they are stored, or as PEFT would merge them."""
    mine, base_bytes = data
    if not isinstance(mine, dict):
        return bytes(mine)
    assert unit.change is not None  # `read_unit` gives a mapping for an adapter's change alone
    base = torch.frombuffer(base_bytes, dtype=TORCH_DTYPES[unit.base_dtype]).reshape(unit.shape)
    _, stored = merge_as_peft(unit.change, load_pieces(mine), unit.expert, base)
    return bytes(to_bytes(stored))


def load_pieces(slices: Mapping[str, AdapterSlice]) -> dict[str, Tensor]:
    """The tensors of an adapter from its stored slices."""
    return {
        name: torch.frombuffer(stored.data, dtype=TORCH_DTYPES[stored.dtype]).reshape(stored.shape)
        for name, stored in slices.items()
    }


def merge_unit(
    unit: Unit,
    tensors: Mapping[str, Tensor],
    base_bytes: bytearray,
    spec: EditSpec,
    device: str,
    caches: patch.FindCache | None = None,
) -> Patch:
    """The patch of one unit that an adapter changes: merged into BASE, the selected matrices edited on `device`.

    Raises NumericalError for NaN or infinity on either side, and as patch_unit does.
    """
    change = unit.change
    assert change is not None
    base = torch.frombuffer(base_bytes, dtype=TORCH_DTYPES[unit.base_dtype]).reshape(unit.shape)
    for side, name, tensor in [("BASE", unit.name, base), *(("the adapter", n, t) for n, t in tensors.items())]:
        if not bool(torch.isfinite(tensor).all()):
            raise NumericalError(
                f"tensor {printable(unit.name)}: {side} holds NaN or infinity in {printable(name)}; take an earlier "
                "save of it"
            )
    begun = time.perf_counter()
    working = torch.float64 if base.dtype == torch.float64 else torch.float32
    # Only the delta of a plain LoRA has thin factors. DoRA and replaced tensors give a difference of full matrices.
    deltas = {part: find_factors(change, part, tensors, unit.expert, working) for part in unit.parts}
    exact, stored = base, base
    if len(unit.parts) != 1 or unit.parts[0].block is not None or None in deltas.values():
        exact, stored = merge_as_peft(change, tensors, unit.expert, base)
        if not bool(torch.isfinite(stored).all()):
            raise NumericalError(
                f"tensor {printable(unit.name)}: merged with the adapter it overflows {unit.base_dtype}; give BASE in "
                "bfloat16 or float32"
            )
    data = bytearray(unit.out_nbytes)
    out = torch.frombuffer(data, dtype=TORCH_DTYPES[unit.out_dtype]).reshape(unit.shape)
    out.copy_(stored)
    edited: list[TensorRecord] = []
    kept: list[KeptRecord] = []
    # A product of factors was never rounded to a stored weight; a tensor that the adapter holds whole was.
    whole = tensors[change.whole].reshape(unit.shape) if change.whole is not None else None
    for part in unit.parts:
        W_base = take(base, part).to(working)
        delta = deltas[part] or (take(exact, part) - W_base,)
        floor = 0.0 if whole is None else storage_noise_floor(take(whole, part))
        record = edit_part(unit, part, delta, W_base, put_view(out, part), floor, spec, device, caches)
        if isinstance(record, TensorRecord):
            edited.append(record)
        else:
            kept.append(dataclasses.replace(record, reason="its delta is zero: the adapter leaves it as it is in BASE"))
    check_range(unit, out, stored)
    return Patch(unit, data, tuple(edited), tuple(kept), time.perf_counter() - begun)


def find_factors(
    change: AdapterChange, part: Part, tensors: Mapping[str, Tensor], expert: int | None, working: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """(F, G) with F G the delta of a part as it is stored; None where it is not a product of thin factors."""
    if not change.is_plain:
        return None
    if len(change.lows) == 1 and change.lows[0].part is None:
        low = change.lows[0]
        F, G = orient(*split_factors(low, tensors, expert, working), low)
        return take_factors(F * low.scaling, G, part)
    # BASE has several modules of the model in one tensor: a part is the whole of one of them.
    for low in change.lows:
        if low.part is not None and low.part.block == part.block:
            F, G = orient(*split_factors(low, tensors, expert, working), low)
            return F * low.scaling, G
    return None


def split_factors(
    low: LowRank, tensors: Mapping[str, Tensor], expert: int | None, working: torch.dtype
) -> tuple[Tensor, Tensor]:
    """B (rows, r) and A (r, in) of one matrix, in the working dtype; of stacked experts, A holds this one's rows."""
    A, B = tensors[low.a], tensors[low.b]
    mine = low.expert if low.expert is not None else expert
    if low.experts > 1 and mine is not None:
        B = B.reshape(B.shape[0], low.rank, low.experts)[:, :, mine]
    B, A = cut_rows(B, A, low)
    return B.to(working), A.to(working)


def cut_rows(B: Tensor, A: Tensor, low: LowRank) -> tuple[Tensor, Tensor]:
    """The factors of the rows of the stored product that belong to this tensor, as views."""
    if low.rows is None:
        return B, A
    return (B, A[:, slice(*low.rows)]) if low.flipped else (B[slice(*low.rows)], A)


def orient(B: Tensor, A: Tensor, low: LowRank) -> tuple[Tensor, Tensor]:
    """(F, G) with F G = B A as it is stored."""
    return (A.T, B.T) if low.flipped else (B, A)


def take_factors(F: Tensor, G: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """The factors of a part of F G: its rows of F, or its columns of G."""
    if part.block is None:
        return F, G
    return (take(F, part), G) if part.block.axis == 0 else (F, take(G, part))


def merge_as_peft(
    change: AdapterChange, tensors: Mapping[str, Tensor], expert: int | None, base: Tensor
) -> tuple[Tensor, Tensor]:
    """The merged weight, before and after it is rounded to BASE's dtype.

    The order of products, sums and roundings is that of PEFT 0.21's `merge` on a CPU, whose adapters are float32
    (float64 for a float64 base): a linear layer's change is added in float32, that of an embedding or a parameter is
    rounded to the weight's dtype first.
    """
    W = base
    if change.whole is not None:
        W = tensors[change.whole].reshape(base.shape).to(base.dtype)
    if change.tokens is not None:
        name, rows = change.tokens
        W = W.index_copy(0, torch.tensor(rows), tensors[name].to(base.dtype))
    working = torch.float64 if base.dtype == torch.float64 else torch.float32
    exact = W.to(working)
    if change.bias is not None:
        name, scaling = change.bias
        exact = exact + tensors[name].to(working).reshape(base.shape) * scaling
    if not change.lows:
        return exact, exact.to(base.dtype)
    with full_precision(base.device):
        if change.lows[0].part is None:
            (low,) = change.lows
            return _merge_low(low, split_factors(low, tensors, expert, working), tensors, W, exact)
        exact, stored = exact.clone(), W.clone()
        for low in change.lows:
            assert low.part is not None
            sides = take(W, low.part), take(exact, low.part)
            merged = _merge_low(low, split_factors(low, tensors, expert, working), tensors, *sides)
            for whole, one in zip((exact, stored), merged, strict=True):
                view = put_view(whole, low.part)
                view.copy_(one.reshape(view.shape))
    return exact, stored


def _merge_low(
    low: LowRank, factors: tuple[Tensor, Tensor], tensors: Mapping[str, Tensor], W: Tensor, exact: Tensor
) -> tuple[Tensor, Tensor]:
    """A matrix with one LoRA merged, before and after it is rounded; W is the stored matrix, `exact` it in float32."""
    B, A = factors
    product = B @ A
    delta = (product.T if low.flipped else product) * low.scaling
    if low.magnitude is not None:
        across = (exact.T + delta.T) if low.flipped else (exact + delta)
        factor = tensors[low.magnitude].to(exact.dtype).flatten() / torch.linalg.norm(across, dim=1)
        exact = (factor.view(1, -1) if low.flipped else factor.view(-1, 1)) * (exact + delta)
    elif low.kind == "linear":
        exact = exact + delta
    else:
        return exact + delta, W + delta.to(W.dtype)
    return exact, exact.to(W.dtype)
