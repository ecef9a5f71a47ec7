"""Rank rules: how many directions to keep, from the singular values of one matrix.

A rule is one function here and one row in `pome.choices.RANK_RULES`. It takes the spectrum and its own number, if its
row names an option that gives one, and returns k; what lies outside 1..rank is clipped.

A caller whose singular values are approximate gives their relative error bound as `slack`. A rule moves its threshold
by that much: where the answers for +slack and -slack agree, k is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from pome.choices import RANK_RULES

TRACY_WIDOM = 3.27  # 99.9 % quantile of the law of order 1


@dataclass(frozen=True)
class Spectrum:
    """Singular values of an m x n matrix, as a rank rule takes them.

    sigma: all min(m, n) singular values, descending, float64, CPU. slack: relative error bound of sigma.
    """

    sigma: Tensor
    rank: int
    shape: tuple[int, int]
    noise_floor: float = 0.0
    slack: float = 0.0


@dataclass(frozen=True)
class Number:
    """Range of a rank rule's number, as a test and in words."""

    contains: Callable[[object], bool]
    words: str


def is_number(value: object) -> bool:
    """Whether a value is a real number and finite; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_share(value: object) -> bool:
    """Whether a value lies in (0, 1]."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value <= 1.0


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 1."""
    return type(value) is int and value >= 1


SHARE = Number(is_share, "lie in (0, 1]")
COUNT = Number(is_count, "be a whole number of at least 1")

CountDirections = Callable[[Spectrum, float], int]
RULES: dict[str, tuple[CountDirections, Number | None]] = {}  # by name: the function, and the range of its number
OPTIONS = {name: choice.number for name, choice in RANK_RULES.items()}  # which option gives a rule its number


def rank_rule(name: str, number: Number | None = None) -> Callable[[CountDirections], CountDirections]:
    """Decorator of the function that decides k for the rule `name`."""

    def register(count: CountDirections) -> CountDirections:
        RULES[name] = count, number
        return count

    return register


@dataclass(frozen=True)
class RankRule:
    """A rank rule with its number. Raises ValueError for one that makes no sense.

    number: what the option of the rule's row gives; None for rules without. noise_floor: spectral norm of the storage
    rounding of FT, in the delta's units; None where it is not known.
    """

    name: str
    number: float | None = None
    noise_floor: float | None = None

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"rank_rule {self.name!r} is none of {', '.join(RANK_RULES)}")
        check_number(self.name, self.number)
        floor = self.noise_floor
        if floor is not None and not (is_number(floor) and floor >= 0.0):
            raise ValueError(f"noise_floor must be a number of at least 0, not {floor!r}")
        if self.name == "noise-floor" and floor is None:
            raise ValueError("rank_rule 'noise-floor' needs the noise floor of a stored weight, which `edit` knows")

    @classmethod
    def from_options(cls, name: str, numbers: Mapping[str, float | None], noise_floor: float | None = None) -> RankRule:
        """The rule `name`, with its number out of those of all options by name; `rank` beside `ratio` means `fixed`.

        Raises ValueError for a number out of its range, also where the rule does not take it, and for a `rank` beside
        another rule.
        """
        for other, option in OPTIONS.items():
            if option and option in numbers and (option != "rank" or numbers[option] is not None):
                check_number(other, numbers[option])
        if numbers.get("rank") is not None:
            if name not in ("ratio", "fixed"):
                raise ValueError(f"rank_rule {name!r} and a rank exclude each other: only 'fixed' takes one")
            name = "fixed"
        option = OPTIONS.get(name)
        return cls(name, numbers.get(option) if option else None, noise_floor)

    def choose(self, sigma: Tensor, rank: int, shape: tuple[int, int], slack: float = 0.0) -> int:
        """k in 1..rank for the singular values of an m x n matrix of that rank, known up to a relative `slack`."""
        count, _ = RULES[self.name]
        k = count(Spectrum(sigma, rank, shape, self.noise_floor or 0.0, slack), self.number or 0.0)
        return max(1, min(k, rank))

    def shift(self, exponent: int) -> RankRule:
        """The same rule for a matrix multiplied by 2^exponent: a noise floor is a length and scales along."""
        if self.noise_floor is None:
            return self
        return replace(self, noise_floor=math.ldexp(self.noise_floor, exponent))


def check_number(rule: str, number: object) -> None:
    """Raise ValueError for a number that the rule does not take."""
    _, range_ = RULES[rule]
    if range_ is None:
        if number is not None:
            raise ValueError(f"rank_rule {rule!r} takes no number, and {number!r} is one")
    elif not range_.contains(number):
        raise ValueError(f"{OPTIONS[rule]} must {range_.words}, not {number!r}")


def count_rank(sigma: Tensor, shape: tuple[int, int]) -> int:
    """Numerical rank: the number of s_i > s_1 * sqrt(max(m, n) * 2^-52), what a float64 Gram matrix resolves.

    What lies below is zeroed in place: each solver leaves another residue there.
    """
    rank = int((sigma > float(sigma[0]) * rank_tolerance(shape)).sum())
    sigma[rank:] = 0.0
    return rank


def rank_tolerance(shape: tuple[int, int]) -> float:
    """Least s_i / s_1 that counts as non-zero in an m x n matrix."""
    return math.sqrt(max(shape) * 2.0**-52)


@rank_rule("ratio", SHARE)
def count_ratio(spectrum: Spectrum, ratio: float) -> int:
    """A share of the numerical rank, rounded: POME, section 3.2 and equation 9."""
    return round(ratio * spectrum.rank)


@rank_rule("fixed", COUNT)
def count_fixed(spectrum: Spectrum, count: float) -> int:
    """The number that was asked for."""
    return int(count)


@rank_rule("energy", SHARE)
def count_energy(spectrum: Spectrum, energy: float) -> int:
    """Least k that holds a share `energy` of the squared Frobenius norm: the usual choice of principal components by
    the share of variance explained (Jolliffe, Principal Component Analysis, 2002, section 6.1.1)."""
    sigma = spectrum.sigma
    squares = sigma.square().cumsum(0)
    # The share that k directions hold is itself a rounded sum: 7 of 100 equal ones hold 0.07.
    least = energy * (1.0 - sigma.numel() * 2.0**-52)
    return int((squares < least * (1.0 + 2.0 * spectrum.slack) * squares[-1]).sum()) + 1


def count_above(sigma: Tensor, floor: float, slack: float = 0.0) -> int:
    """Number of singular values above a floor."""
    return int((sigma > floor * (1.0 + slack)).sum())


@rank_rule("noise-floor")
def count_above_noise(spectrum: Spectrum, _: float = 0.0) -> int:
    """Number of singular values that storage rounding does not explain."""
    return count_signal(spectrum.sigma, spectrum.noise_floor, spectrum.shape, spectrum.slack)


def count_signal(sigma: Tensor, floor: float, shape: tuple[float, float], slack: float = 0.0) -> int:
    """Number of singular values that noise whose spectrum ends at `floor` does not explain."""
    return count_above(sigma, floor * noise_margin(shape), slack)


def noise_margin(shape: tuple[float, float]) -> float:
    """Factor by which the largest singular value of m x n noise may lie above the edge of its spectrum.

    Its square fluctuates around the Marchenko-Pastur edge (sqrt(m) + sqrt(n))^2 by (sqrt(m) + sqrt(n))
    (1 / sqrt(m) + 1 / sqrt(n))^(1/3) times a Tracy-Widom variable of order 1: Johnstone, "On the distribution of the
    largest eigenvalue in principal components analysis", Ann. Statist. 29(2), 2001. The factor is that of the 99.9 %
    quantile, 1 % for a 1000 x 1000 matrix.
    """
    m, n = (math.sqrt(side) for side in shape)
    width = (1.0 / m + 1.0 / n) ** (1.0 / 3.0) / (m + n)
    return math.sqrt(1.0 + TRACY_WIDOM * width)


@rank_rule("gavish-donoho")
def count_gavish_donoho(spectrum: Spectrum, _: float = 0.0) -> int:
    """Optimal hard threshold for unknown noise: s_i > lambda(b) / sqrt(mu_b) * median(s), b = short / long side.

    Gavish and Donoho, "The optimal hard threshold for singular values is 4/sqrt(3)", IEEE Trans. Inf. Theory 60(8),
    2014: lambda(b) is the optimal threshold for known noise, mu_b the median of the Marchenko-Pastur law. The paper's
    median is that of all singular values, which overstates the noise where a good part of them is signal (with 200
    directions of 1024 by an eighth). So what was found is taken out and the median of the rest taken again, until
    nothing more is found.
    """
    sigma, shape = spectrum.sigma, spectrum.shape
    aspect = min(shape) / max(shape)
    root = math.sqrt(aspect * aspect + 14.0 * aspect + 1.0)
    known = math.sqrt(2.0 * (aspect + 1.0) + 8.0 * aspect / (aspect + 1.0 + root))
    factor = known / math.sqrt(marchenko_pastur_median(aspect))
    n = sigma.numel()
    found = 0
    while found < n:
        median = 0.5 * (float(sigma[(n - 1 + found) // 2]) + float(sigma[(n + found) // 2]))
        k = count_above(sigma, factor * median, 2.0 * spectrum.slack)
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
    i = int((mass < half).sum())  # mass[i] is the integral up to t[i + 1]
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


@rank_rule("effective")
def count_effective(spectrum: Spectrum, _: float = 0.0) -> int:
    """The effective rank, rounded."""
    # d(entropy) <= slack * (log n + 1) for a relative change of every s_i by slack.
    width = spectrum.slack * (math.log(spectrum.sigma.numel()) + 1.0)
    return round(measure_effective(spectrum.sigma) * math.exp(width))
