"""An edited adapter as the output: a LoRA with a selected matrix gets factors of the kept rank.

With U S V^T the edit of a matrix and s the scaling of its LoRA, which stays the same, the new B is U sqrt(S / s) and
the new A is sqrt(S / s) V^T. A LoRA of several matrices (halves of a fused tensor) has their factors stacked along the
rank, and after them the old factors of the matrices that were not selected.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pome.checkpoint.header import DTYPE_BITS, build_header, order_entries
from pome.checkpoint.leftovers import ADAPTER_CONFIG
from pome.checkpoint.lora import LowRank
from pome.checkpoint.lora_config import LoraConfig
from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.editing.lora_merge import cut_rows, orient, take_factors
from pome.editing.unit import TORCH_DTYPES, equalize_part, measure_norm, put_view, record_part, to_bytes
from pome.errors import NumericalError, printable
from pome.manifest import KeptRecord, TensorRecord
from pome.output.clone import copy_range
from pome.output.durable import as_output_error, sync_file
from pome.planning.units import Plan, Unit
from pome.roles.layout import Part

Factors = tuple[Tensor, Tensor]  # F (rows, k) and G (k, columns)
Places = dict[str, tuple[str, tuple[int, ...], int]]  # adapter tensor -> dtype, shape and offset in scratch


@dataclass(frozen=True)
class EditedLora:
    """One LoRA after the edit: A (E * rank, in) and B (out, rank * E). Both are None where every delta is zero."""

    low: LowRank
    units: tuple[Unit, ...]  # those whose matrices it holds
    dtype: str
    A: Tensor | None
    B: Tensor | None
    rank: int
    tensors: tuple[TensorRecord, ...]
    kept: tuple[KeptRecord, ...]


def edit_loras(plan: Plan, ft: Checkpoint, spec: EditSpec, device: str) -> Iterator[EditedLora]:
    """The LoRAs of a plan, edited one by one. Raises NumericalError."""
    pads = needs_padding(plan.loras)
    for members in group_by_lora(plan.units).values():
        yield _edit_lora(members, ft, spec, device, pads)


def group_by_lora(units: Iterable[Unit]) -> dict[str, list[tuple[Unit, LowRank]]]:
    """The LoRAs with a selected matrix, by the name of their A: the units that they change."""
    groups: dict[str, list[tuple[Unit, LowRank]]] = {}
    for unit in units:
        assert unit.change is not None and unit.change.lows  # the plan saw to it
        for low in unit.change.lows:
            groups.setdefault(low.a, []).append((unit, low))
    selected = {name for name, members in groups.items() for unit, low in members if any(_find_local_parts(unit, low))}
    return {name: members for name, members in groups.items() if name in selected}


def _find_local_parts(unit: Unit, low: LowRank) -> Iterator[tuple[Part, Part]]:
    """The selected parts of a unit that one LoRA changes, each beside the part that it is of the LoRA's own product."""
    for part in unit.parts:
        if low.part is None:
            yield part, part
        elif low.part.block == part.block:
            yield part, Part(part.role)


def needs_padding(loras: Iterable[LowRank]) -> bool:
    """Whether edited factors must keep the old rank, with zeros, and the config its patterns.

    PEFT loads LoRAs of single experts into stacks of one rank, and finds their rank by a name that is not theirs.
    """
    return any(low.kind == "expert" for low in loras)


