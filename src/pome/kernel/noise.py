"""What storage rounding alone puts into a delta: the largest singular value of its noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 1 << 20  # entries looked at in one go, whatever the size of the tensor
# Of each dtype: the integer of its width, the bits of its mantissa, the bits of its exponent.
LAYOUT = {
    torch.float64: (torch.int64, 52, 11),
    torch.float32: (torch.int32, 23, 8),
    torch.bfloat16: (torch.int16, 7, 8),
    torch.float16: (torch.int16, 10, 5),
}


def storage_noise_floor(weight: Tensor) -> float:
    """Largest singular value, about, of the error with which `weight` (m x n, in its storage dtype) was rounded.

    Rounding to nearest leaves an error of variance ulp^2 / 12 in each entry, ulp the unit in the last place at that
    entry's own exponent. Noise of mean variance v has norm sqrt(v) * (sqrt(m) + sqrt(n)) (Marchenko and Pastur, 1967;
    Bai and Yin, 1988). Zeros count with the ulp of a subnormal. Raises ValueError for anything but a non-empty 2-D
    tensor of floats.
    """
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"a noise floor needs a non-empty m x n float tensor, not {describe(weight)}")
    integer, mantissa, width = LAYOUT[weight.dtype]
    counts = torch.zeros(1 << width, dtype=torch.int64)
    for chunk in torch.split(weight.detach().cpu().reshape(-1), CHUNK):
        exponent = (chunk.view(integer) >> mantissa) & ((1 << width) - 1)
        counts += torch.bincount(exponent, minlength=1 << width)
    # ulp = 2^(e - bias - mantissa); subnormals have the ulp of the least normal exponent, e = 1.
    present = counts.nonzero()[:, 0]  # the ulp of exponents that do not occur may overflow
    ulp = torch.exp2(present.double().clamp_min(1.0) - float((1 << (width - 1)) - 1 + mantissa))
    variance = float((counts[present] * ulp.square()).sum()) / weight.numel() / 12.0
    m, n = weight.shape
    return math.sqrt(variance) * (math.sqrt(m) + math.sqrt(n))


def describe(tensor: Tensor) -> str:
    """`2048 x 768 float32`, for messages."""
    return f"{' x '.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
