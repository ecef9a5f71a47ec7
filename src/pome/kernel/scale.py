"""How long the edit is: alpha = beta * alpha_0, with alpha_0 by rule (POME, equations 12 and 18)."""

from __future__ import annotations

import math

from torch import Tensor

SCALES = ("frobenius", "unit", "rms", "mean", "spectral")


def choose_scale(name: str, sigma: Tensor, k: int, shape: tuple[int, int], delta_norm: float) -> float:
    """alpha_0 for an m x n matrix with singular values `sigma` (descending, float64) of which k are kept.

    `frobenius` keeps the Frobenius norm of the delta, `unit` is 1, `rms` is sqrt(fan_out / fan_in), `mean` the mean
    of the kept singular values, `spectral` the largest. Raises ValueError for another name.
    """
    if name == "frobenius":
        return delta_norm / math.sqrt(k)
    if name == "unit":
        return 1.0
    if name == "rms":
        return math.sqrt(shape[0] / shape[1])
    if name == "mean":
        return float(sigma[:k].mean())
    if name == "spectral":
        return float(sigma[0])
    raise ValueError(f"scale {name!r} is none of {', '.join(SCALES)}")
