"""Ladder of solvers: from the fastest rung to the most careful one, until an answer is certified.

The certificate of each answer decides, not the solver: an answer that fails it, a driver that fails, and a precision
that cannot settle the rank or the cut all hand over to the next rung.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pome.kernel.certificate import Certificate
from pome.kernel.decomposition import DecompositionCache, Solver, Truncation, Undecided
from pome.kernel.rank import RankRule
from pome.kernel.solvers.deflated import solve_deflated
from pome.kernel.solvers.factors import solve_factors
from pome.kernel.solvers.gram import solve_gram
from pome.kernel.solvers.leading import solve_leading
from pome.kernel.solvers.svd import solve_svd
from pome.kernel.solvers.thin import solve_thin

RUNGS: tuple[tuple[str, Solver], ...] = (
    ("deflated-float32", solve_deflated),
    ("gram-float64", solve_gram),
    ("svd-float64", solve_svd),
)
SMALL = 96  # short side below which a float64 SVD is as fast as anything
# The thin route is tried for up to a SHARE of the short side, where that is not below THIN.
THIN, SHARE = 512, 1 / 32
LEADING = 768  # short side up to which the rung for leading directions takes less time than the thin route


class Unsolved(ArithmeticError):
    """Every rung of the ladder failed; the message says how each did."""


@dataclass(frozen=True)
class Attempt:
    """One rung with its delta, ready to be tried, and the device whose memory it needs.

    is_bet: whether it may well hand the delta over to the next rung, which is then not worth a warning.
    """

    name: str
    device: torch.device
    solve: Callable[[RankRule], Truncation]
    is_bet: bool = False


@dataclass(frozen=True)
class Certified:
    """The first certified answer of the ladder, the rung it came from, and how the rungs before it failed."""

    solver: str
    truncation: Truncation
    certificate: Certificate
    warnings: tuple[str, ...]


def climb(
    attempts: Iterable[Attempt], prove: Callable[[Truncation], Certificate], device: torch.device, rule: RankRule
) -> Certified:
    """The first answer that `prove` certifies, on `device`. Raises Unsolved where there is none.

    A rung that runs out of an accelerator's memory ends the attempts that hold the delta there: those after it need
    more. The attempts that follow hold the delta on the CPU.
    """
    notes: list[str] = []
    full = None
    for attempt in attempts:
        if attempt.device == full:
            continue
        try:
            found = attempt.solve(rule)
            found = move(found, device)
            certificate = prove(found)
            fault = certificate.find_fault()
        except (RuntimeError, Undecided) as failure:  # the drivers of every device raise RuntimeError or below it
            fault = summarise_failure(failure)
            if attempt.is_bet and isinstance(failure, Undecided):
                continue
            if isinstance(failure, torch.cuda.OutOfMemoryError):
                full = attempt.device
        if fault is None:
            return Certified(attempt.name, found, certificate, (*notes, *warn_of_cluster(found)))
        notes.append(f"{attempt.name} handed over: {fault}")
    raise Unsolved("no solver could be certified: " + "; ".join(notes))


def move(found: Truncation, device: torch.device) -> Truncation:
    """The same truncation on a device."""
    pairs = (pair and (pair[0].to(device), pair[1].to(device)) for pair in (found.isometry, found.factors))
    return replace(found, M=found.M.to(device), isometry=next(pairs), factors=next(pairs))


def find_first_rung(D: Tensor) -> int:
    """Index of the rung to begin with: the last one for a small matrix, which it solves in a millisecond, and the
    second for a float64 one."""
    return 2 if min(D.shape) < SMALL else 1 if D.dtype == torch.float64 else 0


def is_thin(D: Tensor, rule: RankRule) -> bool:
    """Whether a rule asks for so few directions of D (m x n) that the thin route is worth a try.

    Only a number of directions is known to be right without the whole spectrum.
    """
    short = min(D.shape)
    return rule.name == "fixed" and short >= THIN and (rule.number or 0.0) <= SHARE * short


def list_attempts(
    D: Tensor,
    cache: DecompositionCache | None = None,
    power: float = 0.0,
    rule: RankRule | None = None,
    leading_only: bool = False,
) -> Iterator[Attempt]:
    """The thin route where `rule` suits it, the ladder on the device of D, and after an accelerator's rungs those of
    the CPU. With `leading_only` a float32 matrix begins on the rung for its leading directions alone, which takes less
    time than the thin route where the short side is small.

    Between the two stands the smaller form: D on the CPU, and only the `eigh` of the short side on the accelerator.
    """
    first = find_first_rung(D)
    given: dict[str, Any] = {"cache": cache, "power": power}
    leading_only = leading_only and first == 0
    if rule is not None and is_thin(D, rule) and not (leading_only and min(D.shape) <= LEADING):
        yield Attempt("thin", D.device, partial(solve_thin, D, **given), is_bet=True)
    if leading_only:
        yield Attempt("leading", D.device, partial(solve_leading, D, power=power), is_bet=True)
    for name, solve in RUNGS[first:]:
        yield Attempt(name, D.device, partial(solve, D, **given))
    if D.device.type != "cpu":
        helper, D = D.device, D.cpu()
        if first == 0:
            smaller = f"deflated-float32 on cpu, eigh on {helper}"
            yield Attempt(smaller, D.device, partial(solve_deflated, D, helper=helper, **given))
        for name, solve in RUNGS[first:]:
            yield Attempt(f"{name} on cpu", D.device, partial(solve, D, **given))


def list_product_attempts(
    b: Tensor, a: Tensor, cache: DecompositionCache | None = None, power: float = 0.0
) -> Iterator[Attempt]:
    """The solver for factors of b @ a, and the dense ladder should it fail."""
    yield Attempt("factors", b.device, partial(solve_factors, b, a, cache=cache, power=power))
    yield from list_attempts(b @ a, cache, power)


def warn_of_cluster(found: Truncation) -> tuple[str, ...]:
    """A warning when the data do not say which directions lie above the cut."""
    s_k, s_next, k = float(found.sigma[found.k - 1]), found.sigma_next, found.k
    if s_next <= 0.0 or (s_k - s_next) / s_k >= found.resolution:
        return ()
    return (f"the cut at k={k} falls into a cluster: s_k and s_k+1 differ by less than {found.resolution:.0e}",)


def summarise_failure(failure: Exception) -> str:
    """The first line of an error, without the driver's essay after it."""
    lines = str(failure).strip().splitlines()
    if isinstance(failure, Undecided):
        return lines[0]
    return f"{type(failure).__name__}: {lines[0][:160]}" if lines else type(failure).__name__
