"""First rung: float32 throughout, with the strong directions deflated before squaring.

A Gram matrix squares the singular values, so in float32 everything below s_1 / 3000 drowns in the rounding of s_1^2.
Fine-tuning deltas are a few strong directions over a dense bulk; without those the bulk spans a factor of ten or so,
and squares without harm. With U (m x b) any orthonormal basis near the strong left directions and F = U^T D,

    D^T D = F^T F + R^T R,     R = D - U F

holds whatever U is: F^T F is large and known through its thin factor, R^T R is what gets squared. A short subspace
iteration on the sum, in n x n, yields the strong right directions Q; what is left beside Q goes to one float32 `eigh`.

How many directions are strong is found by sketches of growing size b. With r the root mean square of the singular
values that a sketch has not caught, a direction above STRONG r has to be deflated, and then all those above DEFLATED r
are, so that less is left for rounding to be relative to. A sketch of b columns catches what stands some sqrt(n / b)
above r. Where even the least value that it caught is above CAUGHT_ALL r there are more than b strong directions, and
the next larger sketch is drawn.

Only the leading k-dimensional subspace matters, not single singular vectors: polar(D V_k) V_k^T is the same for every
orthonormal basis V_k of it. The cut itself is refined by a float64 Rayleigh-Ritz step on the few directions around it.
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
from pome.kernel.gram_products import (
    add_upper,
    find_eigenvectors,
    find_image,
    multiply_deflated_gram,
    multiply_gram,
)
from pome.kernel.householder import BlockReflector, find_reflector, orthonormalise
from pome.kernel.norms import draw_gaussian, estimate_spectral_norm, squared_norm
from pome.kernel.polar import scaled_image
from pome.kernel.power import multiply_power
from pome.kernel.precision import to_float64
from pome.kernel.rank import RankRule, rank_tolerance

EPS = 2.0**-24  # rounding of float32
SKETCHES = (32, 96, 256)  # sizes of the sketch U
STRONG, DEFLATED, CAUGHT_ALL = 6.0, 3.0, 3.0  # multiples of the rms of the rest, as above
ITERATIONS = 5  # steps of subspace iteration, each on the n x n sum
ESCAPED = 1.24  # largest eigenvalue of the bulk, over the largest Ritz value that the sketch saw of it
# Least eigenvalue of R^T R, relative to the largest, that float32 can tell from zero. Its rounding was seen to move
# eigenvalues by 0.1 to 2 EPS; 32 is the margin that lets the rank be called proved.
FLOOR = 32.0 * EPS
DEFLATION = 32.0 * EPS  # singular value that rounding leaves, relative to s_1, where a strong direction was deflated
SURE = 1.5  # a norm estimated from below, times this, is taken for a bound
# A singular value that float64 has refined is off by what rounding mixes in of n larger directions, each up to the
# resolution, squared. Of that bound 6 % were seen.
MIXED_IN = 0.1
WINDOW = 32  # directions on either side of the cut that float64 refines
# Share of the objective that may be lost where the data leave the cut open: half of what the certificate allows. Below
# NEGLIGIBLE a wider window is not worth its time.
LOST, NEGLIGIBLE = 5e-6, 1e-8


@dataclass(frozen=True)
class DeflatedGram:
    """D^T D (n x n) split into its strong directions and the Gram matrix of the rest.

    Q: strong right directions (n x p), with singular values theta (p, float64, descending). residual: D^T D Q -
    Q theta^2 (n x p). G: Gram matrix of the rest, n - p square, in the basis of the complement of Q that `reflector`
    gives. largest: about what the largest eigenvalue of G should be.
    """

    Q: Tensor
    theta: Tensor
    residual: Tensor
    G: Tensor
    reflector: BlockReflector
    largest: float

    def join_spectrum(self, lam: Tensor) -> Tensor:
        """All singular values of D (n, float64, CPU), from the eigenvalues `lam` of G (ascending).

        Raises Undecided when one of them is too large for what the sketch left.
        """
        lam = lam.cpu().double().flip(0)
        if self.theta.numel() and not float(lam[0]) < ESCAPED * self.largest:
            raise Undecided("a strong direction escaped the sketch")
        return torch.cat((self.theta, lam.clamp_min(0.0).sqrt()))


def solve_deflated(
    D: Tensor,
    rule: RankRule,
    cache: DecompositionCache | None = None,
    power: float = 0.0,
    helper: torch.device | None = None,
) -> Truncation:
    """Truncation of D (m x n, float32). Raises Undecided when float32 cannot settle the rank, k or the subspace.

    With a `helper`, only the `eigh` of the short side goes there: for a device that cannot hold D and its products.
    """
    shape = (D.shape[0], D.shape[1])
    tall = D if shape[0] >= shape[1] else D.mT
    name = "deflated-float32" if helper is None else f"deflated-float32+{helper}"
    found = find_decomposition(cache, name, D, lambda: decompose_deflated(tall, shape, helper or D.device))
    sigma, V, rank = found.sigma.clone(), found.V if cache is None else found.V.clone(), found.rank
    k = rule.choose(sigma, rank, shape)
    slack = found.noise / float(sigma[k - 1]) ** 2
    if rule.choose(sigma, rank, shape, slack) != rule.choose(sigma, rank, shape, -slack):
        raise Undecided("the singular values leave k open")
    refine_cut(tall, V, sigma, k, found)
    B = scaled_image(tall, V[:, :k], sigma[:k])
    sigma[rank:] = 0.0
    M, isometry, _ = multiply_power(B, V[:, :k], sigma[:k], tall is not D, found.strong, power)
    return Truncation(M, sigma, rank, k, find_resolution(sigma, k, found.strong), power, isometry)


def decompose_deflated(tall: Tensor, shape: tuple[int, int], helper: torch.device) -> Decomposition:
    """Right singular vectors and the rank of `tall`, which is D (of that shape) or D^T. Raises Undecided."""
    split = deflate(tall)
    lam, W = find_eigenvectors(split.G.to(helper))
    sigma, p = split.join_spectrum(lam), split.theta.numel()
    V = split.reflector.complete_basis(split.Q, W.to(tall.device).flip(1))
    noise = find_noise(sigma, p)
    rank = prove_rank(tall, V, sigma, noise, rank_tolerance(shape))
    return Decomposition(sigma, rank, V, residual=split.residual, strong=p, noise=noise)


def find_noise(sigma: Tensor, p: int) -> float:
    """Absolute error bound of the squares of `sigma`, of which p strong ones were deflated."""
    return FLOOR * float(sigma[p]) ** 2 + (DEFLATION * float(sigma[0])) ** 2


def deflate(D: Tensor, strong: float = STRONG) -> DeflatedGram:
    """Strong directions of D (m x n, m >= n) and the Gram matrix of the rest; a flat spectrum has none. `strong` is the
    multiple of the rms of the rest from which on one is deflated."""
    n = D.shape[1]
    total = squared_norm(D)
    sketches = [b for b in SKETCHES if b <= n // 4]
    U, F = D.new_empty(D.shape[0], 0), D.new_empty(0, n)
    for b in sketches:
        U, F = extend_sketch(D, U, F, draw_gaussian(n, b, D)[:, U.shape[1] :])
        values = torch.linalg.eigvalsh(to_float64(F) @ to_float64(F).mT).cpu()
        rest = max(total - float(values.sum()), EPS * total) / (n - b)
        if not bool((values > strong**2 * rest).any()):
            break
        if float(values[0]) <= CAUGHT_ALL**2 * rest or b == sketches[-1]:
            return split_strong(D, U, F, DEFLATED**2 * rest)
    return keep_whole(D)


def keep_whole(D: Tensor) -> DeflatedGram:
    """D^T D (n x n) with no direction deflated."""
    none = D.new_zeros(D.shape[1], 0)
    nothing = torch.zeros(0, dtype=torch.float64)
    return DeflatedGram(none, nothing, none, multiply_gram(D), find_reflector(none), 0.0)


def extend_sketch(D: Tensor, U: Tensor, F: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Sketch U (m x b), extended by the directions of D probes (m x c) and orthonormal, and F = U^T D (b x n) of all.

    The new directions are projected twice: after one projection float32 cancellation leaves more of the old ones.
    """
    Y = D @ probes
    for _ in range(2 if U.shape[1] else 0):
        Y = orthonormalise(Y - U @ (U.mT @ Y))
    new = Y if U.shape[1] else orthonormalise(Y)
    return torch.cat((U, new), 1), torch.cat((F, new.mT @ D))


