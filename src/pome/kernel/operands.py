"""Tensors given to the kernel: what is refused, and powers of two that bring the rest into range."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pome.kernel.decomposition import ZeroDelta

# Entries between these bounds can be squared and summed in float32 without overflow, and without losing the small ones.
LEAST, MOST = 2.0**-30, 2.0**30


def check_matrix(tensor: Tensor, what: str) -> None:
    """Raise ValueError for anything but a non-empty dense m x n tensor of floats."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise ValueError(f"{what} must be a dense tensor, not {type(tensor).__name__}")
    if tensor.ndim != 2 or tensor.numel() == 0 or not tensor.is_floating_point():
        raise ValueError(f"{what} must be a non-empty m x n float tensor, not {show_shape(tensor)}")


def normalise(tensor: Tensor, what: str) -> tuple[Tensor, int]:
    """D and e with tensor = 2^e * D exactly, D in float32 (float64 for float64); D is the tensor itself where possible.

    Raises ValueError for NaN or infinity and ZeroDelta for nothing but zeros, before any decomposition sees them.
    """
    D = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    low, high = torch.aminmax(D)
    largest = max(-float(low), float(high))
    if not (math.isfinite(float(low)) and math.isfinite(float(high))):
        raise ValueError(f"{what} holds NaN or infinity ({show_shape(tensor)})")
    if largest == 0.0:
        raise ZeroDelta(f"{what} is zero in every entry ({show_shape(tensor)})")
    if LEAST <= largest <= MOST:
        return D, 0
    exponent = math.frexp(largest)[1]
    return multiply_power_of_two(D, -exponent), exponent


def multiply_power_of_two(tensor: Tensor, exponent: int) -> Tensor:
    """tensor * 2^exponent, in two steps because that power alone may overflow."""
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half)


def multiply_in_place(P: Tensor, alpha: float) -> Tensor:
    """alpha * P, in place where alpha itself fits the dtype. Raises ValueError where an entry overflows."""
    kind = torch.finfo(P.dtype)
    if kind.smallest_normal <= alpha <= kind.max:
        return P.mul_(alpha)
    value = (P.cpu().double() * alpha).to(P.dtype)
    if not bool(value.isfinite().all()):
        raise ValueError(f"alpha {alpha:.1e} takes the edit out of the range of {show_shape(P)}")
    return value.to(P.device)


def show_shape(tensor: Tensor) -> str:
    """Shape and dtype as in `2048 x 768 float32`, for messages."""
    return f"{' x '.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
