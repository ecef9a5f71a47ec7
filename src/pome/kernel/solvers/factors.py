"""Solver for a delta that is a product of thin factors, as an adapter's is: thin QR of both and a small core."""

from __future__ import annotations

import torch
from torch import Tensor

from pome.kernel.decomposition import Decomposition, DecompositionCache, Truncation, ZeroDelta, find_decomposition
from pome.kernel.precision import to_float64
from pome.kernel.rank import RankRule, count_rank

CANCELLED = 2.0**-46  # rounding of a float64 product, relative to its factors: what is no larger is zero


def solve_factors(
    b: Tensor, a: Tensor, rule: RankRule, cache: DecompositionCache | None = None, power: float = 0.0
) -> Truncation:
    """Truncation of D = b @ a, b m x r and a r x n, both float32 or both float64.

    Q_b R_b = b and Q_a R_a = a^T give D = Q_b (R_b R_a^T) Q_a^T, and the core R_b R_a^T is at most r x r. Everything
    but the product that writes M is float64: r is small, and it costs milliseconds. Raises ZeroDelta where the product
    cancels.
    """
    shape = (b.shape[0], a.shape[1])
    found = find_decomposition(cache, "factors", b, lambda: decompose_factors(b, a))
    assert found.U is not None
    sigma = found.sigma
    k = rule.choose(sigma, found.rank, shape)
    left, right = found.U[:, :k].to(b), found.V[:, :k].mT.to(b)
    resolution = torch.finfo(torch.float64).eps * max(shape) ** 0.5 * float(sigma[0] / sigma[k - 1])
    weights = (sigma[:k] / sigma[0]) ** power
    M = (left if power == 0.0 else left * weights.to(left)) @ right
    return Truncation(M, sigma, found.rank, k, resolution, power, (left, right), is_product=True)


def decompose_factors(b: Tensor, a: Tensor) -> Decomposition:
    """Singular value decomposition of b @ a in float64: thin U (m x r) and V (n x r)."""
    shape = (b.shape[0], a.shape[1])
    Qb, Rb = torch.linalg.qr(to_float64(b))
    Qa, Ra = torch.linalg.qr(to_float64(a).mT)
    U, s, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    if float(s[0]) <= CANCELLED * float(Rb.norm()) * float(Ra.norm()):
        raise ZeroDelta("the factors multiply to zero")
    sigma = torch.zeros(min(shape), dtype=torch.float64, device="cpu")
    sigma[: s.numel()] = s.cpu()
    return Decomposition(sigma, count_rank(sigma, shape), Qa @ Vh.mT, Qb @ U)
