"""Balanced thin factors of an edit: B (m x k) and A (k x n) with B A = M, as the two matrices of a LoRA."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pome.kernel.decomposition import Factors
from pome.kernel.norms import draw_gaussian
from pome.kernel.precision import full_precision, to_float64

# Columns of the sketch beyond k. M has rank k exactly, so that its range is found at once; a few more keep the
# Gaussian sketch well conditioned.
EXTRA = 8


def balance(L: Tensor, R: Tensor, gain: float) -> Factors:
    """B and A as of `factorise` for gain * L R, from L (m x k) and R (k x n) of which one is orthonormal but for the
    lengths of its columns or rows, and the other orthonormal."""
    share = (torch.linalg.vector_norm(to_float64(R), dim=1) / torch.linalg.vector_norm(to_float64(L), dim=0)).sqrt()
    root = math.sqrt(gain)
    return L * (root * share).to(L), R * (root / share).to(R)[:, None]


def factorise(M: Tensor, k: int) -> Factors:
    """B = U sqrt(S) (m x k) and A = sqrt(S) V^T (k x n) of a matrix M = U S V^T (m x n) of rank k, in M's dtype.

    An orthonormal basis Q of the range of M comes from a seeded sketch, U from the Gram matrix of Q^T M in float64. The
    product is Q U U^T Q^T M: it is M however well U and S are known, as long as U is orthogonal.
    """
    if M.shape[0] > M.shape[1]:
        B, A = factorise(M.mT, k)
        return A.mT, B.mT
    with full_precision(M.device):
        C, Q = M, None
        if k + EXTRA < M.shape[0]:
            Q = torch.linalg.qr(M @ draw_gaussian(M.shape[1], k + EXTRA, M)).Q
            C = Q.mT @ M
        wide = to_float64(C)
        squares, U = torch.linalg.eigh(wide @ wide.mT)
        squares, U = squares.flip(0)[:k], U.flip(1)[:, :k]
        # A direction that rounding alone made is divided by no less than rounding.
        least = torch.finfo(M.dtype).eps * squares[0].clamp(min=0.0).sqrt()
        share = squares.clamp(min=0.0).sqrt().clamp(min=least).sqrt()
        left, A = (U * share).to(M), ((U.mT @ wide) / share[:, None]).to(M)
        return (left if Q is None else Q @ left), A
