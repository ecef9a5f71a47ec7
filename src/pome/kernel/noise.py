"""What storage rounding alone puts into a delta: the largest singular value of its noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 1 << 20  # entries looked at in one go: 8 MiB in float64, whatever the size of the tensor


def storage_noise_floor(weight: Tensor) -> float:
    """Largest singular value, about, of the error with which `weight` (m x n, in its storage dtype) was rounded.

    Rounding to nearest leaves an error of variance ulp^2 / 12 in each entry, ulp the unit in the last place at that
    entry's own exponent. Noise of mean variance v has norm sqrt(v) * (sqrt(m) + sqrt(n)) (Marchenko and Pastur, 1967;
    Bai and Yin, 1988). Zeros count with the ulp of a subnormal. Raises ValueError for anything but a non-empty 2-D
    tensor of floats.
    """
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"a noise floor needs a non-empty m x n float tensor, not {describe(weight)}")
    kind = torch.finfo(weight.dtype)
    digits, least = round(-math.log2(kind.eps)), round(math.log2(kind.smallest_normal))
    m, n = weight.shape
    total = 0.0
    for rows in torch.split(weight.detach(), max(1, CHUNK // n)):
        for part in torch.split(rows, CHUNK, dim=1):
            wide = part.to("cpu", torch.float64)
            exponent = (torch.frexp(wide).exponent - 1).clamp_min(least)
            exponent[wide == 0] = least
            present, counts = torch.unique(exponent, return_counts=True)
            total += sum(c * 4.0 ** (e - digits) for e, c in zip(present.tolist(), counts.tolist(), strict=True))
    return math.sqrt(total / weight.numel() / 12.0) * (math.sqrt(m) + math.sqrt(n))


def describe(tensor: Tensor) -> str:
    """`2048 x 768 float32`, for messages."""
    return f"{' x '.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
