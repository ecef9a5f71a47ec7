"""Fine-tuned weight with the singular values of its base, certified: the method `equivalence`, on tensors alone.

W_E = U_ft S_base V_ft^T, both spectra in descending order, is the nearest matrix to W_ft among all those with the
singular values of W_base, because <A, W_ft> <= s(A) . s(W_ft) for every A (von Neumann), with equality for W_E. An
orthogonal equivalence transformation of W_base, R W_base P, reaches exactly those matrices (POET, arXiv 2506.08001).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pome.kernel.certificate import TOLERANCE, draw_probes
from pome.kernel.decomposition import Decomposition, DecompositionCache, Undecided, ZeroDelta, find_decomposition
from pome.kernel.gram_products import multiply_gram
from pome.kernel.ladder import SMALL, Unsolved, summarise_failure
from pome.kernel.operands import check_matrix, multiply_power_of_two, show_shape
from pome.kernel.precision import full_precision, to_float64
from pome.kernel.rank import count_rank, is_number
from pome.kernel.solvers.gram import NOISE, TAIL, decompose_gram, refine_tail
from pome.kernel.solvers.svd import decompose_by_svd

# Squares keep what lies above this share of s_1 to 1e-7 of itself, and its directions orthonormal to that.
RESOLVED = math.sqrt(NOISE / 1e-7)
FLOOR = 1e-9  # of norm(W_base): what rounding leaves in a distance that is next to nothing
MOST_EXPONENT = 200
TIED = 1e-10  # of s_1: float64 does not tell the directions of nearer singular values apart to the certificate's bound


@dataclass(frozen=True)
class Matched:
    """A weight with the spectrum of its base, with what was measured and proved. Fields are named as in the manifest.

    Norms are Frobenius norms, all matrices m x n, D = W_ft - W_base.

    value: the edit beta * (W_E - W_base), float32 (float64 where W_base is), on W_base's device.
    beta: the factor that was asked for. With another than 1, W_base + value has other singular values than W_base.
    delta_norm, edit_norm: norm(D) and norm(value).
    departure: norm(value - D) / norm(D), how far the edit takes the weight from the fine-tuned one.
    spectral_drift: norm(s(W_ft) - s(W_base)) / norm(W_base), of sorted singular values: what the edit takes back.
    distance: norm(W_E - W_ft), from the entries.
    objective: <W_E, W_ft> / (s(W_base) . s(W_ft)); 1 within 1e-5 (von Neumann).
    orthogonality: bound on norm(s(W_E) - s(W_base)) / norm(W_base), estimated by seeded probes; 0 within 1e-5.
    solver: `gram-float64` or `svd-float64`, with ` on cpu` where an accelerator failed.
    warnings: solvers that failed; that W_E is not the only nearest matrix.
    sigma: singular values of W_base and W_E, descending, float64, on the CPU.
    """

    method: ClassVar[str] = "equivalence"
    value: Tensor
    beta: float
    delta_norm: float
    edit_norm: float
    departure: float
    spectral_drift: float
    distance: float
    objective: float
    orthogonality: float
    solver: str
    warnings: tuple[str, ...]
    sigma: Tensor


def match_spectrum(W_base: Tensor, W_ft: Tensor, *, beta: float = 1.0) -> Matched:
    """Edit beta * (W_E - W_base), where W_E is the nearest matrix to W_ft with the singular values of W_base.

    W_base, W_ft: m x n, any float dtype, one device; they are left as they are.
    beta: positive factor; 1 makes W_base + edit the matrix W_E. The certificate is that of W_E for every beta.

    The same input on the same device with the same number of threads gives the same bits. All work is in float64:
    about the cost of an `eigh` and an `eigvalsh` of the short side. Raises ZeroDelta where W_ft equals W_base,
    ValueError for a tensor or a beta that makes no sense, for a side that is zero, and Unsolved when no solver could be
    certified.
    """
    return match_matrix(W_base, W_ft, beta)


def match_matrix(W_base: Tensor, W_ft: Tensor, beta: float, cache: DecompositionCache | None = None) -> Matched:
    """Edit of `match_spectrum`, with a cache for many edits of one pair as in `equalize_matrix`."""
    check_matrix(W_base, "W_base")
    check_matrix(W_ft, "W_ft")
    if W_base.shape != W_ft.shape or W_base.device != W_ft.device:
        sides = (f"{show_shape(W)} on {W.device}" for W in (W_base, W_ft))
        raise ValueError("W_base and W_ft must have one shape and one device, not " + " and ".join(sides))
    if not (is_number(beta) and beta > 0.0):
        raise ValueError(f"beta must be a positive number, not {beta!r}")
    exponent = find_exponent(W_base, W_ft)
    wide = W_base.shape[0] < W_base.shape[1]
    notes: list[str] = []
    with full_precision(W_base.device):
        for place in list_places(W_base.device):
            for name, decompose in RUNGS[min(W_base.shape) < SMALL :]:
                solver = name if place == W_base.device else f"{name} on cpu"
                full = False
                try:
                    pair = Pair.prepare(W_base, W_ft, place, exponent, wide)
                    match = solve(pair, name, decompose, cache)
                    fault = match.find_fault()
                    if fault is None:
                        return finish(match, pair, W_base, beta, exponent, wide, solver, notes)
                except (RuntimeError, Undecided) as failure:  # the drivers of every device raise RuntimeError or below
                    fault = summarise_failure(failure)
                    full = isinstance(failure, torch.cuda.OutOfMemoryError)
                notes.append(f"{solver} handed over: {fault}")
                if full:  # what comes after it needs more memory
                    break
    raise Unsolved("no solver could be certified: " + "; ".join(notes))


def list_places(device: torch.device) -> list[torch.device]:
    """Where the work is tried: on the device, and after an accelerator on the CPU."""
    return list(dict.fromkeys((device, torch.device("cpu"))))


def find_exponent(W_base: Tensor, W_ft: Tensor) -> int:
    """e such that no square of an entry over 2^e overflows in float64: 0 but for float64 sides out of all proportion.

    Raises ZeroDelta and ValueError as `match_spectrum` does.
    """
    largest = 0.0
    for what, W in (("W_base", W_base), ("W_ft", W_ft)):
        low, high = (float(bound) for bound in torch.aminmax(W.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{what} holds NaN or infinity ({show_shape(W)})")
        if low == high == 0.0 and bool((W_ft if W is W_base else W_base).any()):
            raise ValueError(f"{what} is zero in every entry: it has no singular directions to keep")
        largest = max(largest, -low, high)
    if torch.equal(*(W.to(torch.promote_types(W_base.dtype, W_ft.dtype)) for W in (W_base, W_ft))):
        raise ZeroDelta(f"W_ft equals W_base in every entry ({show_shape(W_ft)})")
    exponent = math.frexp(largest)[1]
    return exponent if abs(exponent) > MOST_EXPONENT else 0


@dataclass(frozen=True)
class Pair:
    """Both sides in float64 over 2^exponent, m x n with m >= n: transposed where they are wide."""

    base: Tensor
    ft: Tensor

    @classmethod
    def prepare(cls, W_base: Tensor, W_ft: Tensor, place: torch.device, exponent: int, wide: bool) -> Pair:
        base, ft = (to_float64(W.detach().to(place)) for W in (W_base, W_ft))
        if exponent:
            base, ft = (multiply_power_of_two(W, -exponent) for W in (base, ft))
        return cls(base.mT, ft.mT) if wide else cls(base, ft)


@dataclass(frozen=True)
class Match:
    """W_E of a pair with the numbers that prove it: see Matched. `gap` = norm(s(W_ft) - s(W_base))."""

    W_E: Tensor
    sigma: Tensor
    rank: int
    ft_sigma: Tensor
    ft_rank: int
    norm: float
    gap: float
    distance: float
    objective: float
    residual: float

    def find_fault(self) -> str | None:
        """Fault in words, or None. A NaN fails every comparison, and so is a fault."""
        if not abs(float(self.sigma.norm()) / self.norm - 1.0) <= TOLERANCE:
            return f"norm {self.norm:.6g} of the base, {float(self.sigma.norm()):.6g} of its singular values"
        if not self.residual <= TOLERANCE:
            return f"singular values off by {self.residual:.1e}"
        if not abs(1.0 - self.objective) <= TOLERANCE:
            return f"1 - objective {1.0 - self.objective:.1e}"
        if not abs(self.distance - self.gap) <= TOLERANCE * self.gap + FLOOR * self.norm:
            return f"distance {self.distance:.6g} instead of {self.gap:.6g}"
        return None


def solve(
    pair: Pair, solver: str, decompose: Callable[[Tensor], Decomposition], cache: DecompositionCache | None
) -> Match:
    """W_E of a pair by one solver, and its certificate: from entries, spectra and probes, without decomposing W_E."""
    base = find_decomposition(cache, "values of BASE", pair.base, lambda: find_values(pair.base))
    found = find_decomposition(cache, f"{solver} of FT", pair.ft, lambda: decompose(pair.ft))
    assert found.U is not None
    s = base.sigma.to(found.U)
    W_E = (found.U * s) @ found.V.mT
    # norm((U^T U - I) S) / 2 is, to first order, how far U S is from the nearest matrix with orthonormal columns times
    # S; the same holds for V; and no singular value moves by more than the matrix does (Mirsky).
    probes = draw_probes(s.numel(), s)
    scaled = s[:, None] * probes
    defects = [float((Q.mT @ (Q @ scaled) - scaled).norm()) / 2.0 for Q in (found.U, found.V)]
    mismatch = float((W_E @ probes - found.U @ (s[:, None] * (found.V.mT @ probes))).norm())
    norm = float(pair.base.norm())
    # The bounds are those of sorted spectra: a solver's pairing in another order is no optimum.
    base_sigma, ft_sigma = (side.sigma.sort(descending=True).values for side in (base, found))
    return Match(
        W_E=W_E,
        sigma=base_sigma,
        rank=base.rank,
        ft_sigma=ft_sigma,
        ft_rank=found.rank,
        norm=norm,
        gap=float((base_sigma - ft_sigma).norm()),
        distance=float((W_E - pair.ft).norm()),
        objective=float((W_E * pair.ft).sum()) / float(base_sigma @ ft_sigma),
        residual=(sum(defects) + mismatch) / norm,
    )


def find_values(tall: Tensor) -> Decomposition:
    """Singular values alone (V is empty), from squares where these resolve the least of them.

    Squares stand in for a driver that does not converge, too: each value is then good to s_1 / 10^8.
    """
    none = tall.new_empty(0, 0)

    def find_squares() -> Tensor:
        squares: Tensor = torch.linalg.eigvalsh(multiply_gram(tall), UPLO="U")
        return squares.flip(0).clamp_min(0.0).cpu()

    if min(tall.shape) >= SMALL:
        squares = find_squares()
        if float(squares[-1]) > RESOLVED**2 * float(squares[0]):
            return Decomposition(squares.sqrt(), squares.numel(), none)
    try:
        sigma = torch.linalg.svdvals(tall).cpu()
    except RuntimeError:  # which that of a driver that does not converge is
        sigma = find_squares().sqrt()
    return Decomposition(sigma, count_rank(sigma.clone(), (tall.shape[0], tall.shape[1])), none)


def find_spectrum(W: Tensor) -> Tensor:
    """Singular values of W (m x n), descending, float64, on the CPU. Raises Unsolved when every driver failed."""
    notes = []
    with full_precision(W.device):
        for place in list_places(W.device):
            try:
                tall = to_float64(W.to(place))
                return find_values(tall if W.shape[0] >= W.shape[1] else tall.mT).sigma
            except RuntimeError as failure:
                notes.append(summarise_failure(failure))
    raise Unsolved("no driver found its singular values: " + "; ".join(notes))


def decompose_squares(tall: Tensor) -> Decomposition:
    """Singular value decomposition by the Gram matrix. Raises Undecided for one that is rank deficient."""
    found = decompose_gram(tall, (tall.shape[0], tall.shape[1]))
    if found.rank < tall.shape[1]:
        raise Undecided(f"rank {found.rank} of {tall.shape[1]}")
    sigma, V = found.sigma, found.V
    if float(sigma[-1]) < RESOLVED * float(sigma[0]):
        refine_tail(tall, V, sigma, TAIL * RESOLVED * float(sigma[0]))
    U = tall @ V
    lengths = torch.linalg.vector_norm(U, dim=0)
    return Decomposition(lengths.cpu(), found.rank, V, U.div_(lengths))


def decompose_fully(tall: Tensor) -> Decomposition:
    """Singular value decomposition by the driver for it, its least values as they are."""
    found = decompose_by_svd(tall)
    lengths = torch.linalg.vector_norm(tall @ found.V, dim=0)
    return replace(found, sigma=lengths.cpu())


RUNGS: tuple[tuple[str, Callable[[Tensor], Decomposition]], ...] = (
    ("gram-float64", decompose_squares),
    ("svd-float64", decompose_fully),
)


def finish(
    match: Match, pair: Pair, W_base: Tensor, beta: float, exponent: int, wide: bool, solver: str, notes: list[str]
) -> Matched:
    """Result in the units, orientation and precision of W_base, and on its device; `match` is overwritten."""
    D = pair.ft - pair.base
    edit = match.W_E.sub_(pair.base).mul_(beta)
    delta_norm, edit_norm = float(D.norm()), float(edit.norm())
    departure = float(D.sub_(edit).norm()) / delta_norm
    del D
    value = edit.mT if wide else edit
    value = multiply_power_of_two(value, exponent) if exponent else value
    value = value.to(W_base.device, torch.float64 if W_base.dtype == torch.float64 else torch.float32)
    if not bool(value.isfinite().all()):
        raise ValueError(f"beta {beta:g} takes the edit out of the range of {show_shape(value)}")
    return Matched(
        value=value.contiguous(),
        beta=beta,
        delta_norm=math.ldexp(delta_norm, exponent),
        edit_norm=math.ldexp(edit_norm, exponent),
        departure=departure,
        spectral_drift=match.gap / match.norm,
        distance=math.ldexp(match.distance, exponent),
        objective=match.objective,
        orthogonality=match.residual,
        solver=solver,
        warnings=(*notes, *warn_of_choice(match)),
        sigma=multiply_power_of_two(match.sigma, exponent),
    )


def warn_of_choice(match: Match) -> tuple[str, ...]:
    """A warning where W_ft's spectrum leaves open which directions get which of W_base's singular values."""
    if match.ft_rank < match.rank:
        return (
            f"W_ft has rank {match.ft_rank} and W_base {match.rank}: the directions that W_ft lacks are not determined",
        )
    # Within a run of tied values any rotation is as near: W_E moves by up to twice the spread of s(W_base) there.
    ft = match.ft_sigma
    runs = torch.cumsum((ft[:-1] - ft[1:] > TIED * ft[0]).long(), 0)
    runs = torch.cat([runs.new_zeros(1), runs])
    counts = torch.bincount(runs).double()
    means = torch.bincount(runs, weights=match.sigma) / counts
    spread = 2.0 * float((match.sigma - means[runs]).norm())
    if spread <= TOLERANCE * match.norm:
        return ()
    return (f"singular values of W_ft are tied: W_E is not determined beyond {spread / match.norm:.0e} of its norm",)
