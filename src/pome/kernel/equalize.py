"""One matrix in, one edited delta and its certificate out. Pure tensors: no names, no paths.

    Equalized.value = alpha * P,  P = U_k V_k^T of the delta D = U S V^T,  alpha = beta * alpha_0   (POME, eq. 9-12)

A ladder of solvers finds P. The certificate of each answer decides, not the solver: an answer that fails it, a driver
that fails, and a precision that cannot settle the rank or the cut all hand over to the next rung.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pome.kernel.certificate import (
    Certificate,
    certify,
    certify_factored,
    inner_dense,
    inner_factors,
    squared_norm,
)
from pome.kernel.deflate import solve_deflated
from pome.kernel.gram import solve_gram
from pome.kernel.lowrank import solve_factors
from pome.kernel.noise import describe
from pome.kernel.precision import full_precision
from pome.kernel.rank import RankRule, count_signal, is_number
from pome.kernel.scale import SCALES, choose_scale
from pome.kernel.spectrum import DecompositionCache, Kept, Solver, Undecided, ZeroDelta
from pome.kernel.svd import solve_svd

RUNGS: tuple[tuple[str, Solver], ...] = (
    ("deflated-float32", solve_deflated),
    ("gram-float64", solve_gram),
    ("svd-float64", solve_svd),
)
SMALL = 96  # short side below which a float64 SVD is as fast as anything
# Entries between these bounds can be squared and summed in float32 without overflow, and without losing the small ones.
LEAST, MOST = 2.0**-30, 2.0**30


class Unsolved(ArithmeticError):
    """Every rung of the ladder failed; the message says how each did."""


@dataclass(frozen=True)
class Equalized:
    """An edited delta with what was decided and what was proved. Fields are named as in the manifest.

    value: alpha * P, m x n, float32 (float64 for a float64 delta), on the delta's device. sigma_next is 0.0 where
    there is no direction left. delta_norm and edit_norm are Frobenius norms of the delta and of `value`, energy_kept
    the share of delta_norm^2 in the k kept singular values. departure = norm_F(value - D) / delta_norm: how far the
    edit takes the weight from the fine-tuned one. sigma: singular values of D, descending, float64, on the CPU.
    objective = <D, P> / (s_1 + ... + s_k); orthogonality = norm_F(P P^T P - P) / norm_F(P), by seeded probes.
    """

    value: Tensor
    rank: int
    k: int
    alpha: float
    beta: float
    sigma_max: float
    sigma_k: float
    sigma_next: float
    delta_norm: float
    edit_norm: float
    energy_kept: float
    departure: float
    objective: float
    orthogonality: float
    solver: str
    warnings: tuple[str, ...]
    sigma: Tensor


def equalize(
    delta: Tensor,
    *,
    rank_ratio: float = 0.5,
    rank: int | None = None,
    rank_rule: str = "ratio",
    energy: float = 0.9,
    scale: str = "frobenius",
    beta: float = 1.0,
    noise_floor: float | None = None,
    cache: DecompositionCache | None = None,
) -> Equalized:
    """The edited delta of `delta` (m x n, any float dtype, any device). Options are those of `pome edit`.

    `cache` is for many edits of one delta: a mapping, empty at first, that takes what is found before k is chosen and
    gives it back in the next call. The same input on the same device with the same number of threads gives the same
    bits, with `cache` or without; no global state of torch (random numbers, precision) is touched. Raises ZeroDelta
    when there is nothing to equalize, ValueError for a tensor or an option that makes no sense, and Unsolved when no
    solver on any device could be certified.
    """
    rule = make_rule(rank_ratio, rank, rank_rule, energy, noise_floor)
    check_scale(scale, beta)
    check_shape(delta, "delta")
    with full_precision(delta.device):
        D, exponent = normalise(delta, "delta")
        found = climb(list_rungs(D, cache), partial(prove_dense, D), D.device, rule.shift(-exponent))
        return finish(found, rule, (D.shape[0], D.shape[1]), squared_norm(D), exponent, scale, beta)


def equalize_factors(
    b: Tensor,
    a: Tensor,
    *,
    rank_ratio: float = 0.5,
    rank: int | None = None,
    rank_rule: str = "ratio",
    energy: float = 0.9,
    scale: str = "frobenius",
    beta: float = 1.0,
    noise_floor: float | None = None,
    cache: DecompositionCache | None = None,
) -> Equalized:
    """The edited delta of the low-rank delta b @ a (b m x r, a r x n), as an adapter's; else as `equalize`."""
    rule = make_rule(rank_ratio, rank, rank_rule, energy, noise_floor)
    check_scale(scale, beta)
    check_shape(b, "factor b")
    check_shape(a, "factor a")
    if b.shape[1] != a.shape[0] or b.device != a.device:
        raise ValueError(f"factors do not multiply: {describe(b)} on {b.device} and {describe(a)} on {a.device}")
    with full_precision(b.device):
        B, up = normalise(b, "factor b")
        A, down = normalise(a, "factor a")
        wide = torch.promote_types(B.dtype, A.dtype)
        B, A, exponent = B.to(wide), A.to(wide), up + down
        rungs = list_product_rungs(B, A, cache)
        found = climb(rungs, partial(prove_product, B, A), B.device, rule.shift(-exponent))
        square = float(found.kept.sigma.square().sum())
        return finish(found, rule, (B.shape[0], A.shape[1]), square, exponent, scale, beta)


