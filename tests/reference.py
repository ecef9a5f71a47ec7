"""The method by definition, in float64, sharing no code with the package; and matrices with a known spectrum."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Reference:
    value: torch.Tensor
    sigma: torch.Tensor
    rank: int
    k: int


def reference_edit(delta, *, rank_ratio=0.5, beta=1.0, k=None):
    """alpha * U_k V_k^T of a delta by a full float64 SVD; k by ratio of the numerical rank unless given."""
    U, s, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    rank = int((s > s[0] * math.sqrt(max(delta.shape) * 2.0**-52)).sum())
    k = max(1, round(rank_ratio * rank)) if k is None else k
    alpha = beta * float(s.square().sum().sqrt()) / math.sqrt(k)
    return Reference(alpha * U[:, :k] @ Vh[:k], s, rank, k)


def plant(sigma, m, n, seed=0, dtype=torch.float32):
    """An m x n matrix with the given min(m, n) singular values, between random orthonormal bases."""
    generator = torch.Generator().manual_seed(seed)
    r = min(m, n)
    left = torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64)).Q
    return ((left * torch.as_tensor(sigma, dtype=torch.float64)) @ right.T).to(dtype)
