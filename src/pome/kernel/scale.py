"""Scale rules: the norm of an edit, alpha = beta * alpha_0, with alpha_0 by rule (POME, equations 12 and 18).

A rule is one function here and one row in `pome.choices.SCALES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pome.choices import SCALES


@dataclass(frozen=True)
class Cut:
    """What a scale rule sees of an m x n delta: its singular values (descending, float64), k and Frobenius norm."""

    sigma: Tensor
    k: int
    shape: tuple[int, int]
    delta_norm: float


RULES: dict[str, Callable[[Cut], float]] = {
    # keeps the Frobenius norm of the delta
    "frobenius": lambda cut: cut.delta_norm / math.sqrt(cut.k),
    "unit": lambda cut: 1.0,
    # sqrt(fan_out / fan_in)
    "rms": lambda cut: math.sqrt(cut.shape[0] / cut.shape[1]),
    "mean": lambda cut: float(cut.sigma[: cut.k].mean()),
    "spectral": lambda cut: float(cut.sigma[0]),
}


def choose_scale(name: str, sigma: Tensor, k: int, shape: tuple[int, int], delta_norm: float) -> float:
    """alpha_0 for an m x n matrix with singular values `sigma` (descending, float64) of which k are kept.

    Raises ValueError for an unknown name.
    """
    check_scale(name)
    return RULES[name](Cut(sigma, k, shape, delta_norm))


def check_scale(name: str) -> None:
    """Raise ValueError for an unknown scale."""
    if name not in RULES:
        raise ValueError(f"scale {name!r} is none of {', '.join(SCALES)}")
