"""Leading directions of a float32 Gram matrix, for a truncation whose cut may lie in a dense bulk.

A number of directions mostly lies well above the rounding of D^T D, which is squared as it is. Where it does not, the
strong directions are deflated first (`pome.kernel.solvers.deflated`). Chebyshev polynomials of the Gram matrix damp all
that lies below the least Ritz value, and so take a few vectors to the leading directions: Rutishauser, "Computational
aspects of F. L. Bauer's simultaneous iteration method", Numer. Math. 13, 1969; Zhou, Saad, Tiago and Chelikowsky,
"Self-consistent-field calculations using Chebyshev-filtered subspace iteration", J. Comput. Phys. 219(1), 2006. A
product with that n x n matrix costs less than one with D, so that many can be afforded. That no other direction is
larger, a Cholesky factor proves: level * I - G without the directions found has one only where the level is above all
that is left. Of small matrices, and for many directions, all eigenvectors are found; they cost no more.

What is promised is the objective and the symmetry of M^T D, as the certificate has them, and where the gap after s_k is
above DETERMINED the kept directions themselves, to SUBSPACE. Within a bulk the objective decides.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from pome.kernel.decomposition import SUBSPACE, Truncation, Undecided
from pome.kernel.gram_products import fill_lower, find_eigenvectors
from pome.kernel.householder import orthonormalise
from pome.kernel.missed import bound_leading
from pome.kernel.norms import draw_gaussian
from pome.kernel.power import multiply_power
from pome.kernel.precision import to_float64
from pome.kernel.rank import RankRule, rank_tolerance
from pome.kernel.solvers.deflated import (
    EPS,
    FLOOR,
    LOST,
    STRONG,
    DeflatedGram,
    deflate,
    find_noise,
    find_resolution,
    keep_whole,
)

DETERMINED = 1e-2  # (s_k - s_{k+1}) / s_k from which on the data say which directions are kept
RESIDUAL = 5e-6  # of what the certificate allows the power residual, half
BLURRED = 1e-2  # rounding over s_k^2 from which on float32 squares say too little of the directions there
# Multiple of the rms of the rest from which on a direction is deflated: FLOOR HIDING^2 leaves a factor of 9 to BLURRED.
HIDING = 24.0
# All eigenvectors cost little up to a short side of WHOLE. From a SHARE of them on they are found at once.
WHOLE, SHARE = 320, 1 / 12
BESIDE = 16  # directions beyond the cut that are found with those before it, and columns beyond those
# A filter has at most LONGEST products, and makes no direction over CONTRAST times as long as those it damps: float32
# keeps the others apart. With products of MOST n columns all eigenvectors would have cost no more.
LONGEST, CONTRAST, MOST = 8, 1e10, 2.0
STEPS = 4  # of subspace iteration with D itself, at most


@dataclass(frozen=True)
class Leading:
    """Ritz vectors V (n x h) of D^T D, descending, D V (m x h), their values and the norms of their residuals."""

    V: Tensor
    image: Tensor
    squares: Tensor
    coupling: Tensor


def solve_leading(D: Tensor, rule: RankRule, power: float = 0.0) -> Truncation:
    """Truncation of D (m x n, float32).

    Its rank is None, and sigma ends after s_{k+1}, where float32 or the few directions found leave it open; only the
    rule `fixed` can do without. Raises Undecided when float32 cannot settle k or what is kept.
    """
    tall = D if D.shape[0] >= D.shape[1] else D.mT
    if is_few(rule, tall.shape[1]):
        with suppress(Undecided):
            return truncate(D, keep_whole(tall), rule, power)
    return truncate(D, deflate(tall, HIDING if rule.name == "fixed" else STRONG), rule, power)


def is_few(rule: RankRule, n: int) -> bool:
    """Whether the iteration is worth a try for a rule on an n x n Gram matrix."""
    return rule.name == "fixed" and n > WHOLE and (rule.number or n) < SHARE * n


def truncate(D: Tensor, split: DeflatedGram, rule: RankRule, power: float) -> Truncation:
    """The same from a Gram matrix of D, or of D^T where that is the tall one."""
    shape = (D.shape[0], D.shape[1])
    tall = D if shape[0] >= shape[1] else D.mT
    n, p = tall.shape[1], split.theta.numel()
    k, sigma, W, rest = min(int(rule.number or n), n), None, None, 0.0
    if is_few(rule, n):
        W, rest = iterate(split, k, power)
    if W is None:
        lam, W = find_eigenvectors(split.G)
        sigma = split.join_spectrum(lam)
        k = choose_count(rule, sigma, p, shape)
        h = max(k - p, 0) + BESIDE
        W, rest = W[:, -h:].flip(1), float(lam[-h - 1]) if h < len(lam) else 0.0
    rest += FLOOR * float(split.G.diagonal().max())
    found = find_ritz_vectors(tall, split.reflector.complete_basis(split.Q, W))
    check_noise(found.squares, k, p)
    excess, missed = judge(found.squares, found.coupling, k, rest, power)
    for _ in range(STEPS):
        if excess <= 1.0:
            break
        # What couples the strong directions to the others was dropped. `rest` bounds what lies beside the span of
        # D^T D V too: let D^T D be [[A, C^T], [C, B]] in V and its complement, whose B is at most rest. A vector beside
        # that span is (-A^-1 C^T y, y), and its quotient at most y^T (B - C A^-1 C^T) y / y^T y, so at most rest.
        found = find_ritz_vectors(tall, orthonormalise(tall.mT @ found.image))
        excess, missed = judge(found.squares, found.coupling, k, rest, power)
    else:
        raise Undecided(f"the kept directions are off by {excess:.1g} times what is allowed")
    kept = found.squares.sqrt()
    resolution = max(find_resolution(kept, k, p), float(found.coupling[k - 1] / found.squares[k - 1]))
    B = found.image[:, :k].mul_(kept[:k].reciprocal().to(found.image))
    M, isometry, factors = multiply_power(B, found.V[:, :k], kept[:k], tall is not D, 0, power)
    if sigma is None or not is_full(sigma, p, shape):
        return Truncation(M, kept[: k + 1], None, k, resolution, power, isometry, missed=missed, factors=factors)
    sigma[: len(kept)] = kept
    sigma[len(kept) :].clamp_(max=float(kept[-1]))
    return Truncation(M, sigma, n, k, resolution, power, isometry, missed=missed, factors=factors)


def is_full(sigma: Tensor, p: int, shape: tuple[int, int]) -> bool:
    """Whether float32 squares prove all singular values to count, p strong ones deflated."""
    threshold = float(sigma[0]) * rank_tolerance(shape)
    return float(sigma[-1]) > math.sqrt(find_noise(sigma, p) + threshold**2)


def choose_count(rule: RankRule, sigma: Tensor, p: int, shape: tuple[int, int]) -> int:
    """k by the rule, p strong directions deflated. Raises Undecided where it takes what float32 leaves open."""
    k = rule.choose(sigma, sigma.numel(), shape)
    if rule.name == "fixed":
        return k
    if not is_full(sigma, p, shape):
        raise Undecided("singular values below the float32 floor")
    slack = find_noise(sigma, p) / float(sigma[k - 1]) ** 2
    if rule.choose(sigma, sigma.numel(), shape, slack) != rule.choose(sigma, sigma.numel(), shape, -slack):
        raise Undecided("the singular values leave k open")
    return k


def find_ritz_vectors(tall: Tensor, V: Tensor) -> Leading:
    """Ritz vectors of D^T D in the span of orthonormal V (n x h), for D m x n."""
    image = tall @ V
    wide = to_float64(image)
    squares, X = torch.linalg.eigh(wide.mT @ wide)
    squares, X = squares.flip(0).clamp_min(0.0), X.flip(1).to(V)
    V, image = V @ X, image @ X
    coupling = torch.linalg.vector_norm(tall.mT @ image - V * squares.to(V), dim=0)
    return Leading(V, image, squares.cpu(), coupling.cpu().double())


def check_noise(squares: Tensor, k: int, p: int) -> None:
    """Raise Undecided where rounding of float32 squares reaches the kept directions, p strong ones deflated."""
    noise = find_noise(squares.sqrt(), min(p, len(squares) - 1))
    if len(squares) < k or not noise <= BLURRED * float(squares[k - 1]):
        raise Undecided("singular values below the float32 floor")


def judge(squares: Tensor, coupling: Tensor, k: int, rest: float, power: float) -> tuple[float, float]:
    """What is worst of k Ritz values, over what is allowed, and the share of the objective that they may miss.

    squares and coupling are those of k directions and some more, descending; rest bounds the square of all others.
    """
    missed, limit = bound_leading(squares, coupling, k, rest, power)
    t, c = squares[:k], coupling[:k]
    excess = missed / LOST
    weights = (t / t[0]).pow(power / 2.0)
    if power:
        residual = float((weights * c / t.sqrt()).norm() / (weights * t.sqrt()).norm())
        excess = max(excess, math.sqrt(2.0) * residual / RESIDUAL)
    after = float(squares[k]) if k < len(squares) else rest
    if 1.0 - math.sqrt(after / float(t[-1])) > DETERMINED:
        room = (t - limit).clamp_min(0.0)
        excess = max(excess, math.sqrt(2.0 * float((c / room).square().sum()) / k) / SUBSPACE)
    return (excess if math.isfinite(excess) else math.inf), missed


def iterate(split: DeflatedGram, k: int, power: float) -> tuple[Tensor | None, float]:
    """Ritz vectors (n x h, descending) of the deflated Gram matrix up to the k-th direction and BESIDE more, and a
    bound on the squares of the rest. None where so many products are needed that all eigenvectors are found as soon.
    """
    G, known = fill_lower(split.G), split.theta.square()
    n, count = G.shape[0], max(k - len(known), 0) + BESIDE
    X = orthonormalise(draw_gaussian(n, count + max(BESIDE, count // 4), G))
    X, products = orthonormalise(G @ X), 2
    while True:
        image = G @ X
        squares, R = torch.linalg.eigh(to_float64(X.mT @ image))
        squares, R = squares.flip(0).clamp_min(0.0), R.flip(1).to(X)
        X, image = X @ R, image @ R
        E = image - X * squares.to(X)
        squares, coupling = squares.cpu(), torch.linalg.vector_norm(E, dim=0).cpu().double()
        t = torch.cat((known, squares[:count]))
        c = torch.cat((torch.zeros_like(known), coupling[:count]))
        # Halfway from the cut to the last value found: room for what the last ones have not converged.
        rest = float(t[k - 1] + t[-1]) / 2.0
        excess = math.sqrt(2.0) * float(c[:k].norm() / t[:k].norm()) / RESIDUAL
        if excess <= 1.0:
            check_noise(t, k, len(known))
            excess, _ = judge(t, c, k, rest, power)
            if excess <= 1.0 and is_above_rest(rest, G, X[:, :count], squares[:count], E[:, :count]):
                return X[:, :count], rest * (1.0 + n * EPS)
        edge = max(float(squares[-1]), FLOOR * float(squares[0]))
        wanted = math.log(min(max(excess, math.e), 1.0 / EPS)) / find_growth(float(t[k - 1]), edge)
        if not (products + wanted) * X.shape[1] <= MOST * n:
            return None, 0.0
        degree = max(1, min(LONGEST, int(math.log(CONTRAST) / find_growth(float(squares[0]), edge))))
        X = orthonormalise(filter_chebyshev(G, X, image, edge, degree))
        products += degree


def find_growth(value: float, edge: float) -> float:
    """Logarithm by which one more degree of a Chebyshev polynomial grows at `value` beyond [0, edge]; never zero."""
    return math.acosh(max(2.0 * value / edge - 1.0, 1.0 + EPS))


def filter_chebyshev(G: Tensor, X: Tensor, image: Tensor, edge: float, degree: int) -> Tensor:
    """T(2 G / edge - 1) X from X (n x h) and its image G X, for the Chebyshev polynomial T of that degree: at most 1 on
    [0, edge], and of all polynomials with that the one that grows fastest beyond."""
    before, now = X, image * (2.0 / edge) - X
    for _ in range(degree - 1):
        before, now = now, torch.addmm(before, G, now, beta=-1.0, alpha=4.0 / edge).sub_(now, alpha=2.0)
    return now


def is_above_rest(level: float, G: Tensor, W: Tensor, squares: Tensor, E: Tensor) -> bool:
    """Whether `level` is above all eigenvalues of G (n x n) on the complement of Ritz vectors W, but for rounding.

    With their residuals E = G W - W diag(squares), which are orthogonal to W, that part of G is G - W Z^T - Z W^T for
    Z = W diag(squares) / 2 + E. The rounding of a Cholesky factor is that of G in some EPS; n EPS leaves a margin.
    """
    Z = W * (squares / 2.0).to(W) + E
    C = torch.addmm(G, torch.cat((W, Z), 1), torch.cat((Z, W), 1).mT, beta=-1.0)
    C.diagonal().add_(level)
    return not int(torch.linalg.cholesky_ex(C)[1])
