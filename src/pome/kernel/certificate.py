"""Certificate that a P is what the method asks for, from P itself and without a second decomposition.

P maximises <D, P> over rank(P) <= k and spectral norm <= 1, and the optimum is s_1 + ... + s_k (Ky Fan). So P is right
when its non-zero singular values are 1, there are k of them, and <D, P> attains the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pome.kernel.norms import dot, draw_gaussian, split_rows

TOLERANCE = 1e-5
# The mean square of s Gaussian probes of E is an unbiased estimate of norm_F(E)^2. Its worst case is an E of rank
# one, a chi-square of s degrees: with 8, an E ten times over the tolerance passes with probability below 2e-7, one
# three times over with 0.1 %. An E of higher rank, which is what rounding leaves, is estimated far more sharply.
PROBES = 8
# <D, P> of the rows in a slice, P given as the block of those rows.
Inner = Callable[[slice, Tensor], float]


@dataclass(frozen=True)
class Certificate:
    """Three numbers that prove a P of k directions.

    objective = <D, P> / (s_1 + ... + s_k); orthogonality = norm_F(P P^T P - P) / norm_F(P); norm = norm_F(P).
    """

    objective: float
    orthogonality: float
    norm: float
    k: int

    def find_fault(self) -> str | None:
        """Fault of P in words, or None. A NaN fails every comparison, and so is a fault."""
        if not self.orthogonality <= TOLERANCE:
            return f"orthogonality {self.orthogonality:.1e}"
        if not abs(self.norm**2 - self.k) < 0.5:
            return f"{self.norm**2:.2f} directions instead of {self.k}"
        if not abs(1.0 - self.objective) <= TOLERANCE:
            return f"1 - objective {1.0 - self.objective:.1e}"
        return None


def certify(P: Tensor, k: int, attainable: float, inner: Inner) -> Certificate:
    """Certificate of P (m x n) against a D with s_1 + ... + s_k = `attainable`.

    The norm of P P^T P - P is estimated by Gaussian probes, or computed where one side has no more than PROBES. Two
    passes over P, in blocks of rows that stay in the cache.
    """
    m, n = P.shape
    if m <= PROBES < n:
        return certify(P.mT, k, attainable, lambda rows, block: inner(slice(None), P) if rows.start == 0 else 0.0)
    probes = torch.eye(n).to(P) if n <= PROBES else draw_gaussian(n, PROBES, P) / math.sqrt(PROBES)
    image, twice = P.new_empty(m, probes.shape[1]), torch.zeros_like(probes)
    product, square = 0.0, 0.0
    for rows in split_rows(P):
        block = P[rows]
        torch.mm(block, probes, out=image[rows])
        twice.addmm_(block.mT, image[rows])
        product += inner(rows, block)
        square += dot(block, block)
    defect = P @ twice - image
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

    With G = L^T L and H = R R^T everything about L R is k x k: P P^T P - P = L (H G - I) R. Probes show how far P is
    from L R, in one pass over it: d = P - L R adds at most 3 norm_F(d) to the defect (to first order it moves by
    d (P^T P - I) + P d^T P + P P^T d), and norm_F(d) to the norm and to <D, P>.
    """
    L, R = left.double().cpu(), right.double().cpu()
    G, H = L.mT @ L, R @ R.mT
    norm = math.sqrt(max(float((G * H).sum()), 0.0))
    X = H @ G
    X.diagonal().sub_(1.0)
    defect = math.sqrt(max(float(((X.mT @ G @ X) * H).sum()), 0.0))
    product = float(((b.double().cpu().mT @ L) * (a.double().cpu() @ R.mT)).sum())
    probes = draw_gaussian(P.shape[1], PROBES, P) / math.sqrt(PROBES)
    difference = float(torch.linalg.vector_norm(P @ probes - left @ (right @ probes)))
    if not norm:
        return Certificate(math.nan, math.nan, norm, k)
    return Certificate(product / attainable, (defect + 3.0 * difference) / norm, norm, k)
