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
    partials: tuple[Tensor, ...]  # partial results T of Horner's rule, each as T + 2 I
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

    Horner's rule in A = Q^2, T <- 2 Q + A (T + 2 I), needs 1 + terms // 2 products. `correct` adds one Newton-Schulz
    step, R <- R (3 I - R^T R) / 2, which takes an eigenvalue of absolute value 1 - d to 1 - 3/2 d^2. The exact
    transform needs no such step.
    """
    if terms == "exact":
        identity = torch.eye(generator.shape[-1], dtype=generator.dtype, device=generator.device)
        value = torch.linalg.solve(identity - generator, 2 * generator)
        return Cayley(value, generator, generator, (), value, None)
    square = generator @ generator
    partial = generator if terms % 2 == 0 else torch.add(square, generator, alpha=2)
    partials = []
    for _ in range(terms // 2):
        shifted = partial + 2 * torch.eye(partial.shape[-1], dtype=partial.dtype, device=partial.device)
        partials.append(shifted)
        partial = torch.baddbmm(generator, square, shifted, beta=2)
    if not correct:
        return Cayley(partial, generator, square, tuple(partials), partial, None)
    error = orthogonality_error(partial)
    # In-place products spare a copy of every block; they take a good part of the time otherwise.
    value = torch.add(partial, error, alpha=-0.5).baddbmm_(partial, error, alpha=-0.5)
    return Cayley(value, generator, square, tuple(partials), partial, error)


def orthogonality_error(value: Tensor) -> Tensor:
    """R^T R - I for R = I + E, (blocks, b, b), without forming R: E + E^T + E^T E."""
    return (value + value.mT).baddbmm_(value.mT, value)


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
        gradient = torch.add(gradient, symmetric).baddbmm_(gradient, rotation.error, alpha=-0.5)
        gradient = gradient.baddbmm_(truncated, symmetric)
    of_square: Tensor | None = None
    of_generator: Tensor | None = None
    for shifted in reversed(rotation.partials):
        of_generator = gradient if of_generator is None else of_generator + gradient
        product = gradient @ shifted.mT
        of_square = product if of_square is None else of_square.add_(product)
        gradient = square @ gradient
    # What is left belongs to the first T, which is Q or 2 Q + Q^2.
    if terms % 2:
        of_square = gradient if of_square is None else of_square.add_(gradient)
        of_generator = 2 * (gradient if of_generator is None else of_generator + gradient)
    else:
        of_generator = gradient if of_generator is None else torch.add(gradient, of_generator, alpha=2)
    if of_square is None:
        return of_generator
    # d(Q^2) = dQ Q + Q dQ. Q is skew-symmetric, so both halves have the same skew-symmetric part up to transposition.
    return torch.baddbmm(of_generator, of_square + of_square.mT, generator, alpha=-1)
