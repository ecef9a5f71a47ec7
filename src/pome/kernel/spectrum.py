"""What every solver takes and gives: a delta and a rule in, the kept directions and the spectrum out.

The solvers are rungs of one ladder (equalize.py climbs it): deflate.py, gram.py, svd.py, and lowrank.py for factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pome.kernel.rank import RankRule

# P itself, and not only its objective, is determined by the data where the relative gap at the cut is above GAP: there
# the kept subspace must be known to SUBSPACE, relative in the Frobenius norm.
GAP, SUBSPACE = 0.99e-3, 1e-4


class Undecided(ArithmeticError):
    """The solver's precision cannot settle what was asked (rank, k, or the cut): the next rung must."""


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


Solver = Callable[[Tensor, RankRule], Kept]
