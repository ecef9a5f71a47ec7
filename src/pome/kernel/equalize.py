"""Equalized edit of one matrix, with its certificate: the method as a pure function of tensors.

Equalized.value = alpha * U_k S_k^p V_k^T of the delta D = U S V^T, with alpha = beta * alpha_0. With p = 0 that is POME
(equations 9 to 12); with p = 1 and alpha = 1 it is the best approximation of rank k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from pome.choices import MOST_POWER, RankRuleName, ScaleName
from pome.kernel.certificate import Certificate, certify, certify_factored
from pome.kernel.decomposition import DecompositionCache, Factors, Truncation
from pome.kernel.decomposition import ZeroDelta as ZeroDelta
from pome.kernel.factorisation import balance
from pome.kernel.ladder import Certified, climb, list_attempts, list_product_attempts
from pome.kernel.ladder import Unsolved as Unsolved
from pome.kernel.norms import squared_norm
from pome.kernel.operands import (
    check_matrix,
    multiply_in_place,
    multiply_power_of_two,
    normalise,
    show_shape,
)
from pome.kernel.precision import full_precision
from pome.kernel.rank import RankRule, count_signal, is_number
from pome.kernel.scale import KeptSpectrum, check_scale, find_gain, raise_to


@dataclass(frozen=True)
class Equalized:
    """An edited delta, with what was decided and what was proved. Fields are named as in the manifest.

    Norms are Frobenius norms; D is the m x n delta, in whose units all singular values and norms are.

    value: alpha * U_k S_k^p V_k^T, m x n, float32 (float64 for a float64 delta), on the delta's device.
    rank: numerical rank, the number of s_i > s_1 * sqrt(max(m, n) * 2^-52); None where few directions were asked for
        and found without it.
    k: number of directions kept, in 1..rank.
    alpha: beta times what the scale rule gives; with p = 0 every non-zero singular value of `value`.
    beta: the factor that was asked for.
    sigma_max, sigma_k, sigma_next: s_1, s_k and s_{k+1} of D; sigma_next is 0.0 where no direction is left.
    delta_norm, edit_norm: norm(D) and norm(value).
    energy_kept: (s_1^2 + ... + s_k^2) / norm(D)^2, in (0, 1].
    departure: norm(value - D) / norm(D), how far the edit takes the weight from the fine-tuned one.
    objective: <D, M> / (s_1^(1+p) + ... + s_k^(1+p)) for M = value / alpha; 1 within 1e-5 (with p = 0: Ky Fan, and
        POME, theorem 1).
    orthogonality: norm(P P^T P - P) / norm(P) of P = U_k V_k^T, estimated by seeded probes; 0 within 1e-5.
    power_residual: norm(M^T D - D^T M) / norm(M^T D), estimated by seeded probes; 0 within 1e-5 where p is not 0.
    solver: the rung of the ladder that found it, such as `deflated-float32`.
    warnings: rungs that failed, a cut within a cluster of singular values, directions that storage rounding explains.
    sigma: singular values of D, descending, float64, on the CPU; the k + 1 largest where the rank is None.
    factors: B (m x k) and A (k x n), balanced, with B A = value, where the value was multiplied from such.
    """

    method: ClassVar[str] = "equalize"
    value: Tensor
    rank: int | None
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
    power_residual: float
    solver: str
    warnings: tuple[str, ...]
    sigma: Tensor
    factors: Factors | None = None


@dataclass(frozen=True)
class Recipe:
    """What is done to a matrix: the rule for k, the scale rule, beta and the power p of the singular values.

    leading_only: whether the directions beyond k, and with them the rank, may stay unknown wherever that is faster.
    Raises ValueError for one that makes no sense.
    """

    rule: RankRule
    scale: str = "frobenius"
    beta: float = 1.0
    power: float = 0.0
    leading_only: bool = False

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not (is_number(self.beta) and self.beta > 0.0):
            raise ValueError(f"beta must be a positive number, not {self.beta!r}")
        if not (is_number(self.power) and 0.0 <= self.power <= MOST_POWER):
            raise ValueError(f"power must lie in [0, {MOST_POWER:g}], not {self.power!r}")


def equalize(
    delta: Tensor,
    *,
    rank_ratio: float = 0.5,
    rank: int | None = None,
    rank_rule: RankRuleName = "ratio",
    energy: float = 0.9,
    scale: ScaleName = "frobenius",
    beta: float = 1.0,
    power: float = 0.0,
) -> Equalized:
    """Equalized edit alpha * U_k S_k^p V_k^T of a delta D = U S V^T (POME, arXiv 2510.06627, equations 9 to 12).

    delta: m x n (fan_out x fan_in), any float dtype, any device; it is left as it is.
    rank_ratio: K in (0, 1]; k = max(1, round(K * rank)). POME's default is 0.5 (its table 12).
    rank: k itself, at least 1 and at most the numerical rank; turns the rule `ratio` into `fixed`.
    rank_rule: `ratio`, `fixed`, `energy`, `gavish-donoho` or `effective`; `noise-floor` needs the stored weight, which
        `pome.edit` has.
    energy: E in (0, 1], for the rule `energy`: the least k that holds a share E of norm(D)^2.
    scale: alpha = beta * alpha_0 with alpha_0 by rule: `frobenius` norm(D) / sqrt(k) (equation 12), `unit` 1, `rms`
        sqrt(m / n) (equation 18), `mean` the mean of the kept singular values, `spectral` the largest.
    beta: positive factor; with 1 and `frobenius` the edit has the norm of the delta.
    power: p in [0, 8]. 0 equalizes, 1 keeps the singular values: with the scale `unit`, truncation (POME, figure 1).
        The scales are then about the singular values of the edit: `frobenius` norm(D) / norm(S_k^p), `mean` and
        `spectral` the mean and the largest of S_k over those of S_k^p, `rms` sqrt(m / n) / s_1^p, `unit` 1.

    The same input on the same device with the same number of threads gives the same bits; no global state of torch
    (random numbers, precision) is touched. Raises ZeroDelta when there is nothing to equalize, ValueError for a tensor
    or an argument that makes no sense or numbers out of range, and Unsolved when no solver on any device could be
    certified.
    """
    rule = RankRule.from_options(rank_rule, {"rank_ratio": rank_ratio, "rank": rank, "energy": energy})
    return equalize_matrix(delta, Recipe(rule, scale, beta, power))


def equalize_matrix(delta: Tensor, recipe: Recipe, cache: DecompositionCache | None = None) -> Equalized:
    """Equalized edit of a delta (m x n) by a recipe; raises as `equalize` does.

    `cache` is for many edits of one delta: a mapping, empty at first, that takes what is found before k is chosen and
    gives it back in the next call. The bits are the same with a cache and without.
    """
    check_matrix(delta, "delta")
    with full_precision(delta.device):
        D, exponent = normalise(delta, "delta")
        rule = recipe.rule.shift(-exponent)
        attempts = list_attempts(D, cache, recipe.power, rule, recipe.leading_only)
        found = climb(attempts, partial(prove_matrix, D), D.device, rule)
        return scale_edit(found, recipe, (D.shape[0], D.shape[1]), squared_norm(D), exponent)


def equalize_product(b: Tensor, a: Tensor, recipe: Recipe, cache: DecompositionCache | None = None) -> Equalized:
    """Equalized edit of the low-rank delta b @ a (b m x r, a r x n), as an adapter's; else as `equalize_matrix`."""
    check_matrix(b, "factor b")
    check_matrix(a, "factor a")
    if b.shape[1] != a.shape[0] or b.device != a.device:
        raise ValueError(f"factors do not multiply: {show_shape(b)} on {b.device} and {show_shape(a)} on {a.device}")
    with full_precision(b.device):
        B, up = normalise(b, "factor b")
        A, down = normalise(a, "factor a")
        wide = torch.promote_types(B.dtype, A.dtype)
        B, A, exponent = B.to(wide), A.to(wide), up + down
        attempts = list_product_attempts(B, A, cache, recipe.power)
        found = climb(attempts, partial(prove_product, B, A), B.device, recipe.rule.shift(-exponent))
        square = float(found.truncation.sigma.square().sum())
        return scale_edit(found, recipe, (B.shape[0], A.shape[1]), square, exponent)


