"""Measurement of a unit's weights for `pome inspect --weights`: of BASE, FT, and what an edit by each method gives."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from pome.config.spec import EditSpec
from pome.editing.unit import describe_part, equalize_part, match_part, send
from pome.errors import NumericalError
from pome.inspection.records import CHANGED, Weights
from pome.kernel.energy import find_directions, measure_energy
from pome.kernel.equalize import Equalized, Unsolved
from pome.kernel.equivalence import Matched, find_spectrum
from pome.kernel.precision import full_precision, to_float64
from pome.planning.units import Unit
from pome.roles.layout import Part


def measure_weights(
    unit: Unit, part: Part, W: Tensor, delta: tuple[Tensor, ...], floor: float, spec: EditSpec, device: str
) -> Weights:
    """Drift and energy of one matrix, as Weights has them, from BASE's W and the delta (D,) or (F, G), all as stored.

    Raises NumericalError where no solver could be certified.
    """
    spec = spec.resolve(unit.name)
    base, *factors = (to_float64(send(A.T if unit.transposed else A, device)) for A in (W, *delta))
    factors = factors[::-1] if unit.transposed else factors
    with full_precision(base.device):
        D = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
    matched = None
    if bool(base.any()) and bool((base + D).any()):  # else one side has no singular directions
        matched = match_part(unit, part, delta, W, dataclasses.replace(spec, beta=1.0), device)
    edit = equalize_part(unit, part, delta, floor, spec, device)
    assert isinstance(edit, Equalized)  # zero deltas are told apart before
    changes = {"fine_tuned": D, "equalized": edit.value}
    if isinstance(matched, Matched):  # a delta that is nothing beside the weight leaves it as it is
        changes["equivalence"] = matched.value
    directions = {"base": find_directions(base)}
    drift: dict[str, float | None] = dict.fromkeys(CHANGED)
    try:
        sigma = matched.sigma if isinstance(matched, Matched) else find_spectrum(base)
        norm = float(sigma.norm())
        for name, change in changes.items():
            weight = base + to_float64(change).to(base.device)
            directions[name] = find_directions(weight)
            drift[name] = float((find_spectrum(weight) - sigma).norm()) / norm if norm else None
    except Unsolved as error:
        where = describe_part(unit, part)
        raise NumericalError(f"{where}: {error}; leave it out with --exclude to see the others") from None
    found = measure_energy(list(directions.values()))
    means = dict(zip(directions, found.means, strict=True))
    return Weights(
        k=edit.k,
        alpha=edit.alpha,
        spectral_drift=drift,
        hyperspherical_energy={name: means.get(name) for name in ("base", *CHANGED)},
        rows=found.rows,
        zero_rows=found.zero_rows,
        identical_pairs=found.identical_pairs,
    )
