"""Measurement of one unit for `pome inspect`: from bytes of FT and BASE to a record for each of its matrices."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pome.choices import RANK_RULES, SCALES
from pome.config.spec import EditSpec
from pome.editing.lora_merge import Data, find_factors, load_pieces, merge_as_peft
from pome.editing.unit import TORCH_DTYPES, check_finite, describe_part, send, take
from pome.errors import NumericalError
from pome.inspection.records import Matrix, find_place
from pome.inspection.weights import measure_weights
from pome.kernel.alignment import measure_alignment
from pome.kernel.equalize import Unsolved, ZeroDelta
from pome.kernel.noise import RoundingGrid, measure_grid
from pome.kernel.rank import RankRule, count_signal, measure_effective
from pome.kernel.scale import KeptSpectrum, find_gain
from pome.kernel.values import measure_product, measure_values
from pome.manifest import KeptRecord
from pome.planning.units import Unit, fan_out_in
from pome.roles.layout import Part

SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Seen:
    """One matrix of both sides, as stored: W of the base in working precision, the delta (D,) or its factors (F, G).

    `noise` is the grid that FT was rounded to (None where nothing was rounded), `stored` that which the edited weight
    will be rounded to, and `on_grid` says that the base's weights lie on it.
    """

    W: Tensor
    delta: tuple[Tensor, ...]
    noise: RoundingGrid | None
    stored: RoundingGrid
    on_grid: bool
    changed: float | None


def measure_unit(
    unit: Unit, data: Data, spec: EditSpec, device: str, weights: bool = False
) -> list[Matrix | KeptRecord]:
    """A record for every selected matrix of a unit, with that of its `weights` if they are asked for.

    Raises NumericalError for NaN or infinity on either side, and where no solver could be certified.
    """
    mine, base_bytes = data
    base = torch.frombuffer(base_bytes, dtype=TORCH_DTYPES[unit.base_dtype]).reshape(unit.shape)
    seen: Iterator[Seen]
    if isinstance(mine, dict):
        tensors = load_pieces(mine)
        for tensor in tensors.values():
            check_finite(unit, unit.parts[0], tensor, base)
        seen = (_see_adapted(unit, part, tensors, base) for part in unit.parts)
    else:
        ft = torch.frombuffer(mine, dtype=TORCH_DTYPES[unit.dtype]).reshape(unit.shape)
        seen = (_see(unit, part, ft, base) for part in unit.parts)
    return [_measure(unit, part, one, spec, device, weights) for part, one in zip(unit.parts, seen, strict=True)]


def _see(unit: Unit, part: Part, ft: Tensor, base: Tensor) -> Seen:
    new, old = take(ft, part), take(base, part)
    check_finite(unit, part, new, old)
    working = torch.float64 if torch.float64 in (new.dtype, old.dtype) else torch.float32
    W = old.to(working)
    D = new.to(working) - W  # as the edit does: never subtract in storage dtype
    grid = measure_grid(new)
    on_grid = torch.promote_types(new.dtype, old.dtype) == new.dtype
    return Seen(W, (D,), grid, grid, on_grid, float(torch.count_nonzero(D)) / D.numel())


def _see_adapted(unit: Unit, part: Part, tensors: Mapping[str, Tensor], base: Tensor) -> Seen:
    """A plain LoRA by its factors; what else an adapter may change, by the merged weight before it is rounded."""
    change = unit.change
    assert change is not None
    old = take(base, part)
    W = old.to(torch.float64 if base.dtype == torch.float64 else torch.float32)
    delta: tuple[Tensor, ...] | None = find_factors(change, part, tensors, unit.expert, W.dtype)
    if delta is None:
        exact, _ = merge_as_peft(change, tensors, unit.expert, base)
        delta = (take(exact, part) - W,)
    return Seen(W, delta, None, measure_grid(old), True, None)


def _measure(unit: Unit, part: Part, seen: Seen, spec: EditSpec, device: str, weights: bool) -> Matrix | KeptRecord:
    W = send(seen.W.T if unit.transposed else seen.W, device)
    D = tuple(send(factor.T, device) for factor in reversed(seen.delta)) if unit.transposed else seen.delta
    D = tuple(factor.to(W.device) for factor in D)
    try:
        values = measure_values(D[0]) if len(D) == 1 else measure_product(*D)
    except ZeroDelta:
        return KeptRecord(unit.name, unit.label(part), "its delta is zero: FT equals BASE")
    except (Unsolved, ValueError) as error:
        raise NumericalError(
            f"{describe_part(unit, part)}: {error}; leave it out with --exclude to see the others"
        ) from None
    sigma, rank, shape = values.sigma, values.rank, fan_out_in(unit, part)
    squares = sigma.square()
    norm = float(squares.sum().sqrt())
    base_norm = float(torch.linalg.vector_norm(W, dtype=torch.float64 if W.device.type == "cpu" else None))
    floor = seen.noise.noise_floor if seen.noise else 0.0
    k = {name: rule.choose(sigma, rank, shape) for name, rule in _make_rules(spec, floor).items()}
    alpha = {name: find_gain(name, KeptSpectrum(sigma, k["ratio"], shape, norm)) for name in SCALES}
    edit_ratio = {name: value * math.sqrt(k["ratio"]) / norm for name, value in alpha.items()}
    alignment = measure_alignment(W, D, norm)
    return Matrix(
        name=unit.name,
        part=unit.label(part),
        role=part.role,
        place=find_place(unit.name),
        shape=shape,
        dtype=unit.dtype,
        base_norm=base_norm,
        delta_norm=norm,
        relative_norm=norm / base_norm if base_norm else None,
        rank=rank,
        stable_rank=float(squares.sum() / squares[0]),
        effective_rank=measure_effective(sigma),
        energy={str(K): float(squares[: max(1, round(K * rank))].sum() / squares.sum()) for K in SHARES},
        noise_floor=floor,
        noise_share=(seen.noise.noise_norm / norm) ** 2 if seen.noise else 0.0,
        above_noise=min(rank, count_signal(sigma, floor, shape)),
        changed=seen.changed,
        k=k,
        alpha=alpha,
        edit_ratio=edit_ratio,
        rounding=seen.stored.expect_rounding(norm, seen.on_grid),
        align_r=alignment.r,
        align_left=alignment.left,
        align_right=alignment.right,
        drift=alignment.drift if math.isfinite(alignment.drift) else None,
        spectral_norm=alignment.spectral_norm,
        sigma=array("f", sigma.tolist()),
        weights=measure_weights(unit, part, seen.W, seen.delta, floor, spec, device) if weights else None,
    )


def _make_rules(spec: EditSpec, floor: float) -> dict[str, RankRule]:
    """Every rule that needs no number of its own."""
    numbers = {**vars(spec), "rank": None}
    return {name: RankRule.from_options(name, numbers, floor) for name in RANK_RULES if name != "fixed"}
