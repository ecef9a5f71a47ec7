"""Edit of one unit: from bytes of FT and BASE to bytes of the output and a record for each matrix."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import NumericalError, printable
from pome.kernel.decomposition import DecompositionCache
from pome.kernel.equalize import Equalized, Recipe, Unsolved, ZeroDelta, equalize_matrix, equalize_product
from pome.kernel.equivalence import Matched, match_matrix
from pome.kernel.noise import storage_noise_floor
from pome.kernel.precision import full_precision
from pome.kernel.rank import RankRule
from pome.manifest import KeptRecord, TensorRecord, sample_spectrum
from pome.planning.units import FLOAT64_ENTRIES, BaseRange, Unit, fan_out_in
from pome.roles.layout import Part

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Fields of a record that the kernel decides: all that do not follow from the unit and its bytes.
MEASURED = [
    field.name
    for field in dataclasses.fields(TensorRecord)
    if field.name not in ("name", "part", "file", "role", "shape", "dtype", "noise_floor", "rounding", "spectrum")
]

Result = TypeVar("Result", Equalized, Matched)
# Finds the cache of a matrix's decompositions, for a sweep that edits it many times.
FindCache = Callable[[Unit, Part], DecompositionCache]


@dataclass(frozen=True)
class Patch:
    """Result for one unit: its bytes in the output (None where FT's bytes stay) and the records of its matrices."""

    unit: Unit
    data: bytearray | None
    tensors: tuple[TensorRecord, ...]
    kept: tuple[KeptRecord, ...]
    kernel_seconds: float


def patch_unit(
    unit: Unit,
    ft_bytes: bytearray,
    base_bytes: bytearray,
    spec: EditSpec,
    device: str,
    caches: FindCache | None = None,
) -> Patch:
    """Edit the selected matrices of a unit on `device`; `ft_bytes` is edited in place where the dtype stays.

    Raises NumericalError for NaN or infinity on either side, an edit that the output dtype cannot hold, and a matrix
    that no solver could certify.
    """
    ft = torch.frombuffer(ft_bytes, dtype=TORCH_DTYPES[unit.dtype]).reshape(unit.shape)
    base = torch.frombuffer(base_bytes, dtype=TORCH_DTYPES[unit.base_dtype]).reshape(unit.shape)
    if unit.out_dtype == unit.dtype:
        data, out = ft_bytes, ft
    else:
        data = bytearray(unit.out_nbytes)
        out = torch.frombuffer(data, dtype=TORCH_DTYPES[unit.out_dtype]).reshape(unit.shape)
        out.copy_(ft)
    edited: list[TensorRecord] = []
    kept: list[KeptRecord] = []
    seconds = 0.0
    for part in unit.parts:
        begun = time.perf_counter()
        record = _edit_part(unit, part, take(ft, part), take(base, part), put_view(out, part), spec, device, caches)
        if isinstance(record, TensorRecord):
            edited.append(record)
        else:
            kept.append(record)
        seconds += time.perf_counter() - begun
    check_range(unit, out, ft)
    unchanged = not edited and data is ft_bytes
    return Patch(unit, None if unchanged else data, tuple(edited), tuple(kept), seconds)


def check_range(unit: Unit, out: Tensor, source: Tensor) -> None:
    """Raise NumericalError where another dtype made infinity of a value that was none, edited or not."""
    if out.dtype != source.dtype and bool((torch.isfinite(source) & ~torch.isfinite(out)).any()):
        raise NumericalError(
            f"tensor {printable(unit.name)}: its values overflow {unit.out_dtype}; choose --dtype bfloat16 or float32, "
            "or leave it out with --exclude"
        )


def to_bytes(tensor: Tensor) -> bytearray:
    """A tensor's entries as they are stored; not through numpy, which pome does not depend on."""
    data = bytearray(tensor.numel() * tensor.element_size())
    if data:
        torch.frombuffer(data, dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return data


def put_view(stored: Tensor, part: Part | BaseRange) -> Tensor:
    """A view of a part's entries in a stored tensor, its blocked axis still split into (count, size)."""
    block = part.block
    if block is None:
        return stored
    # Splitting an axis keeps a view a view, whatever the strides are.
    sizes = list(stored.shape)
    sizes[block.axis : block.axis + 1] = [block.count, block.period]
    return stored.view(sizes).narrow(block.axis + 1, block.start, block.size)


def gather_base(unit: Unit, base: Checkpoint) -> bytearray:
    """The matrices of a unit that BASE stores elsewhere or the other way round, laid out as FT's; zero between them."""
    data = bytearray(math.prod(unit.shape) * TORCH_DTYPES[unit.base_dtype].itemsize)
    out = torch.frombuffer(data, dtype=TORCH_DTYPES[unit.base_dtype]).reshape(unit.shape)
    read: dict[tuple[str, int], bytearray] = {}
    for part, lies in zip(unit.parts, unit.base_parts, strict=True):
        if (lies.name, lies.start) not in read:
            read[lies.name, lies.start] = base.read(lies.name, lies.start, lies.nbytes)
        stored = torch.frombuffer(read[lies.name, lies.start], dtype=TORCH_DTYPES[lies.dtype]).reshape(lies.shape)
        matrix = take(stored, lies)
        view = put_view(out, part)
        view.copy_((matrix if lies.transposed == unit.transposed else matrix.T).reshape(view.shape))
    return data


def take(stored: Tensor, part: Part | BaseRange) -> Tensor:
    """A part's entries in a stored tensor as one 2-D tensor (a copy where they do not lie together)."""
    view = put_view(stored, part)
    return view if part.block is None else view.flatten(part.block.axis, part.block.axis + 1)


def _edit_part(
    unit: Unit,
    part: Part,
    ft: Tensor,
    base: Tensor,
    out: Tensor,
    spec: EditSpec,
    device: str,
    caches: FindCache | None,
) -> TensorRecord | KeptRecord:
    """Edit one matrix; `ft` and `base` as stored (transposed or not), `out` the view that the result is written to."""
    check_finite(unit, part, ft, base)
    # bf16 values subtract exactly in float32 unless their exponents are 16 apart; never subtract in storage dtype.
    # Where float64 costs next to nothing it is used: then entries in which base and edit cancel are right, too.
    exact = torch.float64 in (ft.dtype, base.dtype) or ft.numel() <= FLOAT64_ENTRIES
    working = torch.float64 if exact else torch.float32
    W_base = base.to(working)
    D = ft.to(working) - W_base
    return edit_part(unit, part, (D,), W_base, out, storage_noise_floor(ft), spec, device, caches)


def check_finite(unit: Unit, part: Part, ft: Tensor, base: Tensor) -> None:
    """Raise NumericalError where one side of a matrix holds NaN or infinity."""
    for side, stored in (("FT", ft), ("BASE", base)):
        if not bool(torch.isfinite(stored).all()):
            raise NumericalError(
                f"{describe_part(unit, part)}: {side} holds NaN or infinity; mend the checkpoint or leave the tensor "
                "out with --exclude"
            )


def describe_part(unit: Unit, part: Part) -> str:
    """`tensor NAME (expert=3)`, for messages."""
    label = unit.label(part)
    return f"tensor {printable(unit.name)}{f' ({label})' if label else ''}"


def edit_part(
    unit: Unit,
    part: Part,
    delta: tuple[Tensor, ...],
    W_base: Tensor,
    out: Tensor,
    floor: float,
    spec: EditSpec,
    device: str,
    caches: FindCache | None = None,
) -> TensorRecord | KeptRecord:
    """Find the edit of a delta, add it to `W_base` and write the sum to `out`, all as stored (transposed or not).

    `delta` is D itself (m x n), or (F, G) with D = F G. Raises NumericalError.
    """
    result: Equalized | Matched | KeptRecord
    if spec.resolve(unit.name).method == "equivalence":
        result = match_part(unit, part, delta, W_base, spec, device, caches)
    else:
        result = equalize_part(unit, part, delta, floor, spec, device, caches)
    if isinstance(result, KeptRecord):
        return result
    value = result.value.to("cpu")
    edit = value.T if unit.transposed else value
    W = (W_base + edit).to(out.dtype)
    if not bool(torch.isfinite(W).all()):
        raise NumericalError(
            f"{describe_part(unit, part)}: the edited weight overflows {str(out.dtype).removeprefix('torch.')}; choose "
            "a smaller --beta or --dtype float32"
        )
    # The difference of stored and base weights is exact in float32 for near values (Sterbenz), and so is the rest.
    lost = torch.sub(W.to(W_base.dtype), W_base).sub_(edit)
    out.copy_(W.reshape(out.shape))
    rounding = measure_norm(lost) / result.edit_norm if result.edit_norm else 0.0
    return record_part(unit, part, result, floor, rounding)


def measure_norm(A: Tensor) -> float:
    """norm_F(A), which is overwritten, also where the squares of its entries leave the range of its dtype."""
    low, high = torch.aminmax(A)
    largest = max(-float(low), float(high))
    return largest * float(torch.linalg.vector_norm(A.div_(largest))) if largest else 0.0


def equalize_part(
    unit: Unit,
    part: Part,
    delta: tuple[Tensor, ...],
    floor: float,
    spec: EditSpec,
    device: str,
    caches: FindCache | None = None,
) -> Equalized | KeptRecord:
    """The kernel's answer for a delta as stored, or why there is none. Raises NumericalError."""
    spec = spec.resolve(unit.name)

    def equalize(cache: DecompositionCache | None) -> Equalized:
        operands = [factor.T for factor in reversed(delta)] if unit.transposed else delta
        sent = [send(operand, device) for operand in operands]
        rule = RankRule.from_options(spec.rank_rule, vars(spec), floor)
        recipe = Recipe(rule, spec.scale, spec.beta, spec.power)
        if len(sent) == 1:
            return equalize_matrix(sent[0], recipe, cache)
        return equalize_product(sent[0], sent[1], recipe, cache)

    return _solve_part(unit, part, equalize, caches)


def match_part(
    unit: Unit,
    part: Part,
    delta: tuple[Tensor, ...],
    W_base: Tensor,
    spec: EditSpec,
    device: str,
    caches: FindCache | None = None,
) -> Matched | KeptRecord:
    """The kernel's answer for the fine-tuned weight W_base + delta, as stored, by the method `equivalence`.

    The sum is exact where the delta is a difference of stored weights. Raises NumericalError.
    """
    spec = spec.resolve(unit.name)

    def match(cache: DecompositionCache | None) -> Matched:
        with full_precision(W_base.device):
            W_ft = W_base.double() + (delta[0] if len(delta) == 1 else delta[0].double() @ delta[1].double())
        sides = [W_base, W_ft]
        sent = [send(side.T if unit.transposed else side, device) for side in sides]
        if sent[0].device != sent[1].device:
            sent = [side.cpu() for side in sent]
        return match_matrix(sent[0], sent[1], spec.beta, cache)

    return _solve_part(unit, part, match, caches)


def _solve_part(
    unit: Unit, part: Part, solve: Callable[[DecompositionCache | None], Result], caches: FindCache | None
) -> Result | KeptRecord:
    """The kernel's result for a part, or the reason for leaving it. Raises NumericalError."""
    try:
        return solve(caches(unit, part) if caches else None)
    except ZeroDelta:
        return KeptRecord(unit.name, unit.label(part), "its delta is zero: FT equals BASE")
    except (Unsolved, ValueError) as error:  # no solver, or numbers out of the range of floats
        where = describe_part(unit, part)
        raise NumericalError(f"{where}: {error}; leave it out with --exclude to edit the others") from None


def record_part(unit: Unit, part: Part, result: Equalized | Matched, floor: float, rounding: float) -> TensorRecord:
    """The manifest's record of an edited matrix; None in the fields that its method does not have."""
    measured: dict[str, Any] = {name: getattr(result, name, None) for name in MEASURED}
    return TensorRecord(
        name=unit.name,
        part=unit.label(part),
        file=unit.file,
        role=part.role,
        shape=fan_out_in(unit, part),
        dtype=unit.out_dtype,
        noise_floor=floor,
        rounding=rounding,
        spectrum=sample_spectrum(result.sigma[: getattr(result, "rank", None)].tolist()),
        **measured,
    )


def send(D: Tensor, device: str) -> Tensor:
    """D on `device`, or left on the CPU where the device cannot hold it (memory, or float64 on MPS)."""
    try:
        return D.to(device)
    except (torch.cuda.OutOfMemoryError, TypeError):
        return D


def list_devices(device: str) -> list[str]:
    """The devices to work on: `auto` is every CUDA device, else MPS, else the CPU; `cuda` is every CUDA device.

    Raises NumericalError for one that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    cuda = [f"cuda:{i}" for i in range(count)]
    if device == "auto":
        return cuda or (["mps"] if mps else ["cpu"])
    if device == "cuda" and cuda:
        return cuda
    if device == "cpu" or (device == "mps" and mps) or device in cuda:
        return [device]
    raise NumericalError(f"device {device} is not there ({count} CUDA devices); use --device auto or cpu")
