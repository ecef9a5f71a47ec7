"""Certificate that a matrix is the edit that the method asks for, without a second decomposition.

P = U_k V_k^T maximises <D, P> over rank(P) <= k and spectral norm <= 1, and the optimum is s_1 + ... + s_k (Ky Fan). So
P is right when its non-zero singular values are 1, there are k of them, and <D, P> attains the sum.

M = U_k (S_k / s_1)^p V_k^T is right when its factor U_k V_k^T has that property, M^T D is symmetric, so that M and D
share their singular vectors, and <D, M> and the norm of M are those of its weights w_i = (s_i / s_1)^p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pome.kernel.decomposition import Truncation
from pome.kernel.norms import dot, draw_gaussian, multiply_thin, split_rows

TOLERANCE = 1e-5
# The mean square of s Gaussian probes of E is an unbiased estimate of norm_F(E)^2. Its worst case is an E of rank
# one, a chi-square of s degrees: with 8, an E ten times over the tolerance passes with probability below 2e-7, one
# three times over with 0.1 %. An E of higher rank, which is what rounding leaves, is estimated far more sharply.
PROBES = 8
Operand = tuple[Tensor, ...]  # a delta: (D,) with D m x n, or (b, a) with D = b @ a


@dataclass(frozen=True)
class Certificate:
    """The numbers that prove an M of k directions.

    objective = <D, M> / (s_1 w_1 + ... + s_k w_k); orthogonality = norm_F(P P^T P - P) / norm_F(P) of P = U_k V_k^T;
    norm = norm_F(M), whose square should be w_1^2 + ... + w_k^2 = `square`; residual = norm_F(M^T D - D^T M) /
    norm_F(M^T D), which counts where the power p is not 0.
    """

    objective: float
    orthogonality: float
    norm: float
    square: float
    residual: float = 0.0
    power: float = 0.0

    def find_fault(self) -> str | None:
        """Fault of M in words, or None. A NaN fails every comparison, and so is a fault."""
        if not self.orthogonality <= TOLERANCE:
            return f"orthogonality {self.orthogonality:.1e}"
        if self.power == 0.0:
            if not abs(self.norm**2 - self.square) < 0.5:
                return f"{self.norm**2:.2f} directions instead of {self.square:.0f}"
        else:
            if not abs(self.norm**2 / self.square - 1.0) <= TOLERANCE:
                return f"squared norm {self.norm**2:.6g} instead of {self.square:.6g}"
            if not self.residual <= TOLERANCE:
                return f"power residual {self.residual:.1e}"
        if not abs(1.0 - self.objective) <= TOLERANCE:
            return f"1 - objective {1.0 - self.objective:.1e}"
        return None


def certify(found: Truncation, D: Operand) -> Certificate:
    """Certificate of a truncation of D, from M itself.

    The norms of P P^T P - P and of M^T D - D^T M are estimated by Gaussian probes, or computed where one side has no
    more than PROBES. A few passes over M and D.
    """
    product, square = 0.0, 0.0
    for rows in split_rows(found.M):
        product += find_inner_product(D, rows, found.M[rows])
        square += dot(found.M[rows], found.M[rows])
    norm = math.sqrt(square)
    if found.isometry is None:
        orthogonality = measure_isometry(found.M) / norm if norm else math.nan
    else:
        orthogonality = measure_defect(*found.isometry) / math.sqrt(found.k)
    residual = measure_asymmetry(found.M, D)
    return finish_certificate(found, product, orthogonality, norm, residual)


def finish_certificate(
    found: Truncation, product: float, orthogonality: float, norm: float, asymmetry: float
) -> Certificate:
    """Certificate from <D, M> and the norms, over what the spectrum says they should be, or at most."""
    sigma, weights = found.sigma[: found.k], found.weights
    return Certificate(
        objective=product / float((sigma * weights).sum()) / (1.0 + found.missed),
        orthogonality=orthogonality,
        norm=norm,
        square=float(weights.square().sum()),
        residual=asymmetry / float((sigma * weights).square().sum().sqrt()),
        power=found.power,
    )


def measure_isometry(P: Tensor) -> float:
    """norm_F(P P^T P - P) of P (m x n)."""
    if P.shape[0] <= PROBES < P.shape[1]:
        P = P.mT
    image = multiply_thin(P, draw_probes(P.shape[1], P))
    defect = multiply_thin(P, multiply_thin(P.mT, image)) - image
    return math.sqrt(dot(defect, defect))


def measure_defect(left: Tensor, right: Tensor) -> float:
    """norm_F(P P^T P - P) of P = left @ right (m x k and k x n)."""
    if left.shape[0] <= PROBES < right.shape[1]:
        left, right = right.mT, left.mT
    image = draw_probes(right.shape[1], left)
    for factor in (right, left):
        image = multiply_thin(factor, image)
    again = image
    for factor in (left.mT, right.mT, right, left):
        again = multiply_thin(factor, again)
    return float(torch.linalg.vector_norm(again - image))


def measure_asymmetry(M: Tensor, D: Operand) -> float:
    """norm_F(M^T D - D^T M), for M and D m x n."""
    probes = draw_probes(M.shape[1], M)
    seen = probes
    for factor in reversed(D):
        seen = multiply_thin(factor, seen)
    back = multiply_thin(M, probes)
    for factor in D:
        back = multiply_thin(factor.mT, back)
    return float(torch.linalg.vector_norm(multiply_thin(M.mT, seen) - back))


def find_inner_product(D: Operand, rows: slice, block: Tensor) -> float:
    """<D, P> of the rows of P in `block`, without the product where D is one."""
    if len(D) == 1:
        return dot(D[0][rows], block)
    return dot(D[0][rows], block @ D[1].mT)


def draw_probes(n: int, like: Tensor) -> Tensor:
    """Probes (n x PROBES) of unit variance in sum, or the identity for small n."""
    return torch.eye(n).to(like) if n <= PROBES else draw_gaussian(n, PROBES, like) / math.sqrt(PROBES)


def certify_factored(found: Truncation, b: Tensor, a: Tensor) -> Certificate:
    """Certificate of an M that was multiplied from L diag(w) R, L m x k and R k x n, against D = b @ a.

    With G = L^T L and H = R R^T everything about P = L R is k x k: P P^T P - P = L (H G - I) R. Probes show how far M
    is from L diag(w) R, in one pass over it: d = M - L diag(w) R adds at most 3 norm_F(d) to the defect (to first order
    it moves by d (P^T P - I) + P d^T P + P P^T d), 2 s_1 norm_F(d) to the asymmetry, and norm_F(d) to the norm.
    """
    assert found.isometry is not None
    M, (left, right), weights = found.M, found.isometry, found.weights
    L, R = left.double().cpu(), right.double().cpu()
    G, H = L.mT @ L, R @ R.mT
    norm = math.sqrt(max(float((weights[:, None] * G * weights * H).sum()), 0.0))
    X = H @ G
    X.diagonal().sub_(1.0)
    defect = math.sqrt(max(float(((X.mT @ G @ X) * H).sum()), 0.0))
    Lb, aR = b.double().cpu().mT @ L, a.double().cpu() @ R.mT
    product = float((Lb * aR * weights).sum())
    probes = draw_gaussian(M.shape[1], PROBES, M) / math.sqrt(PROBES)
    seen = right @ probes
    difference = float(torch.linalg.vector_norm(M @ probes - left @ (seen * weights.to(seen)[:, None])))
    if not norm:
        return finish_certificate(found, math.nan, math.nan, norm, math.nan)
    Z = probes.double().cpu()
    forward = R.mT @ (weights[:, None] * (Lb.mT @ (a.double().cpu() @ Z)))
    backward = a.double().cpu().mT @ (Lb @ (weights[:, None] * (R @ Z)))
    asymmetry = float(torch.linalg.vector_norm(forward - backward)) + 2.0 * float(found.sigma[0]) * difference
    return finish_certificate(found, product, (defect + 3.0 * difference) / norm_of(G, H), norm, asymmetry)


def norm_of(G: Tensor, H: Tensor) -> float:
    """norm_F(L R) from G = L^T L and H = R R^T."""
    return math.sqrt(max(float((G * H).sum()), 0.0))