def prove_matrix(D: Tensor, found: Truncation) -> Certificate:
    """Certificate of a truncation of D."""
    return certify(found, (D,))


def prove_product(b: Tensor, a: Tensor, found: Truncation) -> Certificate:
    """Certificate of a truncation of D = b @ a, by the factors of M where it was multiplied from such."""
    return certify_factored(found, b, a) if found.is_product else certify(found, (b, a))


def scale_edit(found: Certified, recipe: Recipe, shape: tuple[int, int], square: float, exponent: int) -> Equalized:
    """Edit of the delta 2^exponent * D from what was certified for D, whose squared norm is `square`."""
    truncation, certificate = found.truncation, found.certificate
    sigma, k = multiply_power_of_two(truncation.sigma, exponent), truncation.k
    try:
        delta_norm = math.ldexp(math.sqrt(square), exponent)
    except OverflowError:
        delta_norm = math.inf
    # The M that was certified is made of s over s_1: `gain` is its scale, and alpha that of U_k S_k^p V_k^T.
    gain = recipe.beta * find_gain(recipe.scale, KeptSpectrum(sigma, k, shape, delta_norm, recipe.power))
    unit = raise_to(float(sigma[0]), recipe.power)
    alpha = gain / unit if unit else math.inf
    if not (0.0 < alpha < math.inf and 0.0 < gain < math.inf and 0.0 < delta_norm < math.inf):
        raise ValueError(f"out of the range of numbers: norm of the delta {delta_norm:.1e}, alpha {alpha:.1e}")
    return Equalized(
        value=multiply_in_place(truncation.M, gain),
        rank=truncation.rank,
        k=k,
        alpha=alpha,
        beta=recipe.beta,
        sigma_max=float(sigma[0]),
        sigma_k=float(sigma[k - 1]),
        sigma_next=float(sigma[k]) if k < sigma.numel() else 0.0,
        delta_norm=delta_norm,
        edit_norm=gain * certificate.norm,
        energy_kept=float(truncation.sigma[:k].square().sum()) / square,
        departure=measure_departure(
            truncation, certificate, recipe.power, square, gain * certificate.norm / delta_norm
        ),
        objective=certificate.objective,
        orthogonality=certificate.orthogonality,
        power_residual=certificate.residual,
        solver=found.solver,
        warnings=(*found.warnings, *warn_of_noise(sigma, k, recipe.rule, shape)),
        sigma=sigma,
        factors=truncation.factors and balance(*truncation.factors, gain),
    )


def measure_departure(
    truncation: Truncation, certificate: Certificate, power: float, square: float, ratio: float
) -> float:
    """norm_F(E - D) / norm_F(D) of the edit E, from `square` = norm_F(D)^2 and `ratio` = norm_F(E) / norm_F(D)."""
    s_1, kept = float(truncation.sigma[0]), truncation.sigma[: truncation.k]
    inner = certificate.objective * s_1 * float((kept / s_1).pow(1.0 + power).sum())
    cosine = inner / (certificate.norm * math.sqrt(square))
    return math.sqrt(max(0.0, 1.0 - 2.0 * ratio * cosine + ratio**2))


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
