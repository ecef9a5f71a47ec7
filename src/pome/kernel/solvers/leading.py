"""Leading directions of a Gram matrix all of whose eigenvalues are known: for a cut that may lie in a dense bulk.

Eigenvalues alone cost a third of what they cost with their vectors. They say what the k leading directions have to
attain, and how far the others lie below. So a few vectors can be found, and certified, without the rest.

The strong directions are deflated first (`pome.kernel.solvers.deflated`), and a block Lanczos iteration on the Gram
matrix of the rest finds the others: Golub and Underwood, "The block Lanczos method for computing eigenvalues",
Mathematical Software III, 1977. A product with that n x n matrix costs less than one with D, so that many small steps
can be afforded. Where they lead nowhere, all eigenvectors are found.

What the certificate promises is promised here too: the objective, and where the gap after s_k is above GAP the edit M
itself to SUBSPACE, relative in the Frobenius norm. A direction counts by its weight in M: at power 1 a weak one little.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pome.kernel.decomposition import SUBSPACE, Truncation, Undecided
from pome.kernel.gram_products import fill_lower, find_eigenvectors
from pome.kernel.householder import orthonormalise
from pome.kernel.missed import project_out
from pome.kernel.norms import draw_gaussian
from pome.kernel.power import multiply_power
from pome.kernel.precision import to_float64
from pome.kernel.rank import RankRule, rank_tolerance
from pome.kernel.solvers.deflated import LOST, DeflatedGram, deflate, find_noise, find_resolution, is_open

# All vectors cost little up to a short side of WHOLE. From a SHARE of them on they are found at once.
WHOLE, SHARE = 768, 1 / 8
BLOCK = 32  # columns of a step
# Ritz vectors are looked at when the space has FIRST times as many columns as are wanted, then AGAIN times as many as
# before. At MOST of the short side all eigenvectors would have cost no more.
FIRST, AGAIN, MOST = 2, 1.25, 1 / 3
SURELY = 0.5  # of what is allowed, for the Gram matrix: the delta itself is judged once more
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
        W = iterate_leading(split, sigma, k, power)
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


def iterate_leading(split: DeflatedGram, sigma: Tensor, k: int, power: float) -> Tensor | None:
    """Eigenvectors (ascending) of the deflated Gram matrix for the k leading values of `sigma`, but for the strong.

    None where so many steps are needed that all eigenvectors are found as soon.
    """
    p, count = split.theta.numel(), k - split.theta.numel()
    if count <= 0:
        return split.G.new_empty(split.G.shape[0], 0)
    G = fill_lower(split.G)
    known = split.theta.square()
    new = orthonormalise(draw_gaussian(G.shape[0], BLOCK, G))
    Q, images, H = G.new_empty(G.shape[0], 0), G.new_empty(G.shape[0], 0), torch.zeros(0, 0, dtype=torch.float64)
    look = FIRST * count
    while Q.shape[1] + BLOCK <= MOST * G.shape[0]:
        image = G @ new
        Q, images = torch.cat((Q, new), 1), torch.cat((images, image), 1)
        beside = to_float64(Q).mT @ to_float64(image)
        H = torch.cat((torch.cat((H, beside[: len(H)].cpu()), 1), beside.mT.cpu()))
        if Q.shape[1] >= look:
            squares, X = torch.linalg.eigh(H)
            squares, X = squares[-count:], X[:, -count:].to(Q)
            W = Q @ X
            coupling = torch.linalg.vector_norm(images @ X - W * squares.to(W), dim=0).cpu().double().flip(0)
            all_squares = torch.cat((known, squares.flip(0)))
            if judge(all_squares, torch.cat((torch.zeros_like(known), coupling)), sigma, k, power) <= SURELY:
                return W
            look = AGAIN * Q.shape[1]
        new = orthonormalise(project_out(Q, orthonormalise(image - Q @ beside.to(Q))))
    return None
