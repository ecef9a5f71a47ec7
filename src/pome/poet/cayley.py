"""Cayley transform of skew-symmetric blocks by a truncated Neumann series, with its derivative.

R = (I + Q)(I - Q)^-1 is handled as E = R - I throughout: the diagonal of R is 1 - 2 |q|^2 for small Q, and a low
precision would round that to 1. With k terms of the series, E_k = 2 (Q + ... + Q^k) + Q^(k+1).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Terms = int | Literal["exact"]


class Cayley(NamedTuple):
    """Rotation blocks and what their derivative needs, each (blocks, b, b)."""

    value: Tensor  # E = R - I as it is applied
    generator: Tensor  # Q
    square: Tensor  # Q^2; Q itself for the exact transform
    partials: tuple[Tensor, ...]  # partial sums of Horner's rule, first to last but one
    truncated: Tensor  # E before the Newton-Schulz step
    error: Tensor | None  # R^T R - I of the truncated series; None without the step


def skew_symmetric(upper: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices (blocks, size, size) from their strict upper triangles (blocks, size (size - 1) / 2)."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    flat = upper.new_zeros(upper.shape[0], size * size)
    triangle = flat.index_copy(1, rows * size + columns, upper).view(-1, size, size)
    return triangle - triangle.mT


def upper_triangle(matrices: Tensor) -> Tensor:
    """Strict upper triangles of M - M^T: the adjoint of `skew_symmetric`."""
    size = matrices.shape[-1]
    rows, columns = torch.triu_indices(size, size, 1, device=matrices.device)
    return (matrices - matrices.mT).flatten(1).index_select(1, rows * size + columns)


def cayley(generator: Tensor, terms: Terms, correct: bool) -> Cayley:
    """E = R - I for skew-symmetric Q, each (blocks, b, b).

    Horner's rule in Q^2 needs 1 + terms // 2 products. `correct` adds one Newton-Schulz step, R <- R (3 I - R^T R) / 2,
    which takes an eigenvalue of absolute value 1 - d to 1 - 3/2 d^2. The exact transform needs no such step.
    """
    if terms == "exact":
        identity = torch.eye(generator.shape[-1], dtype=generator.dtype, device=generator.device)
        value = torch.linalg.solve(identity - generator, 2 * generator)
        return Cayley(value, generator, generator, (), value, None)
    square = generator @ generator
    partial = generator if terms % 2 == 0 else torch.add(square, generator, alpha=2)
    partials = []
    twice = 2 * (generator + square)
    for _ in range(terms // 2):
        partials.append(partial)
        partial = torch.baddbmm(twice, square, partial)
    if not correct:
        return Cayley(partial, generator, square, tuple(partials), partial, None)
    error = orthogonality_error(partial)
    value = torch.baddbmm(partial - error / 2, partial, error, alpha=-0.5)
    return Cayley(value, generator, square, tuple(partials), partial, error)


def orthogonality_error(value: Tensor) -> Tensor:
    """R^T R - I for R = I + E, (blocks, b, b), without forming R: E + E^T + E^T E."""
    return torch.baddbmm(value + value.mT, value.mT, value)


def cayley_pullback(rotation: Cayley, gradient: Tensor, terms: Terms) -> Tensor:
    """Gradient with respect to Q from the one with respect to E, each (blocks, b, b).

    Only its skew-symmetric part is meaningful; `upper_triangle` takes it.
    """
    truncated, square, generator = rotation.truncated, rotation.square, rotation.generator
    if terms == "exact":
        # E = 2 (I - Q)^-1 - 2 I, so dE = 2 (I - Q)^-1 dQ (I - Q)^-1 with (I - Q)^-1 = I + E / 2.
        half = torch.baddbmm(gradient, truncated.mT, gradient, alpha=0.5)
        return 2 * torch.baddbmm(half, half, truncated.mT, alpha=0.5)
    if rotation.error is not None:
        of_error = torch.baddbmm(gradient, truncated.mT, gradient, beta=-0.5, alpha=-0.5)
        symmetric = of_error + of_error.mT
        gradient = torch.baddbmm(gradient + symmetric, gradient, rotation.error, alpha=-0.5)
        gradient = torch.baddbmm(gradient, truncated, symmetric)
    of_generator = torch.zeros_like(gradient)
    of_square = torch.zeros_like(gradient)
    for partial in reversed(rotation.partials):
        of_generator = torch.add(of_generator, gradient, alpha=2)
        of_square = torch.baddbmm(torch.add(of_square, gradient, alpha=2), gradient, partial.mT)
        gradient = square @ gradient
    if terms % 2 == 0:
        of_generator = of_generator + gradient
    else:
        of_generator = torch.add(of_generator, gradient, alpha=2)
        of_square = of_square + gradient
    # d(Q^2) = dQ Q + Q dQ. Q is skew-symmetric, so both halves have the same skew-symmetric part up to transposition.
    return torch.baddbmm(of_generator, of_square + of_square.mT, generator, alpha=-1)