def split_strong(D: Tensor, U: Tensor, F: Tensor, threshold: float) -> DeflatedGram:
    """D^T D = F^T F + G with G = R^T R, split at the squared singular value `threshold`.

    All but the first line is n x n or thinner. Q spans an invariant subspace to a high power of bulk over strong
    singular value, so what couples it to the bulk is dropped: V = [Q, W] makes V^T (D^T D) V block diagonal.
    """
    G = multiply_deflated_gram(D, U, F)
    Q = orthonormalise(F.mT)
    for _ in range(ITERATIONS):
        Q = orthonormalise(F.mT @ (F @ Q) + G @ Q)
    FQ, GQ = F @ Q, G @ Q
    exact = to_float64(FQ).mT @ to_float64(FQ) + to_float64(Q).mT @ to_float64(GQ)
    values, X = torch.linalg.eigh(exact.cpu())
    values = values.flip(0)
    # The iteration damps what lies outside the sketch by the ratio to the power 2 ITERATIONS: 1e-3 at a ratio of 1/2.
    p = int((values > max(threshold, 4.0 * float(values[-1]))).sum())
    X = X.flip(1)[:, :p].to(Q)
    Q, FQ, GQ = Q @ X, FQ @ X, GQ @ X
    residual = F.mT @ FQ + GQ - Q * values[:p].to(Q)
    reflector = find_reflector(Q)
    left, right = reflector.conjugate(G)
    F = reflector.apply_transposed(F.mT)[p:]
    rest = G[p:, p:]  # H^T G H + H^T F^T F H without the rows and columns of Q
    add_upper(rest, torch.cat((-left[p:], -right[p:], F), 1), torch.cat((right[p:], left[p:], F), 1))
    return DeflatedGram(Q, values[:p].sqrt(), residual, rest, reflector, float(values[min(p, values.numel() - 1)]))


