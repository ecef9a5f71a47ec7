"""Last rung: the full singular value decomposition in float64. Slow, and right."""

from __future__ import annotations

import torch
from torch import Tensor

from pome.kernel.decomposition import Decomposition, DecompositionCache, Truncation, find_decomposition
from pome.kernel.precision import to_float64
from pome.kernel.rank import RankRule, count_rank


def solve_svd(D: Tensor, rule: RankRule, cache: DecompositionCache | None = None, power: float = 0.0) -> Truncation:
    """Truncation of D (m x n, float32 or float64) by `torch.linalg.svd` in float64.

    Raises torch.linalg.LinAlgError when the driver does not converge.
    """
    shape = (D.shape[0], D.shape[1])
    found = find_decomposition(cache, "svd-float64", D, lambda: decompose_by_svd(D))
    assert found.U is not None
    sigma, U, Vh = found.sigma, found.U, found.V.mT
    k = rule.choose(sigma, found.rank, shape)
    resolution = torch.finfo(torch.float64).eps * max(shape) ** 0.5 * float(sigma[0] / sigma[k - 1])
    left, right = U[:, :k], Vh[:k]
    if power == 0.0:
        return Truncation((left @ right).to(D), sigma, found.rank, k, resolution)
    weights = ((sigma[:k] / sigma[0]) ** power).to(left)
    isometry = left.to(D), right.to(D)
    return Truncation(((left * weights) @ right).to(D), sigma, found.rank, k, resolution, power, isometry)


def decompose_by_svd(D: Tensor) -> Decomposition:
    """Singular value decomposition of D (m x n) in float64: thin U and V."""
    U, s, Vh = torch.linalg.svd(to_float64(D), full_matrices=False)
    sigma = s.cpu()
    return Decomposition(sigma, count_rank(sigma, (D.shape[0], D.shape[1])), Vh.mT, U)