def make_config(config: LoraConfig, loras: Iterable[tuple[LowRank, int]]) -> bytes:
    """The adapter_config.json of an edited adapter: the new rank of every LoRA, and the alpha that keeps its scaling.

    PEFT reads the keys of rank_pattern and alpha_pattern as regular expressions and takes the first that matches, in
    an order that a later save may change. So each LoRA that differs from the default gets a key that matches it alone,
    and no other key stays. Where every LoRA is read as before, the patterns stay as they are.
    """
    wanted = list(loras)
    changed = {**config.values, "init_lora_weights": True}  # some initialisations fit no rank but the old one
    if any(config.resolve(low.key) != (rank, low.scaling) for low, rank in wanted):
        keys = name_alone([low.key for low, _ in wanted])
        ranks: dict[str, Any] = {}
        alphas: dict[str, Any] = {}
        for low, rank in wanted:
            alpha = config.resolve_alpha(low.key)
            if rank != low.rank:
                alpha = low.scaling * (math.sqrt(rank) if config.get("use_rslora") else rank)
            if rank != config.get("r"):
                ranks[keys[low.key]] = rank
            if alpha != config.get("lora_alpha"):
                alphas[keys[low.key]] = alpha
        changed |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    # The patterns keep their order, which decides between two that match.
    return (json.dumps(dict(sorted(changed.items())), indent=2) + "\n").encode()


def name_alone(keys: Sequence[str]) -> dict[str, str]:
    """For each of the dotted names a regular expression that PEFT matches with no other of them.

    It is the end of the name, from the stack of layers on, which stays the same where a wrapper changes what stands
    before it; and more words where that is the end of another name too.
    """
    ends: Counter[str] = Counter()
    for key in keys:
        ends.update(_list_ends(key))
    found = {}
    for key in keys:
        words = key.split(".")
        stack = next((at - 1 for at, word in enumerate(words) if word.isdigit()), len(words) - 1)
        alone = next((end for end in reversed(_list_ends(key)[: max(stack, 0) + 1]) if ends[end] == 1), None)
        found[key] = re.escape(alone) if alone is not None else f"^{re.escape(key)}"
    return found


def _list_ends(key: str) -> list[str]:
    """The ends of a dotted name, longest first."""
    words = key.split(".")
    return [".".join(words[at:]) for at in range(len(words))]


def write_adapter(
    edited: Iterable[EditedLora], loras: Sequence[LowRank], ft: Checkpoint, folder: Path, scratch: Path
) -> list[EditedLora]:
    """Write the edited adapter into `folder`; returns what was edited, without the tensors. `loras` are all it has.

    How many directions are kept is known only after the last of them: until then the factors lie in the file
    `scratch`, so that no more than one LoRA is ever in memory. Raises OutputError.
    """
    done: list[EditedLora] = []
    places: Places = {}
    with as_output_error(scratch), scratch.open("w+b") as buffer:
        for lora in edited:
            for name, tensor in ((lora.low.a, lora.A), (lora.low.b, lora.B)):
                if tensor is not None:
                    places[name] = lora.dtype, tuple(tensor.shape), buffer.tell()
                    buffer.write(to_bytes(tensor))
            done.append(dataclasses.replace(lora, A=None, B=None))
        buffer.flush()
        _assemble(ft, places, buffer.fileno(), folder)
    scratch.unlink()
    ranks = {low.a: low.rank for low in loras} | {lora.low.a: lora.rank for lora in done if lora.tensors}
    with as_output_error(folder), (folder / ADAPTER_CONFIG).open("wb") as file:
        file.write(make_config(LoraConfig(ft), [(low, ranks[low.a]) for low in loras]))
        file.flush()
        sync_file(file.fileno())
    return done


def agree(lora: EditedLora, made: Checkpoint, ft: Checkpoint, tolerance: float) -> bool:
    """Whether an edited adapter holds this LoRA: the same products of B and A, to a difference of norm `tolerance`.

    A LoRA whose every delta is zero has FT's bytes.
    """
    names = lora.low.b, lora.low.a
    if lora.B is None or lora.A is None:
        return all(_read_bytes(made, name) == _read_bytes(ft, name) for name in names)
    if any(made.tensors[name][1].dtype != lora.dtype for name in names):
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
    stored = weights.header.tensors
    entries = order_entries(
        (e.name, *(places[e.name][:2] if e.name in places else (e.dtype, e.shape))) for e in stored.values()
    )
    raw = build_header(entries, weights.header.metadata)
    source = weights.file.path
    assert source is not None  # the adapter was opened whole
    with (folder / weights.name).open("wb") as target, source.open("rb") as original:
        target.write(raw)
        target.flush()
        position = len(raw)
        for name, dtype, shape in entries:
            nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
            fd, start = (scratch, places[name][2]) if name in places else (original.fileno(), stored[name].start)
            copy_range(fd, start, target.fileno(), position, nbytes, lambda _: None)
            position += nbytes
        sync_file(target.fileno())


