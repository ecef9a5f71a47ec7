"""Bounds on what a few approximate singular vectors miss of a matrix.

Lanczos' Ritz values approach from below; these bounds lie above. The one on a norm holds with high probability over the
seeded probes, the other follows from it and from residuals alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pome.kernel.norms import draw_gaussian

PROBES, DEGREE = 16, 6  # columns, and products with D^T D: fewer columns are no faster in a product with D^T
# A chi-square of PROBES degrees of freedom falls below this with probability 1e-7: of ten bounds for one matrix none
# fails with probability 1 - 1e-6.
LEAST_MASS = 1.0649
LEVELS = 120  # tried for the best bound
SLACK = 1.25  # what the bound on a squared norm is over the truth where many values lie close to the largest


def bound_squared_norm(D: Tensor, V: Tensor) -> float:
    """Bound on the squared spectral norm of D (I - V V^T), for D m x n and orthonormal V n x h.

    Holds with probability 1 - 1e-7 for any D and V that do not depend on the seeded probes X (n x PROBES). With the
    eigenpairs (l_i, u_i) of G = (I - V V^T) D^T D (I - V V^T), X has the mass norm(u_i^T X)^2 at l_i: for the largest
    a chi-square, below LEAST_MASS with that probability. Lanczos' method on G, with <X, Y> = trace(X^T Y), yields the
    polynomials p_j that are orthonormal for these masses, and no point l carries more than 1 / sum_j p_j(l)^2 (the
    Christoffel function: Szego, Orthogonal Polynomials, theorem 3.31.4; of such measures: Golub and Meurant, Matrices,
    Moments and Quadrature, 2010). So the largest eigenvalue cannot lie where that is below LEAST_MASS. The power
    method with a random start gives bounds of this kind (Dixon, "Estimating extremal eigenvalues and condition numbers
    of matrices", SIAM J. Numer. Anal. 20(4), 1983), Lanczos' method better ones (Kuczynski and Wozniakowski,
    "Estimating the largest eigenvalue by the power and Lanczos algorithms", SIAM J. Matrix Anal. Appl. 13(4), 1992).
    """
    X = draw_gaussian(D.shape[1], PROBES, D, stream=1)
    X = project_out(V, project_out(V, X))
    size = float(torch.linalg.vector_norm(X))
    tiny = torch.finfo(D.dtype).tiny
    if not size > tiny:
        return 0.0
    X, last = X / size, torch.zeros_like(X)
    alpha, beta = [], [0.0]
    for _ in range(DEGREE):
        Y = project_out(V, ((D @ X).mT @ D).mT)
        alpha.append(float((X * Y).sum()))
        Y = Y - alpha[-1] * X - beta[-1] * last
        beta.append(max(float(torch.linalg.vector_norm(Y)), tiny))
        X, last = Y / beta[-1], X
    low = float(torch.linalg.eigvalsh(make_tridiagonal(alpha, beta[1:-1]))[-1])
    return solve_mass(low, alpha, beta, size)


def make_tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    """Symmetric tridiagonal matrix in float64."""
    off = torch.tensor(beside, dtype=torch.float64)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)


def solve_mass(low: float, alpha: list[float], beta: list[float], size: float) -> float:
    """The point above `low`, from which on all p_j grow, where sum_j p_j^2 reaches 1 / LEAST_MASS."""

    def is_too_much(point: float) -> bool:
        before, now, total = 0.0, 1.0 / size, 1.0 / size**2
        for a, b, following in zip(alpha, beta, beta[1:], strict=False):
            before, now = now, ((point - a) * now - b * before) / following
            total += now * now
            if total * LEAST_MASS > 1.0:
                return True
        return False

    low = max(low, 0.0)
    high = 2.0 * low + torch.finfo(torch.float32).tiny
    while not is_too_much(high):
        high *= 2.0
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (low, middle) if is_too_much(middle) else (middle, high)
    return high


def project_out(V: Tensor, X: Tensor) -> Tensor:
    """(I - V V^T) X."""
    return X - V @ (V.mT @ X)


def bound_leading(squares: Tensor, coupling: Tensor, k: int, rest: float, power: float) -> tuple[float, float]:
    """Bounds on what Ritz values miss of the k largest singular values, and on the next: (missed, limit).

    squares: Ritz values t_i of H = D^T D, descending, float64. coupling: norms c_i of their residuals, H v_i - t_i v_i.
    rest: bound on the norm g of H in the complement of those v_i. missed: share that s_1^(1+p) + ... + s_k^(1+p) may
    exceed the sum of the t_i^((1+p)/2) by. limit: bound on s_{k+1}^2. Both are infinite where there is no bound.

    In the basis (v_i, complement) H has the blocks diag(t) and g on its diagonal and the residuals beside it. For any
    x_i > 0 a Schur complement shows that H lies below diag(t + x) and g + sum_i c_i^2 / x_i. By Weyl's monotonicity
    the eigenvalues of H are below those: with a level l, x_i = l - t_i where t_i < l, and the best x_i for the others
    that leave sum_i c_i^2 / x_i = l - g. The residuals count squared; where singular values are tied with the cut, a
    level just above them counts for each of them.
    """
    unit = float(squares[0])
    t, c, g = squares / unit, coupling / unit, rest / unit
    after = float(t[k]) if k < t.numel() else 0.0
    level = (max(g, after, 1e-300) * (1.0 + torch.logspace(-9, 6, LEVELS, dtype=torch.float64)))[:, None]
    is_above = t >= level
    outer = torch.where(is_above, 0.0, c.square() / (level - t))
    margin = level[:, 0] - g - outer.sum(1)
    slope = (1.0 + power) / 2.0 * t.clamp_min(1e-300).pow((power - 1.0) / 2.0)
    needs = torch.where(is_above, c * slope.sqrt(), 0.0).sum(1)
    x = c / slope.sqrt() * (needs / margin)[:, None]
    raised = torch.where(is_above, (t + x).clamp_min(0.0).pow((1.0 + power) / 2.0), 0.0).sum(1)
    raised += (k - is_above.sum(1)) * level[:, 0].pow((1.0 + power) / 2.0)
    good = margin > 0.0
    if not bool(good.any()):
        return math.inf, math.inf
    held = float(t[:k].pow((1.0 + power) / 2.0).sum())
    return float(raised[good].min()) / held - 1.0, float(level[good].min()) * unit
