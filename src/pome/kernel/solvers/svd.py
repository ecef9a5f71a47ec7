"""The last rung: a float64 singular value decomposition. Slow, and right."""

from __future__ import annotations

import torch
from torch import Tensor

from pome.kernel.decomposition import Decomposition, DecompositionCache, Kept, find_decomposition
from pome.kernel.gram_products import widen
from pome.kernel.rank import RankRule, count_rank


def solve_svd(D: Tensor, rule: RankRule, cache: DecompositionCache | None = None) -> Kept:
    """P of D (m x n, float32 or float64) by `torch.linalg.svd` in float64.

    Raises torch.linalg.LinAlgError when the driver does not converge.
    """
    shape = (D.shape[0], D.shape[1])
    basis = find_decomposition(cache, "svd-float64", D, lambda: find_basis(D))
    assert basis.U is not None
    sigma, U, Vh = basis.sigma, basis.U, basis.V.mT
    k = rule.choose(sigma, basis.rank, shape)
    resolution = torch.finfo(torch.float64).eps * max(shape) ** 0.5 * float(sigma[0] / sigma[k - 1])
    return Kept((U[:, :k] @ Vh[:k]).to(D), sigma, basis.rank, k, resolution)


def find_basis(D: Tensor) -> Decomposition:
    """The decomposition."""
    U, s, Vh = torch.linalg.svd(widen(D), full_matrices=False)
    sigma = s.cpu()
    return Decomposition(sigma, count_rank(sigma, (D.shape[0], D.shape[1])), Vh.mT, U)