def prove_dense(D: Tensor, kept: Kept) -> Certificate:
    """The certificate of a P for D."""
    return certify(kept.P, kept.k, attain(kept), inner_dense(D))


def prove_product(b: Tensor, a: Tensor, kept: Kept) -> Certificate:
    """The certificate of a P for D = b @ a, by P's own factors where it has them."""
    if kept.factors is None:
        return certify(kept.P, kept.k, attain(kept), inner_factors(b, a))
    return certify_factored(kept.P, *kept.factors, kept.k, attain(kept), b, a)


def attain(kept: Kept) -> float:
    """s_1 + ... + s_k, the most that <D, P> can be."""
    return float(kept.sigma[: kept.k].sum())


@dataclass(frozen=True)
class Found:
    """The first certified answer of the ladder."""

    solver: str
    kept: Kept
    certificate: Certificate
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Attempt:
    """One rung, ready to be tried, and the device whose memory it needs."""

    name: str
    device: torch.device
    solve: Callable[[RankRule], Kept]


def climb(
    attempts: Iterable[Attempt], prove: Callable[[Kept], Certificate], device: torch.device, rule: RankRule
) -> Found:
    """Try one solver after the other until `prove` certifies an answer, on `device`.

    A rung that runs out of an accelerator's memory ends the attempts that hold the delta there: those after it need
    more. What is next holds the delta on the CPU.
    """
    notes: list[str] = []
    full = None
    for attempt in attempts:
        if attempt.device == full:
            continue
        try:
            kept = attempt.solve(rule)
            kept = replace(kept, P=kept.P.to(device))
            certificate = prove(kept)
            fault = certificate.find_fault()
        except (RuntimeError, Undecided) as failure:  # the drivers of every device raise RuntimeError or below it
            fault = summarise(failure)
            if isinstance(failure, torch.cuda.OutOfMemoryError):
                full = attempt.device
        if fault is None:
            return Found(attempt.name, kept, certificate, (*notes, *warn_of_cluster(kept)))
        notes.append(f"{attempt.name} handed over: {fault}")
    raise Unsolved("no solver could be certified: " + "; ".join(notes))


def list_rungs(D: Tensor, cache: DecompositionCache | None = None) -> Iterator[Attempt]:
    """The ladder where D is. Where that is an accelerator, the smaller form after it, D on the CPU and the short side's
    `eigh` still there, and then the ladder on the CPU. A small matrix takes the last rung at once, in a millisecond; a
    float64 one skips the first."""
    first = 2 if min(D.shape) < SMALL else 1 if D.dtype == torch.float64 else 0
    given: dict[str, Any] = {} if cache is None else {"cache": cache}
    for name, solve in RUNGS[first:]:
        yield Attempt(name, D.device, partial(solve, D, **given))
    if D.device.type != "cpu":
        helper, D = D.device, D.cpu()
        if first == 0:
            smaller = f"deflated-float32 on cpu, eigh on {helper}"
            yield Attempt(smaller, D.device, partial(solve_deflated, D, helper=helper, **given))
        for name, solve in RUNGS[first:]:
            yield Attempt(f"{name} on cpu", D.device, partial(solve, D, **given))


def list_product_rungs(B: Tensor, A: Tensor, cache: DecompositionCache | None) -> Iterator[Attempt]:
    """The thin route, and the dense ladder should it fail."""
    given: dict[str, Any] = {} if cache is None else {"cache": cache}
    yield Attempt("factors", B.device, partial(solve_factors, B, A, **given))
    yield from list_rungs(B @ A, cache)


def finish(
    found: Found, rule: RankRule, shape: tuple[int, int], square: float, exponent: int, scale: str, beta: float
) -> Equalized:
    """Scale what was found for D back to the delta = 2^exponent * D, and by alpha. `square` is norm_F(D)^2."""
    kept, certificate = found.kept, found.certificate
    sigma, k = shift(kept.sigma, exponent), kept.k
    try:
        delta_norm = math.ldexp(math.sqrt(square), exponent)
    except OverflowError:
        delta_norm = math.inf
    alpha = beta * choose_scale(scale, sigma, k, shape, delta_norm)
    if not (0.0 < alpha < math.inf and 0.0 < delta_norm < math.inf):
        raise ValueError(f"out of the range of numbers: norm of the delta {delta_norm:.1e}, alpha {alpha:.1e}")
    return Equalized(
        value=multiply(kept.P, alpha),
        rank=kept.rank,
        k=k,
        alpha=alpha,
        beta=beta,
        sigma_max=float(sigma[0]),
        sigma_k=float(sigma[k - 1]),
        sigma_next=float(sigma[k]) if k < sigma.numel() else 0.0,
        delta_norm=delta_norm,
        edit_norm=alpha * certificate.norm,
        energy_kept=float(kept.sigma[:k].square().sum()) / square,
        departure=measure_departure(kept, certificate, square, alpha * certificate.norm / delta_norm),
        objective=certificate.objective,
        orthogonality=certificate.orthogonality,
        solver=found.solver,
        warnings=(*found.warnings, *warn_of_noise(sigma, k, rule, shape)),
        sigma=sigma,
    )


