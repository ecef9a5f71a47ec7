"""Input and output of every solver: a delta and a rank rule in, the truncated decomposition and its spectrum out.

The solvers are the rungs of one ladder, which `pome.kernel.ladder` climbs: deflated, gram and svd for a matrix, thin
before them where few directions are asked for, and factors for a product of two thin matrices.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pome.kernel.rank import RankRule

# Where the relative gap (s_k - s_{k+1}) / s_k is above GAP, the data determine P itself and not only its objective: the
# kept subspace must then be known to SUBSPACE, relative in the Frobenius norm. A solver takes a gap for larger than GAP
# from GAP - RESERVE on, or from as far below GAP as its own doubt about the gap.
GAP, RESERVE, SUBSPACE = 1e-3, 1e-5, 1e-4


class ZeroDelta(ValueError):
    """Nothing to equalize: every entry of the delta is zero."""


class Undecided(ArithmeticError):
    """A solver's precision cannot decide what was asked (rank, k, or the cut): the next rung must."""


@dataclass(frozen=True)
class Decomposition:
    """What a solver finds of a delta D (m x n) before k is chosen: the costly part, good for every k, and read only.

    sigma: all min(m, n) singular values, descending, float64, CPU. V: right singular vectors, of D^T where that is the
    tall one. U: left ones, where the solver has them. strong: how many of the leading directions were deflated,
    residual (n x strong) what they leave in D^T D. noise: absolute error bound of sigma^2. tail: from which index on
    sigma was found without squaring.

    The thin solver knows the leading k + 1 values and k vectors only, counts those as the rank, and bounds what they
    may have `missed`.
    """

    sigma: Tensor
    rank: int
    V: Tensor
    U: Tensor | None = None
    residual: Tensor | None = None
    strong: int = 0
    noise: float = 0.0
    tail: int = 0
    missed: float = 0.0


# What is known of one delta, by solver and device: a Decomposition, or why that solver has none.
DecompositionCache = MutableMapping[str, Decomposition | Undecided]


def find_decomposition(
    cache: DecompositionCache | None, solver: str, D: Tensor, decompose: Callable[[], Decomposition]
) -> Decomposition:
    """Decomposition from `cache`, or by `decompose` where the cache has none yet.

    Raises Undecided as `decompose` does; the cache remembers that as well.
    """
    if cache is None:
        return decompose()
    key = f"{solver}@{D.device}"
    found: Decomposition | Undecided
    try:
        found = cache[key]
    except KeyError:
        try:
            found = decompose()
        except Undecided as reason:
            found = reason
        cache[key] = found
    if isinstance(found, Undecided):
        raise found
    return found


Factors = tuple[Tensor, Tensor]  # m x k and k x n


@dataclass(frozen=True)
class Truncation:
    """M = U_k (S_k / s_1)^P V_k^T of a delta, with the spectrum that it was cut from.

    M: m x n, in the delta's dtype and on its device. sigma: all min(m, n) singular values, descending, float64, CPU,
    zero from `rank` on; only the k + 1 largest where the rank is not known (None). resolution: the least gap (s_k -
    s_{k+1}) / s_k at which the solver can tell the two directions apart. power: P. isometry: factors of U_k V_k^T in
    M's dtype; None where P = 0 and M is that product. is_product: whether M was multiplied from those factors, with
    their weights in between, and from nothing else. factors: L and R with M = L R, where M was multiplied from such.
    missed: bound on the share by which the true s_1^(1+P) + ... + s_k^(1+P) exceeds that of sigma.
    """

    M: Tensor
    sigma: Tensor
    rank: int | None
    k: int
    resolution: float
    power: float = 0.0
    isometry: Factors | None = None
    is_product: bool = False
    missed: float = 0.0
    factors: Factors | None = None

    @property
    def sigma_next(self) -> float:
        """s_{k+1}, and 0 where there is none."""
        return float(self.sigma[self.k]) if self.k < self.sigma.numel() else 0.0

    @property
    def weights(self) -> Tensor:
        """(s_i / s_1)^P, the k singular values of M."""
        return (self.sigma[: self.k] / self.sigma[0]) ** self.power


class Solver(Protocol):
    """One rung of the ladder: the truncation of D (m x n, float32 or float64) at the k of a rule, to a power.

    Raises Undecided where its precision does not suffice, and what its driver raises.
    """

    def __call__(
        self, D: Tensor, rule: RankRule, cache: DecompositionCache | None = None, power: float = 0.0
    ) -> Truncation: ...
