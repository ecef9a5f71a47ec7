"""Leading directions of a Gram matrix all of whose eigenvalues are known: for a cut that may lie in a dense bulk.

Eigenvalues alone cost a third of what they cost with their vectors. They say what the k leading directions have to
attain, and how far the others lie below. So few vectors can be found by a filter, and certified, without the rest.

The strong directions are deflated first (`pome.kernel.solvers.deflated`). Of the others a block of Gaussian vectors is
multiplied by Chebyshev polynomials of the Gram matrix, which grow fastest above the eigenvalue that follows the block:
Zhou, Saad, Tiago and Chelikowsky, "Self-consistent-field calculations using Chebyshev-filtered subspace iteration",
J. Comput. Phys. 219(1), 2006. Where the eigenvalues tell that this takes longer, all vectors are found.

What the certificate promises is promised here too: the objective, and where the gap after s_k is above GAP the edit M
itself to SUBSPACE, relative in the Frobenius norm. A direction counts by its weight in M: at power 1 a weak one little.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pome.kernel.decomposition import SUBSPACE, Truncation, Undecided
from pome.kernel.gram_products import find_eigenvectors
from pome.kernel.householder import orthonormalise
from pome.kernel.norms import draw_gaussian
from pome.kernel.power import multiply_power
from pome.kernel.precision import to_float64
from pome.kernel.rank import RankRule, rank_tolerance
from pome.kernel.solvers.deflated import FLOOR, LOST, DeflatedGram, deflate, find_noise, find_resolution, is_open

# All vectors cost little up to a short side of WHOLE. From a SHARE of them on they are found at once.
WHOLE, SHARE = 768, 1 / 8
COLUMNS = 2.0  # products of G (n x n) with so many times n columns take as long as all vectors beyond the values
WIDER = (1.125, 1.25, 1.5, 2.0, 3.0)  # blocks that are tried, times what is wanted, and EXTRA columns more
EXTRA = 16
GROWTH = 1e3  # of the largest direction over the block's last in one filter: float32 keeps both
CONVERGED = 1e-4  # part of the other directions, of one at the start, for the choice of a block
CYCLES = 40
BLURRED = 1e-2  # rounding over s_k^2 from which on float32 squares say too little of the directions there
RESIDUAL = 5e-6  # of what the certificate allows the power residual, half


def solve_leading(D: Tensor, rule: RankRule, power: float = 0.0) -> Truncation:
    """Truncation of D (m x n, float32).

    Its rank is None, and sigma ends after s_{k+1}, where float32 leaves it open; only the rule `fixed` can do without.
    Raises Undecided when float32 cannot settle k or what is kept.
    """
    shape = (D.shape[0], D.shape[1])
    tall = D if shape[0] >= shape[1] else D.mT
    n, split = tall.shape[1], deflate(tall)
    few = rule.name == "fixed" and n > WHOLE and (rule.number or n) < SHARE * n
    if few:
        lam, W = torch.linalg.eigvalsh(split.G, UPLO="U"), None
    else:
        lam, W = find_eigenvectors(split.G)
    sigma, p = split.join_spectrum(lam), split.theta.numel()
    noise = find_noise(sigma, p)
    is_full = float(sigma[-1]) > math.sqrt(noise + (float(sigma[0]) * rank_tolerance(shape)) ** 2)
    if not (is_full or rule.name == "fixed"):
        raise Undecided("singular values below the float32 floor")
    k = rule.choose(sigma, n, shape)
    slack = noise / max(float(sigma[k - 1]), 1e-300) ** 2
    if slack > BLURRED or rule.choose(sigma, n, shape, slack) != rule.choose(sigma, n, shape, -slack):
        raise Undecided("the singular values leave k open")
    if W is None:
        W = filter_leading(split, sigma, k, power)
    W = find_eigenvectors(split.G)[1] if W is None else W
    V = split.reflector.complete_basis(split.Q, W.flip(1)[:, : max(k - p, 0)])[:, :k]
    image = tall @ V
    wide = to_float64(image)
    squares, X = torch.linalg.eigh(wide.mT @ wide)
    squares, X = squares.flip(0).cpu(), X.flip(1).to(V)
    V, image = V @ X, image @ X
    if not float(squares[-1]) > 0.0:
        raise Undecided("the kept directions are not independent")
    coupling = torch.linalg.vector_norm(tall.mT @ image - V * squares.to(V), dim=0).cpu().double()
    excess = judge(squares, coupling, sigma, k, power)
    if not excess <= 1.0:
        raise Undecided(f"the kept directions are off by {excess:.1g} times what is allowed")
    missed = max(0.0, count_objective(sigma[:k].square(), power) / count_objective(squares, power) - 1.0)
    resolution = max(find_resolution(sigma, k, p), float(coupling[-1] / squares[-1]))
    sigma[:k] = squares.sqrt()
    sigma[k:].clamp_(max=float(sigma[k - 1]))
    B = image.mul_(sigma[:k].reciprocal().to(image))
    M, isometry = multiply_power(B, V, sigma[:k], tall is not D, 0, power)
    rank = n if is_full else None
    return Truncation(M, sigma if is_full else sigma[: k + 1], rank, k, resolution, power, isometry, missed=missed)


def count_objective(squares: Tensor, power: float) -> float:
    """s_1^(1+p) + ... of the squares of singular values, over that power of the first."""
    return float((squares / squares[0]).pow((1.0 + power) / 2.0).sum()) * float(squares[0]) ** ((1.0 + power) / 2.0)


def judge(squares: Tensor, coupling: Tensor, sigma: Tensor, k: int, power: float) -> float:
    """What is worst of k Ritz values with the norms of their residuals, over what is allowed; `sigma` is the truth.

    They may lack a share of the objective, miss symmetry of M^T D, and turn M. A Ritz vector of the value t and the
    residual c holds at most c / (t - s_{k+1}^2) of the directions that are dropped.
    """
    weights = (squares / squares[0]).clamp_min(0.0).pow(power / 2.0)
    missed = count_objective(sigma[:k].square(), power) / count_objective(squares, power) - 1.0
    excess = missed / LOST
    if power:
        residual = float((weights * coupling / squares.sqrt()).norm() / (weights * squares.sqrt()).norm())
        excess = max(excess, math.sqrt(2.0) * residual / RESIDUAL)
    if k < sigma.numel() and not is_open(sigma, k, 0.0):
        room = (squares - float(sigma[k]) ** 2).clamp_min(0.0)
        turned = math.sqrt(2.0) * float((weights * coupling / room).norm() / weights.norm())
        excess = max(excess, turned / SUBSPACE)
    return excess if math.isfinite(excess) else math.inf


def filter_leading(split: DeflatedGram, sigma: Tensor, k: int, power: float) -> Tensor | None:
    """Eigenvectors (ascending) of the deflated Gram matrix for the k leading values of `sigma`, but for the strong.

    None where all of them are found sooner.
    """
    G, p = split.G, split.theta.numel()
    n, count = G.shape[0], k - p
    if count <= 0:
        return G.new_empty(n, 0)
    lam = sigma[p:].square()
    block = choose_block(lam, count)
    if block is None:
        return None
    cut = max(float(lam[block]), FLOOR * float(lam[0]))
    growth = math.acosh(max(2.0 * float(lam[0]) / cut - 1.0, 1.0 + 1e-9))
    degree = max(1, int(math.acosh(GROWTH) / growth))
    X = orthonormalise(draw_gaussian(n, block, G))
    known = split.theta.square()
    for _ in range(CYCLES):
        image = G @ X
        squares, R = torch.linalg.eigh(to_float64(X).mT @ to_float64(image))
        R = R.to(X)
        X, image, squares = X @ R, image @ R, squares.to("cpu")
        best = slice(block - count, block)
        E = torch.linalg.vector_norm(image[:, best] - X[:, best] * squares[best].to(X), dim=0)
        t, c = squares[best].flip(0), E.flip(0).cpu().double()
        if judge(torch.cat((known, t)), torch.cat((torch.zeros_like(known), c)), sigma, k, power) <= 0.5:
            return X[:, best]
        before, X = X, image.mul_(2.0 / cut).sub_(X)
        for _ in range(degree - 1):
            before, X = X, before.neg_().sub_(X, alpha=2.0).addmm_(G, X, alpha=4.0 / cut)
        X = orthonormalise(X)
    return None


def choose_block(lam: Tensor, count: int) -> int | None:
    """Columns with which `count` leading eigenvectors are found soonest, from all eigenvalues (descending).

    A degree of the filter takes the directions after the block down by exp(-acosh(2 lam_count / lam_block - 1)).
    """
    best, block = COLUMNS * lam.numel(), None
    for wider in WIDER:
        columns = int(wider * count) + EXTRA
        if columns >= lam.numel():
            break
        ratio = float(lam[count - 1]) / max(float(lam[columns]), FLOOR * float(lam[0]))
        rate = math.acosh(max(2.0 * ratio - 1.0, 1.0 + 1e-9))
        cost = columns * (2.0 - math.log(CONVERGED) / rate)
        if cost < best:
            best, block = cost, columns
    return block
