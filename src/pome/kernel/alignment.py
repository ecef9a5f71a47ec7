"""Alignment of a delta with the leading singular directions of its base weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pome.kernel.norms import draw_gaussian
from pome.kernel.precision import full_precision

LEADING = 16  # directions of the base that a delta is held against
OVERSAMPLING = 8  # more of them in the subspace iteration, so that the last of the leading converges too
STEPS = 2  # of that iteration; the singular values of a weight matrix fall fast at the top


@dataclass(frozen=True)
class Alignment:
    """How a delta D lies to its base W, seen from W's r leading singular directions U, V (found approximately).

    left = norm_F(U^T D)^2 / norm_F(D)^2 and right = norm_F(D V)^2 / norm_F(D)^2; for a D without a preferred direction
    they are about r / m and r / n. drift = norm(s(W V + D V) - s(W V)) / norm(s(W V)): how far the singular values of
    the fine-tuned weight have moved, of those that the base's leading input directions carry.
    spectral_norm = the largest singular value of W.
    """

    r: int
    left: float
    right: float
    drift: float
    spectral_norm: float


def measure_alignment(W: Tensor, D: tuple[Tensor, ...], delta_norm: float) -> Alignment:
    """Alignment of a delta with its base W (m x n, float32 or float64); D is (D,) or its factors (b, a), on W's device.

    Seeded, so the same input gives the same numbers. It costs a few thin products: some per cent of the spectrum's
    time.
    """
    m, n = W.shape
    r = max(1, min(LEADING, min(m, n) // 8))
    with full_precision(W.device):
        X = draw_gaussian(n, min(n, r + OVERSAMPLING), W)
        for _ in range(STEPS):
            X = torch.linalg.qr(W.mT @ (W @ X)).Q
        image = W @ X
        values, turn = torch.linalg.eigh((image.mT.double() @ image.double()).cpu())
        turn = turn.flip(1)[:, :r].to(W)
        V, WV = X @ turn, image @ turn
        U = torch.linalg.qr(WV).Q
        DV, UD = V, U.mT
        for factor in reversed(D):
            DV = factor @ DV
        for factor in D:
            UD = UD @ factor
        before = torch.linalg.svdvals(WV.double())
        after = torch.linalg.svdvals((WV + DV).double())
        length = float(before.norm())
        return Alignment(
            r=r,
            left=float(UD.double().norm()) ** 2 / delta_norm**2,
            right=float(DV.double().norm()) ** 2 / delta_norm**2,
            drift=float((after - before).norm()) / length if length else math.inf,
            spectral_norm=float(before[0]),
        )
