"""What every solver takes and gives: a delta and a rule in, the kept directions and the spectrum out.

The solvers are rungs of one ladder (equalize.py climbs it): deflate.py, gram.py, svd.py, and lowrank.py for factors.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

from torch import Tensor

# P itself, and not only its objective, is determined by the data where the relative gap at the cut is above GAP: there
# the kept subspace must be known to SUBSPACE, relative in the Frobenius norm. A gap counts as such from RESERVE below
# that on, or from as far below as the solver is in doubt about it.
GAP, RESERVE, SUBSPACE = 1e-3, 1e-5, 1e-4


class ZeroDelta(ValueError):
    """Nothing to equalize: every entry of the delta is zero."""


class Undecided(ArithmeticError):
    """The solver's precision cannot settle what was asked (rank, k, or the cut): the next rung must."""


@dataclass(frozen=True)
class Decomposition:
    """What a solver finds of a delta D (m x n) before k is chosen: the costly part, good for every k, and read only.

    sigma: as in Kept. V: right singular vectors, of D^T where that is the tall one. U: left ones, where the solver has
    them. strong: how many of the leading directions were found apart from the others, residual (n x strong) what they
    leave in D^T D. noise: absolute doubt about sigma^2. tail: from where on sigma was found without squaring.
    """

    sigma: Tensor
    rank: int
    V: Tensor
    U: Tensor | None = None
    residual: Tensor | None = None
    strong: int = 0
    noise: float = 0.0
    tail: int = 0


# What is known of one delta, by solver and device: a Decomposition, or why that solver has none.
DecompositionCache = MutableMapping[str, Decomposition | Undecided]


def find_decomposition(
    cache: DecompositionCache | None, solver: str, D: Tensor, find: Callable[[], Decomposition]
) -> Decomposition:
    """What `find` finds, from `cache` where it was found before. Raises Undecided, as `find` does, again too."""
    if cache is None:
        return find()
    key = f"{solver}@{D.device}"
    basis: Decomposition | Undecided
    try:
        basis = cache[key]
    except KeyError:
        try:
            basis = find()
        except Undecided as reason:
            basis = reason
        cache[key] = basis
    if isinstance(basis, Undecided):
        raise basis
    return basis


@dataclass(frozen=True)
class Kept:
    """P = U_k V_k^T of a delta, and what was learned on the way.

    P: m x n, in the delta's dtype and on its device. sigma: all min(m, n) singular values, descending, float64, CPU.
    resolution: the least gap (s_k - s_{k+1}) / s_k at which the solver can tell the two directions apart.
    factors: m x k and k x n, in P's dtype, where P is nothing but their product.
    """

    P: Tensor
    sigma: Tensor
    rank: int
    k: int
    resolution: float
    factors: tuple[Tensor, Tensor] | None = None

    @property
    def sigma_next(self) -> float:
        """s_{k+1}, and 0 where there is none."""
        return float(self.sigma[self.k]) if self.k < self.sigma.numel() else 0.0


Solver = Callable[..., Kept]  # (D, rule, cache=None)
