"""Singular values without vectors: what inspecting a delta takes, and much less than editing it does.

The rungs are those of the edit: float32 with the strong directions deflated, then a float64 Gram matrix, then a float64
decomposition; with `eigvalsh` in place of `eigh`, and no product with the long side but the Gram matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pome.kernel.decomposition import Undecided, ZeroDelta
from pome.kernel.gram_products import multiply_gram
from pome.kernel.ladder import Unsolved, find_first_rung, summarise_failure
from pome.kernel.operands import check_matrix, multiply_power_of_two, normalise
from pome.kernel.precision import full_precision
from pome.kernel.rank import count_rank, rank_tolerance
from pome.kernel.solvers.deflated import deflate, find_noise
from pome.kernel.solvers.factors import CANCELLED


@dataclass(frozen=True)
class Values:
    """All min(m, n) singular values of a matrix, descending, float64, CPU; zero below its numerical rank."""

    sigma: Tensor
    rank: int


def measure_values(D: Tensor) -> Values:
    """Singular values of D (m x n, any float dtype, any device).

    Raises ZeroDelta for nothing but zeros, ValueError for NaN or infinity, and Unsolved when every driver failed.
    """
    check_matrix(D, "delta")
    with full_precision(D.device):
        scaled, exponent = normalise(D, "delta")
        tall = scaled if D.shape[0] >= D.shape[1] else scaled.mT
        first = find_first_rung(tall)
        places = [tall] if D.device.type == "cpu" else [tall, tall.cpu()]
        notes = []
        for place in places:
            for solve in RUNGS[first:]:
                try:
                    return finish_values(solve(place), exponent, (D.shape[0], D.shape[1]))
                except (RuntimeError, Undecided) as failure:
                    notes.append(summarise_failure(failure))
        raise Unsolved("no driver found its singular values: " + "; ".join(notes))


def measure_product(b: Tensor, a: Tensor) -> Values:
    """Singular values of b @ a (b m x r, a r x n) from its thin factors. Raises as measure_values does."""
    shape = (b.shape[0], a.shape[1])
    with full_precision(b.device):
        B, up = normalise(b, "factor b")
        A, down = normalise(a, "factor a")
        core = torch.linalg.qr(B.double()).R @ torch.linalg.qr(A.double().mT).R.mT
        sigma = torch.zeros(min(shape), dtype=torch.float64)
        found = torch.linalg.svdvals(core).cpu()
        if float(found[0]) <= CANCELLED * float(B.double().norm()) * float(A.double().norm()):
            raise ZeroDelta("the factors multiply to zero")
        sigma[: found.numel()] = found
        return finish_values(sigma, up + down, shape)


def finish_values(sigma: Tensor, exponent: int, shape: tuple[int, int]) -> Values:
    """Zero what lies below the numerical rank, and undo the scaling by 2^-exponent."""
    rank = count_rank(sigma, shape)
    return Values(multiply_power_of_two(sigma, exponent), rank)


def find_values_deflated(D: Tensor) -> Tensor:
    """Singular values of D (m x n, m >= n, float32), those of the bulk good to sqrt(FLOOR) of its largest.

    Raises Undecided when float32 squares leave open which of them are zero.
    """
    split = deflate(D)
    sigma = split.join_spectrum(torch.linalg.eigvalsh(split.G, UPLO="U"))
    noise = find_noise(sigma, split.theta.numel())
    threshold = float(sigma[0]) * rank_tolerance((D.shape[0], D.shape[1]))
    if not float(sigma[-1]) > math.sqrt(noise + threshold**2):
        raise Undecided("singular values below the float32 floor")
    return sigma


def find_values_gram(D: Tensor) -> Tensor:
    """Singular values of D (m x n, m >= n), good to s_1 / 10^8."""
    squares: Tensor = torch.linalg.eigvalsh(multiply_gram(D.double()), UPLO="U")
    return squares.flip(0).clamp_min(0.0).sqrt().cpu()


def find_values_svd(D: Tensor) -> Tensor:
    """Singular values of D (m x n), by the driver for them."""
    values: Tensor = torch.linalg.svdvals(D.double())
    return values.cpu()


RUNGS: tuple[Callable[[Tensor], Tensor], ...] = (find_values_deflated, find_values_gram, find_values_svd)
