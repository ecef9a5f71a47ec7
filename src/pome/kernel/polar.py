"""Polar factor of D V_k, from columns that are nearly orthonormal already."""

from __future__ import annotations

import torch
from torch import Tensor

from pome.kernel.decomposition import Undecided
from pome.kernel.gram_products import multiply_gram
from pome.kernel.norms import draw_gaussian

ORTHONORMAL = 60.0  # defect of B, in units of rounding, that P may keep: 7e-6 in float32, and the certificate's is 1e-5


def scaled_image(D: Tensor, V: Tensor, sigma: Tensor) -> Tensor:
    """D V with every column divided by its singular value (m x k, in the precision of D): nearly U."""
    return (D @ V).mul_(sigma.reciprocal().to(D))


def multiply_polar(B: Tensor, V: Tensor, sigma: Tensor, transposed: bool, strong: int = 0) -> Tensor:
    """Orthonormal polar factor of D V times V^T, for V (n x k) nearly the leading singular vectors of D (m x n), from
    B = D V / sigma (m x k); m x n, or n x m where `transposed`.

    B is nearly orthonormal already. Its defect E = B^T B - I is what the rounding of V mixed in, times the ratio of
    singular values: a rotation d of V makes E_ij = d_ij (s_i^2 - s_j^2) / (s_i s_j). The polar factor of D V is the
    same for every d, and to first order it is B (I - L) with L_ij = E_ij s_i / (s_i + s_j): of two directions the
    weaker one is corrected more. The symmetric half of E would give the polar factor of B, which is off by
    s_i / (2 s_j) times d. Mostly only the `strong` leading directions have leaked into the others, and then two thin
    blocks of L are all that is needed.
    """
    W, most = V.mT, ORTHONORMAL * torch.finfo(B.dtype).eps
    if estimate_defect(B) > most:
        blocks = find_correction_blocks(B, sigma, strong)
        is_enough = 0 < strong < B.shape[1] and estimate_defect(B, blocks) <= most
        W = apply_correction(blocks, W) if is_enough else correct_by_newton(multiply_gram(B), W, sigma)
    return W.mT @ B.mT if transposed else B @ W


CorrectionBlocks = tuple[Tensor, Tensor]  # the blocks p x (k - p) and (k - p) x p of an L that is zero elsewhere


def find_correction_blocks(B: Tensor, sigma: Tensor, p: int) -> CorrectionBlocks:
    """First-order polar correction between the first p columns of B (m x k) and the others."""
    E = B[:, :p].mT @ B[:, p:]
    share = weigh(sigma[:p], sigma[p:]).to(E)
    return E * share, (E * (1.0 - share)).mT


def apply_correction(blocks: CorrectionBlocks, X: Tensor) -> Tensor:
    """(I - L) X, for X with k rows."""
    upper, lower = blocks
    return X - torch.cat((upper @ X[len(upper) :], lower @ X[: len(upper)]))


def weigh(s: Tensor, t: Tensor) -> Tensor:
    """Weights s_i / (s_i + t_j) of the polar correction."""
    return s[:, None] / (s[:, None] + t)


def correct_by_newton(C: Tensor, W: Tensor, sigma: Tensor) -> Tensor:
    """Polar correction T W by repeated first-order steps, with C = B^T B (k x k) near the identity.

    Each step squares what is left of E = C - I. Raises Undecided where E is too large for that.
    """
    share = weigh(sigma, sigma).to(C)
    for _ in range(5):
        E = C.clone()
        E.diagonal().sub_(1.0)
        size = float(torch.linalg.matrix_norm(E))
        if not size < 0.7:
            break
        L = E.mul_(share)
        W = torch.addmm(W, L, W, alpha=-1.0)
        if size**2 < torch.finfo(E.dtype).eps * C.shape[0] ** 0.5:
            return W
        L.diagonal().sub_(1.0)
        C = L.mT @ C @ L
    raise Undecided("the kept directions are not orthogonal enough")


def estimate_defect(B: Tensor, blocks: CorrectionBlocks | None = None) -> float:
    """Defect norm_F(B^T B - I) / sqrt(k), about, of B (m x k) or of the corrected B, by a few probes."""
    probes = draw_gaussian(B.shape[1], 4, B)
    image = B.mT @ (B @ (probes if blocks is None else apply_correction(blocks, probes)))
    image = image if blocks is None else apply_correction((blocks[1].mT, blocks[0].mT), image)
    return float(torch.linalg.vector_norm(image - probes) / torch.linalg.vector_norm(probes))
