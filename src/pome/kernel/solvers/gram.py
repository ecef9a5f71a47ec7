"""Second rung: a float64 Gram matrix and its full `eigh`.

Resolves singular values down to s_1 / 10^7 and deflates no strong direction; slower than the first rung, and much
faster than a float64 decomposition of the delta.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pome.kernel.decomposition import (
    GAP,
    RESERVE,
    SUBSPACE,
    Decomposition,
    DecompositionCache,
    Truncation,
    Undecided,
    find_decomposition,
)
from pome.kernel.gram_products import find_eigenvectors, find_image, multiply_gram
from pome.kernel.polar import scaled_image
from pome.kernel.power import multiply_power
from pome.kernel.precision import to_float64
from pome.kernel.rank import RankRule, count_rank, rank_tolerance

EPS = 2.0**-53
# Rounding of an eigenvalue of the Gram matrix, relative to the largest. Seen: 0.1 to 4 EPS. The threshold of the rank
# lies at 2 max(m, n) EPS, so this decides all but what lies within some per cent of it in a matrix of some size.
NOISE = 16.0 * EPS
BLURRED = 1e-7  # relative error of s_k^2 from which on the directions around it are found again without squaring
TAIL = 10.0  # what is found again without squaring begins this many times above the value that has to be known


def solve_gram(D: Tensor, rule: RankRule, cache: DecompositionCache | None = None, power: float = 0.0) -> Truncation:
    """Truncation of D (m x n, float32 or float64).

    Raises Undecided when float64 squares cannot settle the rank, k or the kept subspace.
    """
    shape = (D.shape[0], D.shape[1])
    tall = to_float64(D if shape[0] >= shape[1] else D.mT)
    found = find_decomposition(cache, "gram-float64", D, lambda: decompose_gram(tall, shape))
    sigma, V = found.sigma.clone(), found.V if cache is None else found.V.clone()
    rank, noise, start = found.rank, found.noise, found.tail
    k = rule.choose(sigma, rank, shape)
    slack = noise / float(sigma[k - 1]) ** 2
    if rule.choose(sigma, rank, shape, slack) != rule.choose(sigma, rank, shape, -slack):
        raise Undecided("the singular values leave k open")
    if slack > BLURRED and k <= start:
        start = refine_tail(tall, V, sigma, TAIL * float(sigma[k - 1]))
    check_cut(sigma, k, start, noise)
    if k < start:
        measure_cut(tall, V, sigma, k)
    sigma[rank:] = 0.0
    B = scaled_image(tall, V[:, :k], sigma[:k])
    M, isometry, _ = multiply_power(B, V[:, :k], sigma[:k], shape[0] < shape[1], 0, power)
    if isometry is not None:
        isometry = isometry[0].to(D), isometry[1].to(D)
    resolution = slack if k < start else EPS * float(sigma[0] / sigma[k - 1])
    return Truncation(M.to(D), sigma, rank, k, resolution, power, isometry)


def decompose_gram(tall: Tensor, shape: tuple[int, int]) -> Decomposition:
    """Eigenvectors of the Gram matrix of `tall` (float64), which is D (of that shape) or D^T, and the rank."""
    lam, V = find_eigenvectors(multiply_gram(tall))
    lam, V = lam.flip(0).clamp_min(0.0), V.flip(1)
    sigma = lam.sqrt().cpu()
    tail = sigma.numel()
    threshold = rank_tolerance(shape) * float(sigma[0])
    if bool(((sigma > 0.5 * threshold) & (sigma < 2.0 * threshold)).any()):
        tail = refine_tail(tall, V, sigma, TAIL * threshold)
    return Decomposition(sigma, count_rank(sigma, shape), V, noise=NOISE * float(lam[0]), tail=tail)


def refine_tail(D: Tensor, V: Tensor, sigma: Tensor, below: float) -> int:
    """Singular values under `below`, and their directions, from the decomposition of D V_tail: good to s_1 EPS.

    `V` and `sigma` change in place. Returns the index at which the tail starts.
    """
    start = int((sigma > below).sum())
    tail = V[:, start:]
    _, s, Wh = torch.linalg.svd(D @ tail, full_matrices=False)
    sigma[start:] = s.cpu()
    V[:, start:] = tail @ Wh.mT
    return start


def measure_cut(D: Tensor, V: Tensor, sigma: Tensor, k: int) -> None:
    """Set s_k and s_{k+1} to norm(D v) of their directions: the error is that of v, squared."""
    lengths = torch.linalg.vector_norm(find_image(D, V[:, k - 1 : k + 1]), dim=0)
    sigma[k - 1 : k + 1] = lengths.sort(descending=True).values.cpu()


def check_cut(sigma: Tensor, k: int, start: int, noise: float) -> None:
    """Raise Undecided when `noise` in every pair (kept, dropped) of D^T D turns the kept subspace by over SUBSPACE.

    Pairs of which both lie in the tail from `start` on have been told apart without squaring.
    """
    if k == sigma.numel() or float(sigma[k - 1] - sigma[k]) <= (GAP - RESERVE) * float(sigma[k - 1]):
        return
    kept, dropped = sigma[:k].square(), sigma[k:].square()
    turns = noise / sigma.numel() ** 0.5 * (kept[:, None] - dropped).reciprocal()
    turns[start:, max(start - k, 0) :] = 0.0
    angle = math.sqrt(2.0 * float(turns.square().sum()) / k)
    if not angle <= SUBSPACE:
        raise Undecided(f"the kept subspace is known to {angle:.0e} only")
