"""An edited adapter as the output: a LoRA with a selected matrix gets factors of the kept rank.

With U S V^T the edit of a matrix and s the scaling of its LoRA, which stays the same, the new B is U sqrt(S / s) and
the new A is sqrt(S / s) V^T. A LoRA of several matrices (halves of a fused tensor) has their factors stacked along the
rank, and after them the old factors of the matrices that were not selected.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pome.checkpoint.header import DTYPE_BITS, build_header
from pome.checkpoint.lora import LowRank
from pome.checkpoint.source import ADAPTER_CONFIG, Checkpoint
from pome.config.spec import EditSpec
from pome.editing.lora_merge import orient, take_factors
from pome.editing.unit import TORCH_DTYPES, equalize_part, measure_norm, put_view, record_part, to_bytes
from pome.errors import NumericalError, printable
from pome.manifest import KeptRecord, TensorRecord
from pome.output.clone import copy_range
from pome.output.durable import as_output_error
from pome.planning.units import Plan, Unit
from pome.roles.layout import Part

Factors = tuple[Tensor, Tensor]  # F (rows, k) and G (k, columns)
Places = dict[str, tuple[str, tuple[int, ...], int]]  # adapter tensor -> dtype, shape and offset in scratch


@dataclass(frozen=True)
class EditedLora:
    """One LoRA after the edit: A (E * rank, in) and B (out, rank * E). Both are None where every delta is zero."""

    low: LowRank
    units: tuple[Unit, ...]
    A: Tensor | None
    B: Tensor | None
    rank: int
    tensors: tuple[TensorRecord, ...]
    kept: tuple[KeptRecord, ...]


def edit_loras(plan: Plan, ft: Checkpoint, spec: EditSpec, device: str) -> Iterator[EditedLora]:
    """The LoRAs of a plan, edited one by one. Raises NumericalError."""
    groups: dict[str, list[Unit]] = {}
    for unit in plan.units:
        assert unit.change is not None and unit.change.low is not None  # the plan saw to it
        groups.setdefault(unit.change.low.a, []).append(unit)
    for units in groups.values():
        yield _edit_lora(units, ft, spec, device)


def configure(config: Mapping[str, Any], ranks: list[tuple[LowRank, int]]) -> bytes:
    """The adapter_config.json of an edited adapter: each edited LoRA's rank, and the alpha that keeps its scaling."""
    new_ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    for low, rank in ranks:
        # The first pattern that fits a name's end decides, so these stand before those that were there.
        pattern = f"^{re.escape(low.key)}"
        new_ranks[pattern] = rank
        alphas[pattern] = low.scaling * (math.sqrt(rank) if config.get("use_rslora") else rank)
    changed = {
        **config,
        # Trained weights remember no initialisation, and some fit no rank but the old one.
        "init_lora_weights": True,
        "rank_pattern": {**new_ranks, **(config.get("rank_pattern") or {})},
        "alpha_pattern": {**alphas, **(config.get("alpha_pattern") or {})},
    }
    return (json.dumps(changed, indent=2, sort_keys=True) + "\n").encode()


def write_adapter(edited: Iterable[EditedLora], ft: Checkpoint, folder: Path, scratch: Path) -> list[EditedLora]:
    """Write the edited adapter into `folder`; returns what was edited, without the tensors.

    How many directions are kept is known only after the last of them: until then the factors lie in the file
    `scratch`, so that no more than one LoRA is ever in memory. Raises OutputError.
    """
    done: list[EditedLora] = []
    places: Places = {}
    with as_output_error(scratch), scratch.open("w+b") as buffer:
        for lora in edited:
            for name, tensor in ((lora.low.a, lora.A), (lora.low.b, lora.B)):
                if tensor is not None:
                    places[name] = lora.units[0].out_dtype, tuple(tensor.shape), buffer.tell()
                    buffer.write(to_bytes(tensor))
            done.append(dataclasses.replace(lora, A=None, B=None))
        buffer.flush()
        _assemble(ft, places, buffer.fileno(), folder)
    scratch.unlink()
    ranks = [(lora.low, lora.rank) for lora in done if lora.tensors]
    with as_output_error(folder), (folder / ADAPTER_CONFIG).open("wb") as file:
        file.write(configure(ft.adapter_config or {}, ranks))
        file.flush()
        os.fsync(file.fileno())
    return done


