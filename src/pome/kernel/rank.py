"""How many directions to keep: rules that read the singular values of one matrix and answer k.

Every rule takes `sigma`, all min(m, n) singular values, descending, float64 on the CPU. `slack` is the relative doubt
about them: a rule moves its threshold by that much, so a caller whose singular values are approximate asks twice,
with +slack and -slack, and knows that k is exact when both answers agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

TRACY_WIDOM = 3.27  # 99.9 % quantile of the law of order 1
RANK_RULES = ("ratio", "fixed", "energy", "noise-floor", "gavish-donoho", "effective")


@dataclass(frozen=True)
class RankRule:
    """Which rule decides k, with its parameter. Raises ValueError for one that makes no sense."""

    name: str = "ratio"
    ratio: float = 0.5
    count: int | None = None
    energy: float = 0.9
    noise_floor: float | None = None

    def __post_init__(self) -> None:
        if self.name not in RANK_RULES:
            raise ValueError(f"rank_rule {self.name!r} is none of {', '.join(RANK_RULES)}")
        for name, share in (("rank_ratio", self.ratio), ("energy", self.energy)):
            if not (is_number(share) and 0.0 < share <= 1.0):
                raise ValueError(f"{name} must lie in (0, 1], not {share!r}")
        if self.count is not None and not (type(self.count) is int and self.count >= 1):
            raise ValueError(f"rank must be a whole number of at least 1, not {self.count!r}")
        if (self.name == "fixed") != (self.count is not None):
            raise ValueError(f"rank_rule {self.name!r} and rank {self.count} exclude each other: only 'fixed' takes it")
        floor = self.noise_floor
        if floor is not None and not (is_number(floor) and floor >= 0.0):
            raise ValueError(f"noise_floor must be a number of at least 0, not {floor!r}")
        if self.name == "noise-floor" and floor is None:
            raise ValueError("rank_rule 'noise-floor' needs a noise_floor")

    def choose(self, sigma: Tensor, rank: int, shape: tuple[int, int], slack: float = 0.0) -> int:
        """k in 1..rank for the spectrum of an m x n matrix of that rank."""
        if self.name == "ratio":
            k = round(self.ratio * rank)
        elif self.name == "fixed":
            k = self.count or 1
        elif self.name == "energy":
            k = count_energy(sigma, self.energy, slack)
        elif self.name == "noise-floor":
            k = count_signal(sigma, self.noise_floor or 0.0, shape, slack)
        elif self.name == "gavish-donoho":
            k = count_gavish_donoho(sigma, shape, slack)
        else:
            k = count_effective(sigma, slack)
        return max(1, min(k, rank))

    def shift(self, exponent: int) -> RankRule:
        """The same rule for a matrix multiplied by 2^exponent: a noise floor is a length and scales along."""
        if self.noise_floor is None:
            return self
        return replace(self, noise_floor=math.ldexp(self.noise_floor, exponent))


def is_number(value: object) -> bool:
    """A real number that is finite; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def count_rank(sigma: Tensor, shape: tuple[int, int]) -> int:
    """Numerical rank: the number of s_i > s_1 * sqrt(max(m, n) * 2^-52), what a float64 Gram matrix resolves.

    What lies below is zeroed in place: each solver leaves another residue there.
    """
    rank = int((sigma > float(sigma[0]) * rank_tolerance(shape)).sum())
    sigma[rank:] = 0.0
    return rank


def rank_tolerance(shape: tuple[int, int]) -> float:
    """The least s_i / s_1 that counts as non-zero in an m x n matrix."""
    return math.sqrt(max(shape) * 2.0**-52)


def count_energy(sigma: Tensor, energy: float, slack: float = 0.0) -> int:
    """Least k that holds `energy` of the squared Frobenius norm: the usual choice of principal components by the
    share of variance explained (Jolliffe, Principal Component Analysis, 2002, section 6.1.1)."""
    squares = sigma.square().cumsum(0)
    # The share that k directions hold is itself a rounded sum: 7 of 100 equal ones hold 0.07.
    least = energy * (1.0 - sigma.numel() * 2.0**-52)
    return int((squares < least * (1.0 + 2.0 * slack) * squares[-1]).sum()) + 1


def count_above(sigma: Tensor, floor: float, slack: float = 0.0) -> int:
    """Singular values above a floor."""
    return int((sigma > floor * (1.0 + slack)).sum())


