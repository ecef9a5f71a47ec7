"""The first rung: float32 throughout, with the strong directions taken out before squaring.

A Gram matrix squares the singular values, so in float32 everything below s_1 / 3000 drowns in the rounding of s_1^2.
Fine-tuning deltas are a few strong directions over a dense bulk; without those the bulk spans a factor of ten or so,
and squares without harm. With U (m x b) any orthonormal basis near the strong left directions and F = U^T D,

    D^T D = F^T F + R^T R,     R = D - U F

holds whatever U is: F^T F is large and known through its thin factor, R^T R is what gets squared. A short subspace
iteration on the sum, in n x n, yields the strong right directions Q; what is left beside Q goes to one float32 `eigh`.

Only the leading k-dimensional subspace matters, not single singular vectors: polar(D V_k) V_k^T is the same for every
orthonormal basis V_k of it. The cut itself is settled by a float64 Rayleigh-Ritz step on the few directions around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pome.kernel.certificate import draw_gaussian, squared_norm
from pome.kernel.decomposition import (
    GAP,
    RESERVE,
    SUBSPACE,
    Decomposition,
    DecompositionCache,
    Kept,
    Undecided,
    find_decomposition,
)
from pome.kernel.gram_products import (
    Mirrors,
    add_upper,
    decompose,
    estimate_norm,
    gram,
    gram_of_rest,
    image_of,
    orthonormalise,
    polar,
    reflect,
    scaled_image,
    widen,
)
from pome.kernel.rank import RankRule, rank_tolerance

EPS = 2.0**-24  # rounding of float32
SKETCHES = (32, 96, 256)  # sizes of U, the next one when ...
SPENT = 3.0  # ... even the least that the last one caught stands this many times over the rms of the rest
STRONG = 6.0  # a direction this many times over the rms of the rest must be taken out before squaring ...
APART = 3.0  # ... and with it go those that are this many times over it: less is left for rounding to be relative to
POWERS = 5  # steps of subspace iteration, each on the n x n sum
ESCAPED = 1.24  # largest eigenvalue of the bulk, over the largest Ritz value that the sketch saw of it
# Least eigenvalue of R^T R, relative to the largest, that float32 can tell from zero. Its rounding was seen to move
# eigenvalues by 0.1 to 2 EPS; 32 is the margin that lets the rank be called proved.
FLOOR = 32.0 * EPS
CANCEL = 32.0 * EPS  # what is left, relative to s_1, where a strong direction was subtracted
SURE = 1.5  # a norm estimated from below, times this, is taken for a bound
# A singular value that float64 has looked at again is off by what rounding lets in of n larger directions, each up to
# the resolution, squared. Of that bound 6 % were seen.
LET_IN = 0.1
WINDOW = 32  # directions on either side of the cut that float64 looks at again
# Share of the objective that may be lost where the data leave the cut open: half of what the certificate allows. Below
# NOTHING a wider window is not worth its time.
LOST, NOTHING = 5e-6, 1e-8


@dataclass(frozen=True)
class Split:
    """D^T D (n x n) taken apart: strong right directions Q (n x p) with singular values theta (p, float64, descending),
    residual = D^T D Q - Q theta^2 (n x p), and the Gram matrix G of the rest, n - p square, in the basis that `mirrors`
    make of the complement of Q. `most` is what the largest eigenvalue of G should be, about."""

    Q: Tensor
    theta: Tensor
    residual: Tensor
    G: Tensor
    mirrors: Mirrors
    most: float

    def join(self, lam: Tensor) -> Tensor:
        """Singular values of D (n, float64, CPU), from the eigenvalues of G, ascending. Raises Undecided when one of
        them is too large for what the sketch left."""
        lam = lam.cpu().double().flip(0)
        if self.theta.numel() and not float(lam[0]) < ESCAPED * self.most:
            raise Undecided("a strong direction escaped the sketch")
        return torch.cat((self.theta, lam.clamp_min(0.0).sqrt()))


def solve_deflated(
    D: Tensor, rule: RankRule, cache: DecompositionCache | None = None, helper: torch.device | None = None
) -> Kept:
    """P of D (m x n, float32). Raises Undecided when float32 cannot settle the rank, k or the subspace.

    With a `helper`, only the `eigh` of the short side goes there: for a device that cannot hold D and its products.
    """
    shape = (D.shape[0], D.shape[1])
    tall = D if shape[0] >= shape[1] else D.mT
    name = "deflated-float32" if helper is None else f"deflated-float32+{helper}"
    basis = find_decomposition(cache, name, D, lambda: find_basis(tall, shape, helper or D.device))
    sigma, V, rank = basis.sigma.clone(), basis.V if cache is None else basis.V.clone(), basis.rank
    k = rule.choose(sigma, rank, shape)
    slack = basis.noise / float(sigma[k - 1]) ** 2
    if rule.choose(sigma, rank, shape, slack) != rule.choose(sigma, rank, shape, -slack):
        raise Undecided("the singular values leave k open")
    settle_cut(tall, V, sigma, k, basis)
    B = scaled_image(tall, V[:, :k], sigma[:k])
    sigma[rank:] = 0.0
    P = polar(B, V[:, :k], sigma[:k], tall is not D, basis.strong)
    return Kept(P, sigma, rank, k, find_resolution(sigma, k, basis.strong))


def find_basis(tall: Tensor, shape: tuple[int, int], helper: torch.device) -> Decomposition:
    """All directions of `tall`, which is D (of that shape) or D^T, and the rank. Raises Undecided."""
    split = split_strong(tall)
    lam, W = decompose(split.G.to(helper))
    sigma, p = split.join(lam), split.theta.numel()
    V = split.mirrors.complete(split.Q, W.to(tall.device).flip(1))
    noise = FLOOR * float(sigma[p]) ** 2 + (CANCEL * float(sigma[0])) ** 2
    rank = prove_rank(tall, V, sigma, noise, rank_tolerance(shape))
    return Decomposition(sigma, rank, V, residual=split.residual, strong=p, noise=noise)


def split_strong(D: Tensor) -> Split:
    """Strong directions of D (m x n, m >= n) and the Gram matrix of the rest; a flat spectrum has none.

    A sketch of b columns catches what stands some sqrt(n / b) over the rms of the rest. Where more than b directions
    do, even its weakest is strong; where fewer do, the weakest sinks below the rms.
    """
    n = D.shape[1]
    total = squared_norm(D)
    sketches = [b for b in SKETCHES if b <= n // 4]
    U, F = D.new_empty(D.shape[0], 0), D.new_empty(0, n)
    for b in sketches:
        U, F = widen_sketch(D, U, F, draw_gaussian(n, b, D)[:, U.shape[1] :])
        values = torch.linalg.eigvalsh(widen(F) @ widen(F).mT).cpu()
        rest = max(total - float(values.sum()), EPS * total) / (n - b)
        if not bool((values > STRONG**2 * rest).any()):
            break
        if float(values[0]) <= SPENT**2 * rest or b == sketches[-1]:
            return separate(D, U, F, APART**2 * rest)
    none = D.new_zeros(n, 0)
    return Split(none, torch.zeros(0, dtype=torch.float64), none, gram(D), reflect(none), 0.0)


def widen_sketch(D: Tensor, U: Tensor, F: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """U (m x b) with the directions of D probes (m x c) put beside its own, orthonormal, and F = U^T D (b x n) of all.

    Projecting twice leaves float32 rounding of the old directions in the new ones, not what the first one cancels.
    """
    Y = D @ probes
    for _ in range(2 if U.shape[1] else 0):
        Y = orthonormalise(Y - U @ (U.mT @ Y))
    new = Y if U.shape[1] else orthonormalise(Y)
    return torch.cat((U, new), 1), torch.cat((F, new.mT @ D))


def separate(D: Tensor, U: Tensor, F: Tensor, apart: float) -> Split:
    """Take the directions with squared singular values over `apart` out of D^T D = F^T F + G, G = R^T R.

    All but the first line is n x n or thinner. Q spans an invariant subspace to a high power of bulk over strong
    singular value, so what couples it to the bulk is dropped: V = [Q, W] makes V^T (D^T D) V block diagonal.
    """
    G = gram_of_rest(D, U, F)
    Q = orthonormalise(F.mT)
    for _ in range(POWERS):
        Q = orthonormalise(F.mT @ (F @ Q) + G @ Q)
    FQ, GQ = F @ Q, G @ Q
    values, X = torch.linalg.eigh((widen(FQ).mT @ widen(FQ) + widen(Q).mT @ widen(GQ)).cpu())
    values = values.flip(0)
    # Iteration has parted Q from what lies outside the sketch by the power 2 POWERS of the ratio, 1e-3 at a half.
    p = int((values > max(apart, 4.0 * float(values[-1]))).sum())
    X = X.flip(1)[:, :p].to(Q)
    Q, FQ, GQ = Q @ X, FQ @ X, GQ @ X
    residual = F.mT @ FQ + GQ - Q * values[:p].to(Q)
    mirrors = reflect(Q)
    left, right = mirrors.move(G)
    F = mirrors.apply(F.mT)[p:]
    rest = G[p:, p:]  # H^T G H + H^T F^T F H without the rows and columns of Q
    add_upper(rest, torch.cat((-left[p:], -right[p:], F), 1), torch.cat((right[p:], left[p:], F), 1))
    return Split(Q, values[:p].sqrt(), residual, rest, mirrors, float(values[min(p, values.numel() - 1)]))


def prove_rank(D: Tensor, V: Tensor, sigma: Tensor, noise: float, tolerance: float) -> int:
    """The numerical rank of D (m x n), from its right singular vectors V (n x n) and values, squares good to `noise`.

    Values above the noise count. Orthonormal directions T with norm(D T) below the threshold do not, by Courant and
    Fischer, however inexact they are. Raises Undecided when neither holds for all of them.
    """
    threshold = float(sigma[0]) * tolerance
    rank = int((sigma > math.sqrt(noise + threshold**2)).sum())
    if rank == sigma.numel():
        return rank
    tail, head = V[:, rank:], V[:, :rank]
    image = D @ tail
    if estimate_norm(image) > threshold / SURE:
        # One Newton step takes out what rounding let into the tail of the directions that count.
        weights = sigma[:rank].to(D).square().reciprocal()[:, None]
        tail -= head @ (weights * (head.mT @ (D.mT @ image)))
        image = D @ tail
        if estimate_norm(image) > threshold / SURE:
            raise Undecided("singular values below the float32 floor and above the threshold of the rank")
    sigma[rank:] = 0.0
    return rank


def settle_cut(D: Tensor, V: Tensor, sigma: Tensor, k: int, basis: Decomposition) -> None:
    """Decide in float64 which directions around the cut come before it, and check that the others may stay.

    V and sigma change in place, within a window of directions around the cut. Their float64 Gram matrix shows how far
    float32 left them from diagonal; a rounding of that size in every other pair (kept, dropped) turns the kept
    subspace by a known angle, and takes a known share of the objective. Raises Undecided when that is too much.
    """
    n, p = V.shape[1], basis.strong
    doubt = LET_IN * n * find_resolution(sigma, k, p) ** 2
    # Where the data leave the cut open there is mostly nothing to gain but the digits of s_k: a look at a few will do.
    for half in (WINDOW // 4, WINDOW):
        if half < WINDOW and (k <= p or not is_open(sigma, k, doubt)):
            continue
        low, high = (max(p, k - half), min(n, k + half)) if k > p else (0, p)
        settled = slice(max(low - p, 0), high - p)
        coupling = diagonalise(D, V, sigma, low, high)
        if k == p < n:  # what is left next to the strong ones is the first of the others
            diagonalise(D, V, sigma, p, min(n, p + WINDOW))
        lost = estimate_loss(sigma[p:], k - p, coupling, settled) / float(sigma[:k].sum()) if k > p else 0.0
        if lost <= NOTHING and is_open(sigma, k, doubt):
            return
    if is_open(sigma, k, doubt):
        if not lost <= LOST:
            raise Undecided(f"the cut is known to {lost:.0e} of the objective only")
        return
    angle = estimate_angle(D, V, sigma, k, basis, coupling, settled)
    if not angle <= SUBSPACE:
        raise Undecided(f"the kept subspace is known to {angle:.0e} only")


def is_open(sigma: Tensor, k: int, doubt: float) -> bool:
    """Whether the singular values leave open which directions come before the cut, beyond `doubt` about their gap."""
    return k < sigma.numel() and float(sigma[k - 1] - sigma[k]) <= (GAP - max(doubt, RESERVE)) * float(sigma[k - 1])


def find_resolution(sigma: Tensor, k: int, p: int) -> float:
    """The relative gap at the cut that rounding of the float32 squares leaves in doubt, `p` strong directions apart."""
    return EPS * float(sigma[min(p, k - 1)] / sigma[k - 1]) ** 2


def diagonalise(D: Tensor, V: Tensor, sigma: Tensor, low: int, high: int) -> float:
    """A float64 Rayleigh-Ritz step on the directions from `low` to `high`, in place. Answers how far they were from
    diagonal: the root mean square of D^T D between two of them."""
    image = image_of(D, V[:, low:high])
    H = image.mT @ image
    values, X = torch.linalg.eigh(H)
    V[:, low:high] = (widen(V[:, low:high]) @ X.flip(1)).to(V)
    sigma[low:high] = values.flip(0).clamp_min(0.0).sqrt().cpu()
    return float((H - H.diag().diag()).square().mean().sqrt())


def estimate_loss(sigma: Tensor, k: int, coupling: float, settled: slice) -> float:
    """What s_1 + ... + s_k of `sigma` loses to a `coupling` of every pair (kept, dropped), but of those `settled`.

    A pair turns by coupling / (s_i^2 - s_j^2), at most by all, and a turn costs its square times s_i - s_j.
    """
    kept, dropped = sigma[:k, None], sigma[k:]
    apart = (kept - dropped).clamp_min(0.0)
    cost = (kept + dropped).square_().mul_(apart).reciprocal_().mul_(coupling**2)
    cost = torch.minimum(cost, apart).nan_to_num_(0.0)  # equal ones without a coupling: 0 times infinity
    cost[settled.start :, : max(settled.stop - k, 0)] = 0.0
    return float(cost.sum())


def estimate_angle(
    D: Tensor, V: Tensor, sigma: Tensor, k: int, basis: Decomposition, coupling: float, settled: slice
) -> float:
    """By how much the kept subspace is turned, relative in the Frobenius norm, by a `coupling` of every pair (kept,
    dropped) but of those `settled` among the directions that are not strong; by what is left of the coupling of the
    strong ones; and by the rounding of D V_k in which they cancel."""
    p, left_over, square = basis.strong, basis.residual, sigma.square()
    assert left_over is not None
    turns = (square[p:k, None] - square[k:]).reciprocal().square()
    turns[settled.start :, : max(settled.stop + p - k, 0)] = 0.0
    dropped = max(p, k)
    residual = (V[:, dropped:].mT @ left_over[:, : min(p, k)]).cpu().double()
    strong = residual / (square[: min(p, k)] - square[dropped:, None])
    cancelled = 0.1 * EPS**2 * squared_norm(D) * float(square[:k].reciprocal().sum())
    return math.sqrt((2.0 * coupling**2 * float(turns.sum()) + 2.0 * float(strong.square().sum()) + cancelled) / k)