def measure_departure(kept: Kept, certificate: Certificate, square: float, ratio: float) -> float:
    """norm_F(alpha P - D) / norm_F(D), from `square` = norm_F(D)^2 and `ratio` = norm_F(alpha P) / norm_F(D)."""
    cosine = certificate.objective * attain(kept) / (certificate.norm * math.sqrt(square))
    return math.sqrt(max(0.0, 1.0 - 2.0 * ratio * cosine + ratio**2))


def multiply(P: Tensor, alpha: float) -> Tensor:
    """alpha * P, in place where alpha itself fits the dtype."""
    kind = torch.finfo(P.dtype)
    if kind.smallest_normal <= alpha <= kind.max:
        return P.mul_(alpha)
    value = (P.cpu().double() * alpha).to(P.dtype)
    if not bool(value.isfinite().all()):
        raise ValueError(f"alpha {alpha:.1e} takes the edit out of the range of {describe(P)}")
    return value.to(P.device)


def normalise(tensor: Tensor, what: str) -> tuple[Tensor, int]:
    """D and e with tensor = 2^e * D exactly, D in float32 (float64 for float64); D is the tensor itself where possible.

    Raises ValueError for NaN or infinity and ZeroDelta for nothing but zeros, before any decomposition sees them.
    """
    D = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    low, high = torch.aminmax(D)
    largest = max(-float(low), float(high))
    if not (math.isfinite(float(low)) and math.isfinite(float(high))):
        raise ValueError(f"{what} holds NaN or infinity ({describe(tensor)})")
    if largest == 0.0:
        raise ZeroDelta(f"{what} is zero in every entry ({describe(tensor)})")
    if LEAST <= largest <= MOST:
        return D, 0
    exponent = math.frexp(largest)[1]
    return shift(D, -exponent), exponent


def shift(tensor: Tensor, exponent: int) -> Tensor:
    """tensor * 2^exponent, in two steps because that power alone may overflow."""
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half)


def check_shape(tensor: Tensor, what: str) -> None:
    """Raise ValueError for anything but a non-empty matrix of floats."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise ValueError(f"{what} must be a dense tensor, not {type(tensor).__name__}")
    if tensor.ndim != 2 or tensor.numel() == 0 or not tensor.is_floating_point():
        raise ValueError(f"{what} must be a non-empty m x n float tensor, not {describe(tensor)}")


def make_rule(
    rank_ratio: float, rank: int | None, rank_rule: str, energy: float, noise_floor: float | None
) -> RankRule:
    """The rule of the options: `rank` beside the default rule means `fixed`."""
    name = "fixed" if rank is not None and rank_rule == "ratio" else rank_rule
    return RankRule(name, rank_ratio, rank, energy, noise_floor)


def check_scale(scale: str, beta: float) -> None:
    """Raise ValueError for an unknown scale, or a beta that is no positive number."""
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is none of {', '.join(SCALES)}")
    if not (is_number(beta) and beta > 0.0):
        raise ValueError(f"beta must be a positive number, not {beta!r}")


def summarise(failure: Exception) -> str:
    """The first line of an error, without the driver's essay after it."""
    lines = str(failure).strip().splitlines()
    if isinstance(failure, Undecided):
        return lines[0]
    return f"{type(failure).__name__}: {lines[0][:160]}" if lines else type(failure).__name__


def warn_of_cluster(kept: Kept) -> tuple[str, ...]:
    """A warning when the data do not say which directions lie above the cut."""
    s_k, s_next = float(kept.sigma[kept.k - 1]), kept.sigma_next
    if s_next <= 0.0 or (s_k - s_next) / s_k >= kept.resolution:
        return ()
    return (f"the cut at k={kept.k} falls into a cluster: s_k and s_k+1 differ by less than {kept.resolution:.0e}",)


def warn_of_noise(sigma: Tensor, k: int, rule: RankRule, shape: tuple[int, int]) -> tuple[str, ...]:
    """A warning when most of the kept directions are no larger than what storage rounding makes of nothing."""
    floor = rule.noise_floor or 0.0
    signal = count_signal(sigma, floor, shape)
    if 2 * signal >= k:
        return ()
    said = f"only {signal} of the {k} kept singular values lie above the noise of storage ({floor:.2e})"
    if signal == 0:
        return (f"{said}: the whole delta may be rounding",)
    return (f"{said}: the others equalize rounding; --rank-rule noise-floor keeps k={signal}",)
