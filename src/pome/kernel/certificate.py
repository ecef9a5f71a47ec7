"""Proof that a P is what the method asks for, from P itself and without a second decomposition.

P maximises <D, P> over rank(P) <= k and spectral norm <= 1, and the optimum is s_1 + ... + s_k (Ky Fan). So P is right
when its non-zero singular values are 1, there are k of them, and <D, P> attains the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-5
# The mean square of s Gaussian probes of E is an unbiased estimate of norm_F(E)^2. Its worst case is an E of rank
# one, a chi-square of s degrees: with 8, an E ten times over the tolerance passes with probability below 2e-7, one
# three times over with 0.1 %. An E of higher rank, which is what rounding leaves, is estimated far more sharply.
PROBES = 8
SEED = 20251006
CHUNK = 1 << 18  # entries multiplied in one go, small enough to stay in the cache


@dataclass(frozen=True)
class Certificate:
    """objective = <D, P> / (s_1 + ... + s_k); orthogonality = norm_F(P P^T P - P) / norm_F(P); norm = norm_F(P)."""

    objective: float
    orthogonality: float
    norm: float
    k: int

    def find_fault(self) -> str | None:
        """What is wrong with P, or None. A NaN fails every comparison, and so is a fault."""
        if not self.orthogonality <= TOLERANCE:
            return f"orthogonality {self.orthogonality:.1e}"
        if not abs(self.norm**2 - self.k) < 0.5:
            return f"{self.norm**2:.2f} directions instead of {self.k}"
        if not abs(1.0 - self.objective) <= TOLERANCE:
            return f"1 - objective {1.0 - self.objective:.1e}"
        return None


def certify(P: Tensor, k: int, inner: float, attainable: float) -> Certificate:
    """Certificate of P (m x n): `inner` is <D, P>, `attainable` is s_1 + ... + s_k of D."""
    norm = math.sqrt(squared_norm(P))
    return Certificate(inner / attainable, probe_orthogonality(P) / norm if norm else math.nan, norm, k)


def inner_product(D: Tensor, P: Tensor) -> float:
    """<D, P>, both m x n: rows in their own precision, their sum in float64."""
    pairs = zip(split_rows(D), split_rows(P), strict=True)
    return sum(float((d * p).sum(dim=1).cpu().double().sum()) for d, p in pairs)


def inner_factors(b: Tensor, a: Tensor, P: Tensor) -> float:
    """<b @ a, P> for b m x r and a r x n, without the product."""
    return inner_product(a, b.mT @ P)


def squared_norm(matrix: Tensor) -> float:
    """norm_F(matrix)^2."""
    return inner_product(matrix, matrix)


def probe_orthogonality(P: Tensor) -> float:
    """norm_F(P P^T P - P): estimated by seeded Gaussian probes, exact where the short side has no more than those."""
    tall = P if P.shape[0] >= P.shape[1] else P.mT
    n = tall.shape[1]
    if n <= PROBES:
        probes = torch.eye(n, dtype=P.dtype, device=P.device)
    else:
        probes = draw_gaussian(n, PROBES, P) / math.sqrt(PROBES)
    once = tall @ probes
    again = tall @ (tall.mT @ once)
    return math.sqrt(squared_norm(again - once))


def draw_gaussian(rows: int, columns: int, like: Tensor) -> Tensor:
    """rows x columns Gaussian numbers in the dtype and on the device of `like`: the same ones on every device and in
    every call, drawn without touching the global generator."""
    generator = torch.Generator(device="cpu").manual_seed(SEED)
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(like.device, like.dtype)


def split_rows(matrix: Tensor) -> tuple[Tensor, ...]:
    """The matrix in blocks of rows of about CHUNK entries."""
    return torch.split(matrix, max(1, CHUNK // matrix.shape[1]))