def agree(lora: EditedLora, made: Checkpoint, ft: Checkpoint, tolerance: float) -> bool:
    """Whether an edited adapter holds this LoRA: the same products of B and A, to a difference of norm `tolerance`.

    A LoRA whose every delta is zero has FT's bytes.
    """
    names = lora.low.b, lora.low.a
    if lora.B is None or lora.A is None:
        return all(_read_bytes(made, name) == _read_bytes(ft, name) for name in names)
    if any(made.tensors[name][1].dtype != lora.units[0].out_dtype for name in names):
        return False
    B, A = (_read(made, name) for name in names)
    if (A.shape, B.shape) != (lora.A.shape, lora.B.shape):
        return False
    sides = [
        (b.reshape(len(b), lora.rank, -1).permute(2, 0, 1).double(), a.reshape(-1, lora.rank, a.shape[1]).double())
        for b, a in ((B, A), (lora.B, lora.A))
    ]
    each = zip(*sides[0], *sides[1], strict=True)  # expert by expert
    squares = (float((b @ a - fresh_b @ fresh_a).square().sum()) for b, a, fresh_b, fresh_a in each)
    return abs(lora.low.scaling) * math.sqrt(sum(squares)) <= tolerance


def _read_bytes(side: Checkpoint, name: str) -> tuple[str, bytearray]:
    _, entry = side.tensors[name]
    return entry.dtype, side.read(name, entry.start, entry.nbytes)


def _assemble(ft: Checkpoint, places: Places, scratch: int, folder: Path) -> None:
    (weights,) = ft.files.values()
    ordered = sorted(weights.header.tensors.values(), key=lambda entry: (entry.start, entry.end))
    entries = [(e.name, *(places[e.name][:2] if e.name in places else (e.dtype, e.shape))) for e in ordered]
    raw = build_header(entries, weights.header.metadata)
    source = weights.file.path
    assert source is not None  # the adapter was opened whole
    with (folder / weights.name).open("wb") as target, source.open("rb") as original:
        target.write(raw)
        target.flush()
        position = len(raw)
        for entry, (name, dtype, shape) in zip(ordered, entries, strict=True):
            nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
            fd, start = (scratch, places[name][2]) if name in places else (original.fileno(), entry.start)
            copy_range(fd, start, target.fileno(), position, nbytes, lambda _: None)
            position += nbytes
        os.fsync(target.fileno())