def count_signal(sigma: Tensor, floor: float, shape: tuple[float, float], slack: float = 0.0) -> int:
    """Singular values that noise whose spectrum ends at `floor`, such as that of storage rounding, does not explain."""
    return count_above(sigma, floor * noise_margin(shape), slack)


def noise_margin(shape: tuple[float, float]) -> float:
    """How far above the edge of its spectrum the largest singular value of m x n noise may lie, as a factor.

    Its square fluctuates around the Marchenko-Pastur edge (sqrt(m) + sqrt(n))^2 by (sqrt(m) + sqrt(n))
    (1 / sqrt(m) + 1 / sqrt(n))^(1/3) times a Tracy-Widom variable of order 1: Johnstone, "On the distribution of the
    largest eigenvalue in principal components analysis", Ann. Statist. 29(2), 2001. The factor is that of the 99.9 %
    quantile, 1 % for a 1000 x 1000 matrix.
    """
    m, n = (math.sqrt(side) for side in shape)
    width = (1.0 / m + 1.0 / n) ** (1.0 / 3.0) / (m + n)
    return math.sqrt(1.0 + TRACY_WIDOM * width)


def count_gavish_donoho(sigma: Tensor, shape: tuple[int, int], slack: float = 0.0) -> int:
    """Optimal hard threshold for unknown noise: s_i > lambda(b) / sqrt(mu_b) * median(s), b = short / long side.

    Gavish and Donoho, "The optimal hard threshold for singular values is 4/sqrt(3)", IEEE Trans. Inf. Theory 60(8),
    2014: lambda(b) is the optimal threshold for known noise, mu_b the median of the Marchenko-Pastur law. The paper's
    median is that of all singular values, which overstates the noise where a good part of them is signal (with 200
    directions of 1024 by an eighth). So what was found is taken out and the median of the rest taken again, until
    nothing more is found.
    """
    aspect = min(shape) / max(shape)
    root = math.sqrt(aspect * aspect + 14.0 * aspect + 1.0)
    known = math.sqrt(2.0 * (aspect + 1.0) + 8.0 * aspect / (aspect + 1.0 + root))
    factor = known / math.sqrt(marchenko_pastur_median(aspect))
    n = sigma.numel()
    found = 0
    while found < n:
        median = 0.5 * (float(sigma[(n - 1 + found) // 2]) + float(sigma[(n + found) // 2]))
        k = count_above(sigma, factor * median, 2.0 * slack)
        if k <= found:
            break
        found = k
    return found


@lru_cache(maxsize=256)
def marchenko_pastur_median(aspect: float) -> float:
    """Median of the Marchenko-Pastur law of ratio `aspect` in (0, 1], unit variance.

    x = low + (high - low) sin^2(t) takes the square-root ends out of the density, so that a plain trapezoid sum
    over t converges fast (at aspect 1, where the density itself is unbounded, too).
    """
    low, high = (1.0 - math.sqrt(aspect)) ** 2, (1.0 + math.sqrt(aspect)) ** 2
    t = torch.linspace(0.0, math.pi / 2.0, 20001, dtype=torch.float64, device="cpu")
    sin2 = t.sin().square()
    x = low + (high - low) * sin2
    density = sin2 * (1.0 - sin2) * (high - low) ** 2 / (math.pi * aspect * x.clamp_min(1e-300))
    if low == 0.0:
        density[0] = high / (math.pi * aspect)  # the limit of sin^2(t) / x at t = 0
    mass = torch.cumulative_trapezoid(density, t)
    half = float(mass[-1]) / 2.0
    i = int((mass < half).sum())
    before = float(mass[i - 1])
    part = (half - before) / (float(mass[i]) - before)
    angle = float(t[i]) + part * float(t[1] - t[0])
    return low + (high - low) * math.sin(angle) ** 2


def measure_effective(sigma: Tensor) -> float:
    """Effective rank: exp of the entropy of s_i / sum(s).

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    share = sigma / sigma.sum()
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def count_effective(sigma: Tensor, slack: float = 0.0) -> int:
    """The effective rank, rounded."""
    # d(entropy) <= slack * (log n + 1) for a relative change of every s_i by slack.
    return round(measure_effective(sigma) * math.exp(slack * (math.log(sigma.numel()) + 1.0)))