def _edit_lora(
    members: list[tuple[Unit, LowRank]], ft: Checkpoint, spec: EditSpec, device: str, pads: bool
) -> EditedLora:
    units, whole = tuple(unit for unit, _ in members), members[0][1]
    out_dtype = units[0].out_dtype
    dtype = TORCH_DTYPES[out_dtype]
    A, B = (_read(ft, name) for name in (whole.a, whole.b))
    # (E, r, in) and (E, out, r), also where there is one matrix and no expert
    A = A.reshape(whole.experts, whole.rank, -1)
    B = B.reshape(B.shape[0], whole.rank, whole.experts).permute(2, 0, 1)
    rest_A, rest_B = A.clone(), B.clone()
    pieces: list[list[Factors]] = [[] for _ in range(whole.experts)]
    tensors: list[TensorRecord] = []
    kept: list[KeptRecord] = []
    for unit, low in members:
        at = 0 if low.experts == 1 else low.expert if low.expert is not None else unit.expert or 0
        for part, local in _find_local_parts(unit, low):
            F, G = take_factors(*orient(*cut_rows(B[at], A[at], low), low), local)
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
            # What is selected leaves the old LoRA.
            rest = orient(*cut_rows(rest_B[at], rest_A[at], low), low)
            pieces[at].append(_place(U, V, local, low, rest, (B.shape[1], A.shape[2])))
            _select(*rest, local).zero_()
    if not tensors:
        return EditedLora(whole, units, out_dtype, None, None, whole.rank, (), tuple(kept))
    for mine, b, a in zip(pieces, rest_B, rest_A, strict=True):
        if bool(b.any()) and bool(a.any()):
            mine.append((b.to(dtype), a.to(dtype)))
    rank = max(sum(a.shape[0] for _, a in mine) for mine in pieces)
    if pads:
        rank = max(rank, whole.rank)
    new_A = torch.zeros(whole.experts, rank, A.shape[2], dtype=dtype)
    new_B = torch.zeros(B.shape[1], rank, whole.experts, dtype=dtype)
    for expert, mine in enumerate(pieces):
        first = 0
        for b, a in mine:
            last = first + a.shape[0]
            new_A[expert, first:last], new_B[:, first:last, expert] = a, b
            first = last
    factors = new_A.flatten(0, 1), new_B.flatten(1, 2)
    return EditedLora(whole, units, out_dtype, *factors, rank, tuple(tensors), tuple(kept))


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


def _place(U: Tensor, V: Tensor, part: Part, low: LowRank, sides: Factors, size: tuple[int, int]) -> Factors:
    """The factors of a part as (B, A) of the whole LoRA of `size` (out, in), zero outside of the part.

    `sides` are the old (F, G) of the stored tensor that the part is of.
    """
    k = U.shape[1]
    F, G = U.new_zeros(sides[0].shape[0], k), U.new_zeros(k, sides[1].shape[1])
    if part.block is None or part.block.axis == 1:
        F = U
    if part.block is None or part.block.axis == 0:
        G = V
    view, factor = _select(F, G, part), U if part.block is None or part.block.axis == 0 else V
    view.copy_(factor.reshape(view.shape))
    b, a = (G.T, F.T) if low.flipped else (F, G)
    B, A = U.new_zeros(size[0], k), U.new_zeros(k, size[1])
    mine = cut_rows(B, A, low)
    mine[0].copy_(b)
    mine[1].copy_(a)
    return B, A


def _select(F: Tensor, G: Tensor, part: Part) -> Tensor:
    """A part's rows of F, or its columns of G, as a view; all of F for a whole matrix."""
    return put_view(F if part.block is None or part.block.axis == 0 else G, part)
