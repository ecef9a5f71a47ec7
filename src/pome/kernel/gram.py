"""The second rung: a float64 Gram matrix and its full `eigh`. Resolves singular values down to s_1 / 10^7, and squares
no strong direction away; slower than the first rung, and much faster than a float64 decomposition of the delta."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pome.kernel.products import gram, polar
from pome.kernel.rank import RankRule, count_rank, rank_tolerance
from pome.kernel.spectrum import GAP, SUBSPACE, Kept, Undecided

EPS = 2.0**-53
# Rounding of an eigenvalue of the Gram matrix, relative to the largest. Seen: 0.1 to 4 EPS. The threshold of the rank
# lies at 2 max(m, n) EPS, so this decides all but what lies within some per cent of it in a matrix of some size.
NOISE = 16.0 * EPS


def solve_gram(D: Tensor, rule: RankRule) -> Kept:
    """P of D (m x n, float32 or float64). Raises Undecided when float64 squares cannot settle rank, k or subspace."""
    shape = (D.shape[0], D.shape[1])
    tall = (D if shape[0] >= shape[1] else D.mT).double()
    lam, V = torch.linalg.eigh(gram(tall))
    lam, V = lam.flip(0).clamp_min(0.0), V.flip(1)
    noise = NOISE * float(lam[0])
    sigma = lam.sqrt().cpu()
    sharpen_tail(tall, V, sigma, rank_tolerance(shape))
    rank = count_rank(sigma, shape)
    k = rule.choose(sigma, rank, shape)
    slack = noise / float(sigma[k - 1]) ** 2
    if rule.choose(sigma, rank, shape, slack) != rule.choose(sigma, rank, shape, -slack):
        raise Undecided("the singular values leave k open")
    check_cut(sigma, k, noise)
    P = polar(tall, V[:, :k], sigma[:k], flipped=shape[0] < shape[1])
    return Kept(P.to(D.dtype), sigma, rank, k, slack)


def sharpen_tail(D: Tensor, V: Tensor, sigma: Tensor, tolerance: float) -> None:
    """Singular values near and below the threshold of the rank, from D times their directions instead of D^T D.

    Only where one lies within a factor of two of it. What is unsquared is good to s_1 * EPS, ten orders below.
    """
    threshold = tolerance * float(sigma[0])
    if not bool(((sigma > 0.5 * threshold) & (sigma < 2.0 * threshold)).any()):
        return
    start = int((sigma > 10.0 * threshold).sum())
    sigma[start:] = torch.linalg.svdvals(D @ V[:, start:]).cpu()


def check_cut(sigma: Tensor, k: int, noise: float) -> None:
    """Raise Undecided when `noise` in every pair (kept, dropped) of D^T D turns the kept subspace by over SUBSPACE."""
    if k == sigma.numel() or float(sigma[k - 1] - sigma[k]) <= GAP * float(sigma[k - 1]):
        return
    kept, dropped = sigma[:k].square(), sigma[k:].square()
    turns = noise / sigma.numel() ** 0.5 * (kept[:, None] - dropped).reciprocal()
    angle = math.sqrt(2.0 * float(turns.square().sum()) / k)
    if not angle <= SUBSPACE:
        raise Undecided(f"the kept subspace is known to {angle:.0e} only")
