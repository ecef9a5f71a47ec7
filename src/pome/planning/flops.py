"""Floating-point operations of a matrix by the route that solves it first. No torch.

A route is one row of ROUTES: the rung of the kernel's ladder on which a matrix begins. Products are counted as 2 a
multiply-add, decompositions by the usual formulas (LAPACK's for `eigh`, Golub and Van Loan's for the SVD). What depends
on the data (strong directions, a rung that hands over) is not counted: it is in the measured rates.
"""

from __future__ import annotations

from collections.abc import Callable

from pome.config.spec import EditSpec
from pome.planning.units import FLOAT64_ENTRIES, Unit

EIGH = 6.0  # times n^3: reduction to tridiagonal form 4/3, divide and conquer 8/3, back-transformation 2
PROBES = 48.0  # times m n: the certificate, by 8 probes
# The kernel's: the short side below which the ladder begins with the SVD, and from which a few directions, up to a
# share of it, are found by the thin route.
SMALL, THIN, SHARE = 96, 512, 1 / 32


def count_deflated(m: int, n: int, k: int) -> float:
    """A sketch of 32 columns, 5/8 of a Gram product, `eigh`, two products with k columns, a refined cut of 2 x 32."""
    return (1.25 * n + 4.0 * k + 2 * 3 * 32 + PROBES) * m * n + EIGH * n**3


def count_gram(m: int, n: int, k: int) -> float:
    """5/8 of a Gram product, `eigh`, two products with k columns."""
    return (1.25 * n + 4.0 * k + 64 + PROBES) * m * n + EIGH * n**3


def count_svd(m: int, n: int, k: int) -> float:
    """R-SVD, and a product with k columns."""
    return (6.0 * n + 2.0 * k + PROBES) * m * n + 20.0 * n**3


def count_thin(m: int, n: int, k: int) -> float:
    """Four blocks of k + 16 columns, each twice through D and back, and the product of what is kept."""
    return (16.0 * (k + 16) + 2.0 * k + PROBES) * m * n


def count_equivalence(m: int, n: int, k: int) -> float:
    """In float64 a Gram product and `eigh` of both sides, and two products with all n columns."""
    return (2 * 1.25 * n + 4.0 * n + PROBES) * m * n + 2 * EIGH * n**3


def count_factors(m: int, n: int, k: int) -> float:
    """Thin QR of both factors of rank 2 k, and the product of what is kept. The core costs next to nothing."""
    r = 2 * k
    return 8.0 * (m + n) * r**2 + (2.0 * k + 16) * m * n


def count_merge(m: int, n: int, k: int) -> float:
    """An adapter's product, added: 2 k is its rank."""
    return (4.0 * k + 2) * m * n


# Of a matrix of long side m and short side n, of which k directions are kept.
ROUTES: dict[str, Callable[[int, int, int], float]] = {
    "deflated-float32": count_deflated,
    "gram-float64": count_gram,
    "svd-float64": count_svd,
    "thin": count_thin,
    "equivalence": count_equivalence,
    "factors": count_factors,
    "merge": count_merge,
}


def find_route(unit: Unit, m: int, n: int, spec: EditSpec) -> str:
    """The route on which a matrix of a unit begins, by the options for its tensor."""
    if spec.method == "equivalence":
        return "equivalence"
    if unit.change is not None and unit.change.is_plain:
        return "factors"
    if min(m, n) < SMALL:
        return "svd-float64"
    if spec.rank_rule == "fixed" and min(m, n) >= THIN and (spec.rank or 0) <= SHARE * min(m, n):
        return "thin"
    exact = "F64" in (unit.dtype, unit.base_dtype) or (unit.change is None and m * n <= FLOAT64_ENTRIES)
    return "gram-float64" if exact else "deflated-float32"
