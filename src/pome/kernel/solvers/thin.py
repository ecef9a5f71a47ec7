"""Thin route for few directions: block Krylov iteration on the short side, and bounds on what it missed.

The space span(X, H X, H^2 X, ...) of H = D^T D and a Gaussian block X holds the leading singular directions nearly as
well as can be after so many products with D: Musco and Musco, "Randomized block Krylov methods for stronger and faster
approximate singular value decomposition", NeurIPS 2015, whose bounds need no gap between singular values; the simple
form with one or two products is that of Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Rev.
53(2), 2011. Each step takes the residuals of the leading Ritz vectors into the space, which is the same space as long
as none has converged, and tells how far they are from singular vectors.

The residuals and a bound on the norm of the rest tell how much larger than the Ritz values the singular values may be
(`pome.kernel.missed`). The bounds hold with probability 1 - 1e-6 over the seeded start: one in each of the STEPS, at
most. The rank of D stays unknown.

Where they do not close, the ladder takes over. Mostly that is a cut in a dense bulk, which the second step notices:
the direction lies below the edge of a noise that has the norm of what is left (Marchenko and Pastur, Math. USSR Sb.
1(4), 1967). Otherwise the rate of convergence tells, after a few steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
from pome.kernel.householder import orthonormalise
from pome.kernel.missed import SLACK, bound_leading, bound_squared_norm, project_out
from pome.kernel.norms import draw_gaussian, squared_norm
from pome.kernel.polar import scaled_image
from pome.kernel.power import multiply_power
from pome.kernel.precision import to_float64
from pome.kernel.rank import RankRule

STEPS = 9  # at most: what the rest of them can still gain decides whether they are worth it
MISSED = 3e-6  # share of the objective that may be missed: the certificate allows 1e-5 for all
RESIDUAL = 5e-6  # of what the certificate allows the power residual, half
AFTER, AFTER_GAP = 1e-5, 0.25  # relative error of s_{k+1}: the first, or the second times the gap where that is wide
ROUNDED = 1e-6  # relative error of norm_F(D)^2, and to spare
# s_1 / s_{k+1} up to which rounding leaves the kept directions alone, by dtype.
STEEPEST = {torch.float32: 3000.0, torch.float64: 1e4}


@dataclass(frozen=True)
class Outlook:
    """Accuracy of the k leading directions, as far as the bounds tell.

    missed: share of the objective that they may miss. angle: of the kept subspace, relative in the Frobenius norm, and
    0 where the cut is open. residual: norm_F(M^T D - D^T M) / norm_F(M^T D). after: relative error of s_{k+1}. gap:
    (s_k - s_{k+1}) / s_k.
    """

    missed: float
    angle: float
    residual: float
    after: float
    gap: float

    @property
    def excess(self) -> float:
        """The largest of these errors, each over its allowed value."""
        after = self.after / max(AFTER, AFTER_GAP * self.gap)
        return max(self.missed / MISSED, self.angle / SUBSPACE, self.residual / RESIDUAL, after)


def solve_thin(D: Tensor, rule: RankRule, cache: DecompositionCache | None = None, power: float = 0.0) -> Truncation:
    """Truncation of D (m x n, float32 or float64) at the k of the rule `fixed`; its rank is None, and sigma ends after
    s_{k+1}. Raises Undecided where the bounds do not close."""
    k, tall = int(rule.number or 0), D if D.shape[0] >= D.shape[1] else D.mT
    found = find_decomposition(cache, f"thin-{k}-{power}", D, lambda: decompose_thin(tall, k, power))
    sigma = found.sigma
    B = scaled_image(tall, found.V, sigma[:k])
    M, isometry, factors = multiply_power(B, found.V, sigma[:k], tall is not D, 0, power)
    return Truncation(M, sigma, None, k, found.noise, power, isometry, missed=found.missed, factors=factors)


def decompose_thin(D: Tensor, k: int, power: float) -> Decomposition:
    """The k leading right singular vectors of D (m x n, m >= n) and k + 1 singular values. Raises Undecided."""
    block, total = k + k // 2 + 8, squared_norm(D)
    Q, F, H = D.new_empty(D.shape[1], 0), D.new_empty(0, D.shape[0]), torch.zeros(0, 0, dtype=torch.float64)
    new, before = orthonormalise(D.mT @ draw_gaussian(D.shape[0], block, D)), 1.0
    for step in range(STEPS):
        Q, F = torch.cat((Q, new), 1), torch.cat((F, (D @ new).mT))
        beside = (to_float64(F) @ to_float64(F[-new.shape[1] :]).mT).cpu()
        H = torch.cat((torch.cat((H, beside[: len(H)]), 1), beside.mT))
        squares, X = torch.linalg.eigh(H)
        squares, X = squares.flip(0).clamp_min(0.0), X.flip(1)[:, :block].to(Q)
        if not float(squares[k]) * STEEPEST[D.dtype] ** 2 > float(squares[0]):
            raise Undecided(f"s_1 is over {STEEPEST[D.dtype]:g} times s_{k + 1}")
        mean = (total - float(squares[:block].sum())) / max(D.shape[1] - block, 1)
        if step and not float(squares[k - 1]) > (1.0 + math.sqrt(D.shape[1] / D.shape[0])) ** 2 * mean:
            raise Undecided(f"s_{k} lies within what noise with the norm of the rest has")
        V = Q @ X
        E = project_out(V, ((X.mT @ F) @ D).mT - V * squares[:block].to(V))
        coupling = torch.linalg.vector_norm(E, dim=0).cpu().double()
        moving = coupling > torch.finfo(D.dtype).eps * (squares[:block] * total).sqrt()
        length = float(coupling[:k].norm())
        h, outlook = choose_count(squares, coupling, k, power)
        if outlook.excess <= 1.0:
            rest = min(bound_squared_norm(D, V[:, :h]), (1.0 + ROUNDED) * total - float(squares[:h].sum()))
            outlook = judge(squares, coupling, k, h, rest, power)
            if outlook.excess <= 1.0:
                sigma, noise = squares[: k + 1].sqrt(), float(coupling[k - 1] / squares[k - 1])
                return Decomposition(sigma, k + 1, V[:, :k].contiguous(), noise=noise, missed=outlook.missed)
        # From the second step on: at twice the rate so far, which grows with the space. The first rate says little.
        hoped = coupling * (0.0 if step < 2 else min(1.0, length / before) ** (2 * (STEPS - 1 - step)))
        can_grow = 0 < int(moving.sum()) <= V.shape[0] - Q.shape[1]
        if not can_grow or (step and not choose_count(squares, hoped, k, power)[1].excess <= 1.0):
            break
        before = length
        new = orthonormalise(project_out(Q, orthonormalise(project_out(Q, E[:, moving.to(E.device)]))))
    raise Undecided(f"the {k} leading directions are not known after {step + 1} steps")


def choose_count(squares: Tensor, coupling: Tensor, k: int, power: float) -> tuple[int, Outlook]:
    """Number of leading Ritz vectors with the best bound on what they miss, and the outlook to be expected."""
    most = min(coupling.numel(), squares.numel() - 1)
    counts = sorted({k + 1 + (most - k - 1) * i // 3 for i in range(4)})
    outlooks = [judge(squares, coupling, k, h, SLACK * float(squares[h]), power) for h in counts]
    best = min(range(len(counts)), key=lambda i: outlooks[i].excess)
    return counts[best], outlooks[best]


def judge(squares: Tensor, coupling: Tensor, k: int, h: int, rest: float, power: float) -> Outlook:
    """The outlook for k directions, from h Ritz values and residuals and the squared norm of the rest."""
    t, c = squares[:h], coupling[:h]
    missed, limit = bound_leading(t, c, k, rest, power)
    kept, r = t[:k], c[:k] / t[:k].sqrt()
    gap = 1.0 - math.sqrt(float(t[k] / t[k - 1]))
    angle = 0.0
    if gap + float(c[k - 1] / t[k - 1]) / 2.0 > GAP - RESERVE:  # beyond what s_k may still grow by
        room = (kept - limit).clamp_min(0.0)
        angle = math.sqrt(2.0 * float((c[:k] / room).square().sum()) / k)
    weights = (kept / t[0]).pow(power / 2.0)
    residual = math.sqrt(2.0) * float((r * weights).norm() / (kept.sqrt() * weights).norm()) if power else 0.0
    # s_{k+1} may exceed its Ritz value by all that s_1 + ... + s_{k+1} exceed theirs by.
    one = bound_leading(t, c, k + 1, rest, 0.0)[0] * float(t[: k + 1].sqrt().sum())
    after = min(one, math.sqrt(limit) - math.sqrt(float(t[k])))
    return Outlook(missed, angle, residual, max(after, 0.0) / math.sqrt(float(t[k])), gap)
