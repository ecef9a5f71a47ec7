"""What storage rounding does: the noise it leaves in a delta, and what it takes from an edit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 20  # entries looked at in one go: 8 MiB where they are counted, whatever the size of the tensor
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
HARMONICS = 8  # terms of the Fourier series below; where the first are small the others vanish


@dataclass(frozen=True)
class Grid:
    """How far apart the storable numbers lie around the entries of a matrix: spacings, and entries with each.

    Zeros and subnormals count with the spacing of the subnormals.
    """

    ulps: Tensor
    counts: Tensor
    shape: tuple[int, int]

    @property
    def noise_norm(self) -> float:
        """Expected Frobenius norm of the rounding error: rounding to nearest leaves variance ulp^2 / 12 in an entry."""
        return math.sqrt(float((self.counts * self.ulps.square()).sum()) / 12.0)

    @property
    def noise_floor(self) -> float:
        """Largest singular value, about, of the rounding error.

        Noise of mean variance v has norm sqrt(v) * (sqrt(m) + sqrt(n)) (Marchenko and Pastur, 1967; Bai and Yin, 1988).
        """
        m, n = self.shape
        return self.noise_norm * (1.0 / math.sqrt(m) + 1.0 / math.sqrt(n))

    def expect_rounding(self, norm: float, on_grid: bool) -> float:
        """Expected norm_F(stored - exact) / norm for an edit of Frobenius norm `norm` with entries about Gaussian.

        Added to weights that lie on the grid, an edit with entries far below its spacing is lost whole (1.0). With
        s the edit's rms and u the spacing, the error's variance is that of a Gaussian wrapped to one spacing,

            u^2 / 12 + (u / pi)^2 sum_j (-1)^j / j^2 exp(-2 (pi j s / u)^2),

        the Fourier series of its square. Off the grid the error is uniform, u^2 / 12.
        """
        if norm == 0.0:
            return 0.0
        if not on_grid:
            return self.noise_norm / norm
        entries = self.shape[0] * self.shape[1]
        steps = norm / math.sqrt(entries) / self.ulps
        j = torch.arange(1.0, HARMONICS + 1, dtype=torch.float64)[:, None]
        signs = 1.0 - 2.0 * (j % 2.0)
        waves = (signs / j.square() * (-2.0 * (math.pi * j * steps).square()).exp()).sum(0)
        wrapped = self.ulps.square() * (1.0 / 12.0 + waves / math.pi**2)
        # Below a fourteenth of the spacing the series converges slowly, and the whole edit is lost.
        lost = torch.where(steps < 0.07, (norm / math.sqrt(entries)) ** 2, wrapped)
        return math.sqrt(float((self.counts * lost).sum())) / norm


def measure_grid(weight: Tensor) -> Grid:
    """The grid around the entries of `weight` (m x n, in its storage dtype), read from their exponents.

    Raises ValueError for anything but a non-empty 2-D tensor of floats.
    """
    known = weight.is_floating_point() and weight.dtype.itemsize in INTEGERS
    if weight.ndim != 2 or weight.numel() == 0 or not known:
        raise ValueError(f"a noise floor needs a non-empty m x n float tensor, not {describe(weight)}")
    kind = torch.finfo(weight.dtype)
    digits, least = round(-math.log2(kind.eps)), round(math.log2(kind.smallest_normal))
    fields = 2 * (2 - least)  # what the exponent bits can say: 256 in float32 and bfloat16
    counts = torch.zeros(fields, dtype=torch.int64)
    for rows in torch.split(weight.detach(), max(1, CHUNK // weight.shape[1])):
        for part in torch.split(rows, CHUNK, dim=1):
            bits = part.cpu().view(INTEGERS[weight.dtype.itemsize])
            field = bits.bitwise_right_shift(digits).bitwise_and_(fields - 1)
            counts += torch.bincount(field.flatten(), minlength=fields)
    present = counts.nonzero().flatten()
    ulps = torch.exp2((present.clamp_min(1) - 1 + least - digits).double())
    return Grid(ulps, counts[present], (weight.shape[0], weight.shape[1]))


def storage_noise_floor(weight: Tensor) -> float:
    """Largest singular value, about, of the error with which `weight` (m x n, in its storage dtype) was rounded.

    Raises ValueError for anything but a non-empty 2-D tensor of floats.
    """
    return measure_grid(weight).noise_floor


def describe(tensor: Tensor) -> str:
    """`2048 x 768 float32`, for messages."""
    return f"{' x '.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