def prove_rank(D: Tensor, V: Tensor, sigma: Tensor, noise: float, tolerance: float) -> int:
    """Numerical rank of D (m x n), from its right singular vectors V (n x n) and values, squares good to `noise`.

    Values above the noise count. Orthonormal directions T with norm(D T) below the threshold do not count: by Courant
    and Fischer that holds however inexact they are. V and sigma change in place below the rank. Raises Undecided where
    some directions are neither.
    """
    threshold = float(sigma[0]) * tolerance
    rank = int((sigma > math.sqrt(noise + threshold**2)).sum())
    if rank == sigma.numel():
        return rank
    tail, head = V[:, rank:], V[:, :rank]
    image = D @ tail
    if estimate_spectral_norm(image) > threshold / SURE:
        # One Newton step removes from the tail what rounding mixed in of the directions that count.
        weights = sigma[:rank].to(D).square().reciprocal()[:, None]
        tail -= head @ (weights * (head.mT @ (D.mT @ image)))
        image = D @ tail
        if estimate_spectral_norm(image) > threshold / SURE:
            raise Undecided("singular values below the float32 floor and above the threshold of the rank")
    sigma[rank:] = 0.0
    return rank


def refine_cut(D: Tensor, V: Tensor, sigma: Tensor, k: int, found: Decomposition) -> None:
    """Order of the directions around the cut, decided in float64, and a check that all others may stay.

    V and sigma change in place, within a window of directions around the cut. Their float64 Gram matrix shows how far
    float32 left them from diagonal; a rounding of that size in every other pair (kept, dropped) turns the kept
    subspace by a known angle, and takes a known share of the objective. Raises Undecided when that is too much.
    """
    n, p = V.shape[1], found.strong
    doubt = MIXED_IN * n * find_resolution(sigma, k, p) ** 2
    # Where the data leave the cut open there is mostly nothing to gain but the digits of s_k: a small window will do.
    for half in (WINDOW // 4, WINDOW):
        if half < WINDOW and (k <= p or not is_open(sigma, k, doubt)):
            continue
        low, high = (max(p, k - half), min(n, k + half)) if k > p else (0, p)
        refined = slice(max(low - p, 0), high - p)
        coupling = refine_directions(D, V, sigma, low, high)
        if k == p < n:  # the first of the others comes next after the strong ones
            refine_directions(D, V, sigma, p, min(n, p + WINDOW))
        lost = estimate_loss(sigma[p:], k - p, coupling, refined) / float(sigma[:k].sum()) if k > p else 0.0
        if lost <= NEGLIGIBLE and is_open(sigma, k, doubt):
            return
    if is_open(sigma, k, doubt):
        if not lost <= LOST:
            raise Undecided(f"the cut is known to {lost:.0e} of the objective only")
        return
    angle = estimate_angle(D, V, sigma, k, found, coupling, refined)
    if not angle <= SUBSPACE:
        raise Undecided(f"the kept subspace is known to {angle:.0e} only")


def is_open(sigma: Tensor, k: int, doubt: float) -> bool:
    """Whether the singular values leave open which directions come before the cut, beyond `doubt` about their gap."""
    return k < sigma.numel() and float(sigma[k - 1] - sigma[k]) <= (GAP - max(doubt, RESERVE)) * float(sigma[k - 1])


def find_resolution(sigma: Tensor, k: int, p: int) -> float:
    """Relative gap at the cut that rounding of the float32 squares leaves in doubt, `p` strong directions deflated."""
    return EPS * float(sigma[min(p, k - 1)] / sigma[k - 1]) ** 2


def refine_directions(D: Tensor, V: Tensor, sigma: Tensor, low: int, high: int) -> float:
    """A float64 Rayleigh-Ritz step on the directions from `low` to `high`, in place.

    Returns the coupling that they had before: the root mean square of D^T D between two of them.
    """
    image = find_image(D, V[:, low:high])
    H = image.mT @ image
    values, X = torch.linalg.eigh(H)
    V[:, low:high] = (to_float64(V[:, low:high]) @ X.flip(1)).to(V)
    sigma[low:high] = values.flip(0).clamp_min(0.0).sqrt().cpu()
    return float((H - H.diag().diag()).square().mean().sqrt())


def estimate_loss(sigma: Tensor, k: int, coupling: float, refined: slice) -> float:
    """Loss of s_1 + ... + s_k of `sigma` by a `coupling` of every pair (kept, dropped) but of those `refined`.

    A pair turns by coupling / (s_i^2 - s_j^2), at most by all, and a turn costs its square times s_i - s_j.
    """
    kept, dropped = sigma[:k, None], sigma[k:]
    gaps = (kept - dropped).clamp_min(0.0)
    cost = (kept + dropped).square_().mul_(gaps).reciprocal_().mul_(coupling**2)
    cost = torch.minimum(cost, gaps).nan_to_num_(0.0)  # equal ones without a coupling: 0 times infinity
    cost[refined.start :, : max(refined.stop - k, 0)] = 0.0
    return float(cost.sum())


def estimate_angle(
    D: Tensor, V: Tensor, sigma: Tensor, k: int, found: Decomposition, coupling: float, refined: slice
) -> float:
    """Angle by which the kept subspace is turned, relative in the Frobenius norm.

    Three things turn it: a `coupling` of every pair (kept, dropped) but of those `refined` among the directions that
    are not strong; what is left of the coupling of the strong ones; and the rounding of D V_k in which they cancel.
    """
    p, residual, square = found.strong, found.residual, sigma.square()
    assert residual is not None
    turns = (square[p:k, None] - square[k:]).reciprocal().square()
    turns[refined.start :, : max(refined.stop + p - k, 0)] = 0.0
    dropped = max(p, k)
    coupled = (V[:, dropped:].mT @ residual[:, : min(p, k)]).cpu().double()
    strong = coupled / (square[: min(p, k)] - square[dropped:, None])
    cancelled = 0.1 * EPS**2 * squared_norm(D) * float(square[:k].reciprocal().sum())
    return math.sqrt((2.0 * coupling**2 * float(turns.sum()) + 2.0 * float(strong.square().sum()) + cancelled) / k)
