"""Hyperspherical energy: how evenly the directions of a matrix's rows, its neurons, spread over the unit sphere.

The energy of neurons w_1 ... w_m is the sum over i != j of 1 / norm(w_i / norm(w_i) - w_j / norm(w_j)): the full-space
energy with Euclidean distances and s = 1 of Liu et al., "Learning towards Minimum Hyperspherical Energy" (arXiv
1805.09298), not their half-space variant, which counts w and -w as one. Orthogonal fine-tuning (arXiv 2306.07280) keeps
it, and POET (arXiv 2506.08001) is said to keep it small. Here it is divided by the number of pairs, so that matrices of
different sizes compare. It is at least 1/2 (two opposite rows), at most infinite, near 1 / sqrt(2) for many random
directions in many dimensions, and above that for directions that cluster. The length of a row and a rotation of the
inputs do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pome.kernel.norms import BLOCK, SEED
from pome.kernel.precision import full_precision, to_float64

MOST_ROWS = 4096  # of a matrix with more, a sample is looked at
ROWS = 256  # held against all others in one go
# 2 - 2 cos of rounded rows is off by some 1e-15: below this square a distance is taken from the difference of the rows.
NEAR = 1e-4
SAME = 2.0**-48  # no distance that is left when two rows of one direction are rounded is as large


@dataclass(frozen=True)
class Energy:
    """Mean energies of several matrices of one shape over the same pairs of rows, dimensionless.

    means: for each matrix, at least 1/2; None where no pair is left. rows: rows looked at. zero_rows: those among them
    that are zero in one of the matrices, left out of all. identical_pairs: pairs of the other rows whose directions
    are the same in one of the matrices, left out of all: the energy would be infinite.
    """

    means: tuple[float | None, ...]
    rows: int
    zero_rows: int
    identical_pairs: int


def find_directions(W: Tensor) -> Tensor:
    """Rows of W (m x n, any float dtype) over their norms, float64; a row of zeros stays one.

    Of more than MOST_ROWS rows a sample of that number, the same for every matrix with m rows.
    """
    count = W.shape[0]
    if count > MOST_ROWS:
        chosen = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(SEED))[:MOST_ROWS]
        W = W[chosen.sort().values.to(W.device)]
    X = to_float64(W.detach())
    least = torch.finfo(X.dtype).tiny
    for order in (float("inf"), 2.0):  # over the largest entry first: no square underflows
        X = X / torch.linalg.vector_norm(X, order, dim=1, keepdim=True).clamp_min(least)
    return X


def measure_energy(directions: Sequence[Tensor]) -> Energy:
    """Energies of matrices of one shape, over the same pairs of rows, from what `find_directions` gave for each.

    It takes m^2 n multiply-adds in float64 for each matrix (m x n), and memory for ROWS x m distances of each. Each
    distance is good to some 1e-11 of itself, one below 0.01 to 1e-15 in absolute terms.
    """
    rows = directions[0].shape[0]
    kept = torch.stack([U.any(dim=1) for U in directions]).all(dim=0)
    zero_rows = rows - int(kept.sum())
    if zero_rows:
        directions = [U[kept] for U in directions]
    count = rows - zero_rows
    sums, left_out = [0.0] * len(directions), 0
    with full_precision(directions[0].device):
        for start in range(0, count, ROWS):
            distances = [find_distances(U[start : start + ROWS], U[start:]) for U in directions]
            pairs = torch.ones_like(distances[0], dtype=torch.bool).triu(1)  # each once
            distinct = torch.stack([D > SAME for D in distances]).all(dim=0) & pairs
            left_out += int(pairs.sum() - distinct.sum())
            sums = [total + float(D[distinct].reciprocal().sum()) for total, D in zip(sums, distances, strict=True)]
    pairs_taken = count * (count - 1) // 2 - left_out
    means = tuple(total / pairs_taken if pairs_taken else None for total in sums)
    return Energy(means, rows, zero_rows, left_out)


def find_distances(U: Tensor, V: Tensor) -> Tensor:
    """Distances of unit rows of U (p x n) to unit rows of V (q x n): p x q, float64."""
    squares = (U @ V.mT).mul_(-2.0).add_(2.0)
    near = (squares < NEAR).nonzero()
    D = squares.clamp_min_(0.0).sqrt_()
    for some in torch.split(near, max(1, BLOCK // U.shape[1])):
        i, j = some.unbind(1)
        D[i, j] = torch.linalg.vector_norm(U[i] - V[j], dim=1)
    return D
