"""Powers of the kept singular values: M = U_k S_k^P V_k^T, from columns D V_k that are nearly orthogonal already.

At P = 0 that is the polar factor of D V_k times V_k^T, which `pome.kernel.polar` computes. For every P the error of
the single directions in V is corrected to first order. With B = D V / s and E = B^T B - I,

    M = B X V^T,    X = (D V)^T (D V) to the power (P - 1) / 2, times s from the left,

and the divided differences of that power give X_ij = w_j (I_ij - L_ij), L_ij = E_ij expm1((1 - P) t) / expm1(2 t) with
w_j = (s_j / s_1)^P and t = log(s_j / s_i). At P = 1, where M = D V V^T, nothing has to be corrected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pome.kernel.decomposition import Factors, Undecided
from pome.kernel.gram_products import multiply_gram
from pome.kernel.polar import ORTHONORMAL, apply_correction, estimate_defect, find_correction_blocks, multiply_polar
from pome.kernel.precision import to_float64


def multiply_power(
    B: Tensor, V: Tensor, sigma: Tensor, transposed: bool, strong: int, power: float
) -> tuple[Tensor, Factors | None, Factors | None]:
    """U_k (S_k / s_1)^P V_k^T, the two factors of U_k V_k^T, and those it is the product of (None for P = 0).

    V (n x k) are nearly the leading right singular vectors of D (m x n) and B = D V / sigma (m x k). The product is
    m x n, or n x m where `transposed`. Raises Undecided where the columns of B are too far from orthonormal.
    """
    if power == 0.0:
        return multiply_polar(B, V, sigma, transposed, strong), None, None
    B, right, isometric = weigh_directions(B, V.mT, sigma, strong, power)
    if transposed:
        return right.mT @ B.mT, (isometric.mT, B.mT), (right.mT, B.mT)
    return B @ right, (B, isometric), (B, right)


def weigh_directions(B: Tensor, W: Tensor, sigma: Tensor, strong: int, power: float) -> tuple[Tensor, Tensor, Tensor]:
    """B (m x k), X V^T and X_0 V^T (k x n) with M = B X V^T and U_k V_k^T = B X_0 V^T, from W = V^T."""
    most = ORTHONORMAL * torch.finfo(B.dtype).eps
    weights = (sigma / sigma[0]) ** power
    weighted = W * weights.to(W)[:, None]
    if estimate_defect(B) <= most:
        return B, weighted, W
    k, p = B.shape[1], strong
    if 0 < p < k and estimate_defect(B, blocks := find_correction_blocks(B, sigma, p)) <= most:
        E = B[:, :p].mT @ B[:, p:]
        s, t = sigma[:p], sigma[p:]
        upper = E * (correct_power(s, t, power) * weights[p:]).to(E)
        lower = E.mT * (correct_power(t, s, power) * weights[:p]).to(E)
        return B, weighted - torch.cat((upper @ W[p:], lower @ W[:p])), apply_correction(blocks, W)
    C = multiply_gram(B)
    E = C.clone()
    E.diagonal().sub_(1.0)
    if float(torch.linalg.matrix_norm(E)) ** 2 > torch.finfo(E.dtype).eps * k**0.5:
        return rotate_to_singular_vectors(B, C, W, sigma, power)
    X = E * (correct_power(sigma, sigma, power) * weights).to(E)
    X_0 = E * correct_power(sigma, sigma, 0.0).to(E)
    return B, torch.addmm(weighted, X, W, alpha=-1.0), torch.addmm(W, X_0, W, alpha=-1.0)


def correct_power(s: Tensor, t: Tensor, power: float) -> Tensor:
    """Weights expm1((1 - P) log(t_j / s_i)) / expm1(2 log(t_j / s_i)) of the first-order correction."""
    ratio = (t / s[:, None]).log()
    quotient = torch.expm1((1.0 - power) * ratio) / torch.expm1(2.0 * ratio)
    return torch.where(ratio == 0.0, (1.0 - power) / 2.0, quotient)


def rotate_to_singular_vectors(
    B: Tensor, C: Tensor, W: Tensor, sigma: Tensor, power: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where first order does not do: by the singular value decomposition of D V itself, through the Cholesky
    factor R of C = B^T B, in float64."""
    R, failed = torch.linalg.cholesky_ex(to_float64(C), upper=True)
    if int(failed):
        raise Undecided("the kept directions are not orthogonal enough")
    U, s, Zh = torch.linalg.svd(R * sigma.to(R))
    left = torch.linalg.solve_triangular(R, U, upper=True)
    isometric = Zh.to(W) @ W
    return B @ left.to(B), isometric * ((s / s[0]) ** power).to(W)[:, None], isometric
