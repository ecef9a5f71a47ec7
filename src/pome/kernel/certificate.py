"""Proof that a P is what the method asks for, from P itself and without a second decomposition.

P maximises <D, P> over rank(P) <= k and spectral norm <= 1, and the optimum is s_1 + ... + s_k (Ky Fan). So P is right
when its non-zero singular values are 1, there are k of them, and <D, P> attains the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-5
# The mean square of s Gaussian probes of E is an unbiased estimate of norm_F(E)^2. Its worst case is an E of rank
# one, a chi-square of s degrees: with 8, an E ten times over the tolerance passes with probability below 2e-7, one
# three times over with 0.1 %. An E of higher rank, which is what rounding leaves, is estimated far more sharply.
PROBES = 8
SEED = 20251006
BLOCK = 1 << 17  # entries looked at in one go: they stay in the cache
# <D, P> of the rows in a slice, P given as the block of those rows.
Inner = Callable[[slice, Tensor], float]


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


def certify(P: Tensor, k: int, attainable: float, inner: Inner) -> Certificate:
    """Certificate of P (m x n) against a D with s_1 + ... + s_k = `attainable`.

    P P^T P - P is seen through Gaussian probes, or as a whole where one side has no more than PROBES. Two passes over
    P, in blocks of rows that stay in the cache.
    """
    m, n = P.shape
    if m <= PROBES < n:
        return certify(P.mT, k, attainable, lambda rows, block: inner(slice(None), P) if rows.start == 0 else 0.0)
    probes = torch.eye(n).to(P) if n <= PROBES else draw_gaussian(n, PROBES, P) / math.sqrt(PROBES)
    once, again = P.new_empty(m, probes.shape[1]), torch.zeros_like(probes)
    product, square = 0.0, 0.0
    for rows in split_rows(P):
        block = P[rows]
        torch.mm(block, probes, out=once[rows])
        again.addmm_(block.mT, once[rows])
        product += inner(rows, block)
        square += dot(block, block)
    defect = P @ again - once
    norm = math.sqrt(square)
    return Certificate(product / attainable, math.sqrt(dot(defect, defect)) / norm if norm else math.nan, norm, k)


def inner_dense(D: Tensor) -> Inner:
    """<D, P>, by blocks of rows, for D m x n."""
    return lambda rows, block: dot(D[rows], block)


def inner_factors(b: Tensor, a: Tensor) -> Inner:
    """<b @ a, P>, by blocks of rows, for b m x r and a r x n; without the product."""
    return lambda rows, block: dot(b[rows], block @ a.mT)


def certify_factored(
    P: Tensor, left: Tensor, right: Tensor, k: int, attainable: float, b: Tensor, a: Tensor
) -> Certificate:
    """Certificate of a P (m x n) that was multiplied from `left` (m x k) and `right` (k x n), against D = b @ a.

    With G = L^T L and H = R R^T everything about L R is k x k: P P^T P - P = L (H G - I) R. That P is L R is seen in
    one pass over it, through probes; d = P - L R takes at most 3 norm_F(d) from the orthogonality (to first order the
    defect moves by d (P^T P - I) + P d^T P + P P^T d), and norm_F(d) from each of the others.
    """
    L, R = left.double().cpu(), right.double().cpu()
    G, H = L.mT @ L, R @ R.mT
    norm = math.sqrt(max(float((G * H).sum()), 0.0))
    X = H @ G
    X.diagonal().sub_(1.0)
    defect = math.sqrt(max(float(((X.mT @ G @ X) * H).sum()), 0.0))
    product = float(((b.double().cpu().mT @ L) * (a.double().cpu() @ R.mT)).sum())
    probes = draw_gaussian(P.shape[1], PROBES, P) / math.sqrt(PROBES)
    strayed = float(torch.linalg.vector_norm(P @ probes - left @ (right @ probes)))
    if not norm:
        return Certificate(math.nan, math.nan, norm, k)
    return Certificate(product / attainable, (defect + 3.0 * strayed) / norm, norm, k)


def squared_norm(matrix: Tensor) -> float:
    """norm_F(matrix)^2."""
    return sum(dot(matrix[rows], matrix[rows]) for rows in split_rows(matrix))


def dot(left: Tensor, right: Tensor) -> float:
    """Sum of the entrywise product, in the tensors' own precision: for a block, not for a matrix.

    By `sum`, which adds pairwise: good to 2e-7 in float32. A running sum (`torch.dot`) of a block of equal entries is
    rounded in one direction each time, and was seen to be off by 1e-5.
    """
    return float((left * right).sum())


def split_rows(matrix: Tensor) -> list[slice]:
    """The rows in blocks that stay in a CPU's cache; an accelerator is better off with few large ones."""
    entries = BLOCK if matrix.device.type == "cpu" else 512 * BLOCK
    step = max(1, entries // matrix.shape[1])
    return [slice(start, start + step) for start in range(0, matrix.shape[0], step)]


def draw_gaussian(rows: int, columns: int, like: Tensor) -> Tensor:
    """rows x columns Gaussian numbers in the dtype and on the device of `like`: the same ones on every device and in
    every call, drawn without touching the global generator."""
    generator = torch.Generator(device="cpu").manual_seed(SEED)
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(like.device, like.dtype)