def _edit_lora(units: list[Unit], ft: Checkpoint, spec: EditSpec, device: str) -> EditedLora:
    change = units[0].change
    assert change is not None and change.low is not None
    whole = change.low
    dtype = TORCH_DTYPES[units[0].out_dtype]
    A, B = (_read(ft, name) for name in (whole.a, whole.b))
    # (E, r, in) and (E, out, r), also where there is one matrix and no expert
    A = A.reshape(whole.experts, whole.rank, -1)
    B = B.reshape(B.shape[0], whole.rank, whole.experts).permute(2, 0, 1)
    rest_A, rest_B = A.clone(), B.clone()
    pieces: list[list[Factors]] = [[] for _ in range(whole.experts)]
    tensors: list[TensorRecord] = []
    kept: list[KeptRecord] = []
    for unit in units:
        assert unit.change is not None and unit.change.low is not None
        low = unit.change.low
        at = low.expert if low.expert is not None else unit.expert or 0
        rows = slice(*low.rows) if low.rows is not None else slice(None)
        for part in unit.parts:
            F, G = take_factors(*orient(B[at][rows], A[at], low), part)
            result = equalize_part(unit, part, (F * low.scaling, G), 0.0, spec, device)
            if isinstance(result, KeptRecord):
                reason = "its delta is zero: the adapter leaves it as it is in BASE"
                kept.append(dataclasses.replace(result, reason=reason))
                continue
            value = result.value.to("cpu", torch.float64)
            value = value.T if unit.transposed else value
            U, V = (factor.to(dtype) for factor in _factorise(value, G, result.k, low.scaling))
            if not bool(torch.isfinite(U).all() and torch.isfinite(V).all()):
                raise NumericalError(
                    f"tensor {printable(unit.name)}: the edited factors overflow {unit.out_dtype}; choose a smaller "
                    "--beta or --dtype float32"
                )
            lost = low.scaling * (U.double() @ V.double()) - value
            rounding = measure_norm(lost) / result.edit_norm
            tensors.append(record_part(unit, part, result, 0.0, rounding))
            pieces[at].append(_place(U, V, unit, part, rows, B.shape[1]))
            # What is selected leaves the old LoRA.
            _select(*orient(rest_B[at][rows], rest_A[at], low), part).zero_()
    if not tensors:
        return EditedLora(whole, tuple(units), None, None, whole.rank, (), tuple(kept))
    for mine, b, a in zip(pieces, rest_B, rest_A, strict=True):
        if bool(b.any()) and bool(a.any()):
            mine.append((b.to(dtype), a.to(dtype)))
    rank = max(sum(a.shape[0] for _, a in mine) for mine in pieces)
    new_A = torch.zeros(whole.experts, rank, A.shape[2], dtype=dtype)
    new_B = torch.zeros(B.shape[1], rank, whole.experts, dtype=dtype)
    for expert, mine in enumerate(pieces):
        first = 0
        for b, a in mine:
            last = first + a.shape[0]
            new_A[expert, first:last], new_B[:, first:last, expert] = a, b
            first = last
    return EditedLora(whole, tuple(units), new_A.flatten(0, 1), new_B.flatten(1, 2), rank, tuple(tensors), tuple(kept))


def _read(ft: Checkpoint, name: str) -> Tensor:
    _, entry = ft.tensors[name]
    stored = torch.frombuffer(ft.read(name, entry.start, entry.nbytes), dtype=TORCH_DTYPES[entry.dtype])
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(f"{ft.where(name)}: holds NaN or infinity; take an earlier save of it")
    return stored.reshape(entry.shape).to(torch.float64 if entry.dtype == "F64" else torch.float32)


def _factorise(value: Tensor, G: Tensor, k: int, scaling: float) -> Factors:
    """Balanced factors (F, G) of rank k with scaling * F G = value, whose rows lie in the span of the rows of G."""
    Q = torch.linalg.qr(G.double().T).Q
    U, S, Wh = torch.linalg.svd(value @ Q, full_matrices=False)
    share = (S[:k] / abs(scaling)).sqrt()
    return U[:, :k] * share * math.copysign(1.0, scaling), share[:, None] * (Wh[:k] @ Q.T)


def _place(U: Tensor, V: Tensor, unit: Unit, part: Part, rows: slice, outer: int) -> Factors:
    """The factors of a part as (B, A) of the whole module, zero outside of the part."""
    change = unit.change
    assert change is not None and change.low is not None
    k = U.shape[1]
    F, G = U.new_zeros(unit.shape[0], k), U.new_zeros(k, unit.shape[1])
    if part.block is None or part.block.axis == 1:
        F = U
    if part.block is None or part.block.axis == 0:
        G = V
    view, factor = _select(F, G, part), U if part.block is None or part.block.axis == 0 else V
    view.copy_(factor.reshape(view.shape))
    b, A = (G.T, F.T) if change.low.flipped else (F, G)
    B = U.new_zeros(outer, k)
    B[rows] = b
    return B, A


def _select(F: Tensor, G: Tensor, part: Part) -> Tensor:
    """A part's rows of F, or its columns of G, as a view; all of F for a whole matrix."""
    return put_view(F if part.block is None or part.block.axis == 0 else G, part)
