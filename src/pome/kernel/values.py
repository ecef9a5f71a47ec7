"""Singular values without vectors: what looking at a delta takes, and much less than editing it does.

The route is that of the edit: float32 with the strong directions taken out, then a float64 Gram matrix, then a float64
decomposition; `eigvalsh` in place of `eigh`, and no product with the long side but the squaring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pome.kernel.certificate import draw_gaussian
from pome.kernel.decomposition import Undecided, ZeroDelta
from pome.kernel.equalize import SMALL, Unsolved, check_shape, normalise, shift, summarise
from pome.kernel.gram_products import gram
from pome.kernel.precision import full_precision
from pome.kernel.rank import count_rank, rank_tolerance
from pome.kernel.solvers.deflated import CANCEL, FLOOR, split_strong
from pome.kernel.solvers.factors import CANCELLED

LEADING = 16  # directions of the base that a delta is held against
BESIDE = 8  # more of them in the subspace iteration, so that the last of the leading converges too
STEPS = 2  # of that iteration; the singular values of a weight matrix fall fast at the top


@dataclass(frozen=True)
class Values:
    """All min(m, n) singular values of a matrix, descending, float64, CPU; zero below its numerical rank."""

    sigma: Tensor
    rank: int


@dataclass(frozen=True)
class Bearing:
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


def measure_values(D: Tensor) -> Values:
    """Singular values of D (m x n, any float dtype, any device).

    Raises ZeroDelta for nothing but zeros, ValueError for NaN or infinity, and Unsolved when every driver failed.
    """
    check_shape(D, "delta")
    with full_precision(D.device):
        scaled, exponent = normalise(D, "delta")
        tall = scaled if D.shape[0] >= D.shape[1] else scaled.mT
        first = 2 if tall.shape[1] < SMALL else 1 if tall.dtype == torch.float64 else 0
        places = [tall] if D.device.type == "cpu" else [tall, tall.cpu()]
        notes = []
        for place in places:
            for solve in RUNGS[first:]:
                try:
                    return finish_values(solve(place), exponent, (D.shape[0], D.shape[1]))
                except (RuntimeError, Undecided) as failure:
                    notes.append(summarise(failure))
        raise Unsolved("no driver found its singular values: " + "; ".join(notes))


def measure_product(b: Tensor, a: Tensor) -> Values:
    """Singular values of b @ a (b m x r, a r x n) from its thin factors. Raises as measure_values does."""
    shape = (b.shape[0], a.shape[1])
    with full_precision(b.device):
        B, up = normalise(b, "factor b")
        A, down = normalise(a, "factor a")
        core = torch.linalg.qr(B.double()).R @ torch.linalg.qr(A.double().mT).R.mT
        sigma = torch.zeros(min(shape), dtype=torch.float64)
        found = torch.linalg.svdvals(core).cpu()
        if float(found[0]) <= CANCELLED * float(B.double().norm()) * float(A.double().norm()):
            raise ZeroDelta("the factors multiply to zero")
        sigma[: found.numel()] = found
        return finish_values(sigma, up + down, shape)


def finish_values(sigma: Tensor, exponent: int, shape: tuple[int, int]) -> Values:
    """Zero what lies below the numerical rank, and undo the scaling by 2^-exponent."""
    rank = count_rank(sigma, shape)
    return Values(shift(sigma, exponent), rank)


def find_values_deflated(D: Tensor) -> Tensor:
    """Singular values of D (m x n, m >= n, float32), those of the bulk good to sqrt(FLOOR) of its largest.

    Raises Undecided when float32 squares leave open which of them are zero.
    """
    split = split_strong(D)
    sigma = split.join(torch.linalg.eigvalsh(split.G, UPLO="U"))
    noise = FLOOR * float(sigma[split.theta.numel()]) ** 2 + (CANCEL * float(sigma[0])) ** 2
    threshold = float(sigma[0]) * rank_tolerance((D.shape[0], D.shape[1]))
    if not float(sigma[-1]) > math.sqrt(noise + threshold**2):
        raise Undecided("singular values below the float32 floor")
    return sigma


def find_values_gram(D: Tensor) -> Tensor:
    """Singular values of D (m x n, m >= n), good to s_1 / 10^8."""
    squares: Tensor = torch.linalg.eigvalsh(gram(D.double()), UPLO="U")
    return squares.flip(0).clamp_min(0.0).sqrt().cpu()


def find_values_svd(D: Tensor) -> Tensor:
    """Singular values of D (m x n), by the driver for them."""
    values: Tensor = torch.linalg.svdvals(D.double())
    return values.cpu()


RUNGS: tuple[Callable[[Tensor], Tensor], ...] = (find_values_deflated, find_values_gram, find_values_svd)


def measure_bearing(W: Tensor, D: tuple[Tensor, ...], delta_norm: float) -> Bearing:
    """Where a delta lies in its base W (m x n, float32 or float64); D is (D,) or its factors (b, a), on W's device.

    Seeded, so the same input gives the same numbers. The thin products alone cost: some per cent of the spectrum.
    """
    m, n = W.shape
    r = max(1, min(LEADING, min(m, n) // 8))
    with full_precision(W.device):
        X = draw_gaussian(n, min(n, r + BESIDE), W)
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
        return Bearing(
            r=r,
            left=float(UD.double().norm()) ** 2 / delta_norm**2,
            right=float(DV.double().norm()) ** 2 / delta_norm**2,
            drift=float((after - before).norm()) / length if length else math.inf,
            spectral_norm=float(before[0]),
        )
