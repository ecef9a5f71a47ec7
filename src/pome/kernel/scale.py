"""Scale rules: alpha = beta * alpha_0 with alpha_0 by rule (POME, equations 12 and 18).

A rule is one function here and one row in `pome.choices.SCALES`. With a power p the edit is alpha * U_k S_k^p V_k^T. A
rule answers for U_k (S_k / s_1)^p V_k^T, whose entries do not overflow: the gain alpha_0 * s_1^p.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pome.choices import SCALES


@dataclass(frozen=True)
class KeptSpectrum:
    """Input of a scale rule: of an m x n delta the singular values (descending, float64), k, norm_F(D) and p."""

    sigma: Tensor
    k: int
    shape: tuple[int, int]
    delta_norm: float
    power: float = 0.0

    @property
    def weights(self) -> Tensor:
        """(s_i / s_1)^p of the k kept directions."""
        return (self.sigma[: self.k] / self.sigma[0]) ** self.power


def raise_to(base: float, power: float) -> float:
    """base^power, infinite where no float is as large."""
    try:
        return float(base**power)
    except OverflowError:
        return math.inf


RULES: dict[str, Callable[[KeptSpectrum], float]] = {
    # the edit has the Frobenius norm of the delta
    "frobenius": lambda kept: kept.delta_norm / math.sqrt(float(kept.weights.square().sum())),
    # alpha_0 = 1
    "unit": lambda kept: raise_to(float(kept.sigma[0]), kept.power),
    # the largest singular value of the edit is sqrt(fan_out / fan_in)
    "rms": lambda kept: math.sqrt(kept.shape[0] / kept.shape[1]),
    # the edit has the mean of the kept singular values
    "mean": lambda kept: float(kept.sigma[: kept.k].mean()) / float(kept.weights.mean()),
    # the edit has the largest singular value of the delta
    "spectral": lambda kept: float(kept.sigma[0]),
}


def find_gain(name: str, kept: KeptSpectrum) -> float:
    """alpha_0 * s_1^p by the scale `name`. Raises ValueError for an unknown name."""
    check_scale(name)
    return RULES[name](kept)


def check_scale(name: str) -> None:
    """Raise ValueError for an unknown scale."""
    if name not in RULES:
        raise ValueError(f"scale {name!r} is none of {', '.join(SCALES)}")
