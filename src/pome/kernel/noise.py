"""Storage rounding: the noise floor that it leaves in a delta, and the share of an edit that it destroys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pome.kernel.operands import show_shape
from pome.kernel.rank import noise_margin
from pome.kernel.spectral_edge import find_edge

CHUNK = 1 << 20  # entries looked at in one go: 8 MiB where they are counted, whatever the size of the tensor
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
HARMONICS = 8  # terms of the Fourier series below; where the first are small the others vanish


@dataclass(frozen=True)
class RoundingGrid:
    """Spacings of the storable numbers around the entries of a matrix, and how many entries have each.

    Zeros and subnormals count with the spacing of the subnormals. `noise_floor` is that of storage_noise_floor.
    """

    ulps: Tensor
    counts: Tensor
    shape: tuple[int, int]
    noise_floor: float

    @property
    def noise_norm(self) -> float:
        """Expected Frobenius norm of the rounding error: rounding to nearest leaves variance ulp^2 / 12 in an entry."""
        return math.sqrt(float((self.counts * self.ulps.square()).sum()) / 12.0)

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


def measure_grid(weight: Tensor) -> RoundingGrid:
    """The grid around the entries of `weight` (m x n, in its storage dtype), read from their exponents.

    Raises ValueError for anything but a non-empty 2-D tensor of floats.
    """
    digits, least = check_floats(weight)
    fields = 2 * (2 - least)  # what the exponent bits can say: 256 in float32 and bfloat16
    counts = torch.zeros(fields, dtype=torch.int64)
    for _, _, bits in split_bits(weight):
        field = bits.bitwise_right_shift(digits).bitwise_and_(fields - 1)
        counts += torch.bincount(field.flatten(), minlength=fields)
    present = counts.nonzero().flatten()
    ulps = torch.exp2((present.clamp_min(1) - 1 + least - digits).double())
    return RoundingGrid(ulps, counts[present], (weight.shape[0], weight.shape[1]), storage_noise_floor(weight))


def storage_noise_floor(weight: Tensor) -> float:
    """Approximate largest singular value of the error with which `weight` (m x n, in its storage dtype) was rounded.

    Outlier rows and columns raise it: see find_edge. Where few entries carry it, it fluctuates by more than the margin
    that count_signal leaves for m x n even entries. The result includes that difference.

    Raises ValueError for anything but a non-empty 2-D tensor of floats.
    """
    digits, least = check_floats(weight)
    m, n = weight.shape
    exponent_bits = (2 * (2 - least) - 1) << digits
    peak = max(abs(float(bound)) for bound in torch.aminmax(weight.detach()))
    top = max(least, math.frexp(peak)[1] - 1) if peak else least
    rows, columns = torch.zeros(2, m, dtype=torch.float64), torch.zeros(2, n, dtype=torch.float64)
    for i, j, bits in split_bits(weight):
        # With the digits masked out a number is the power of two at or below it; ulp is that times 2^-digits.
        power = bits.bitwise_and(exponent_bits).view(weight.dtype).clamp_min_(2.0**least)
        # By the largest, so that squares neither overflow nor vanish unless they make no difference.
        squares = power.to(torch.promote_types(power.dtype, torch.float32)).mul_(2.0**-top).square_().float()
        for at, entries in enumerate((squares, squares.square())):
            rows[at, i : i + bits.shape[0]] += entries.sum(1)
            columns[at, j : j + bits.shape[1]] += entries.sum(0)
    edge, carriers = find_edge(rows, columns)
    return math.ldexp(edge / math.sqrt(12.0), top - digits) * noise_margin(carriers) / noise_margin((m, n))


def check_floats(weight: Tensor) -> tuple[int, int]:
    """(binary digits after the point, exponent of the least normal number) of the dtype of a float matrix."""
    known = weight.is_floating_point() and weight.dtype.itemsize in INTEGERS
    if weight.ndim != 2 or weight.numel() == 0 or not known:
        raise ValueError(f"a noise floor needs a non-empty m x n float tensor, not {show_shape(weight)}")
    kind = torch.finfo(weight.dtype)
    return round(-math.log2(kind.eps)), round(math.log2(kind.smallest_normal))


def split_bits(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The bits of the entries as whole numbers, on the CPU, CHUNK of them at a time, and where each chunk begins."""
    height = max(1, CHUNK // weight.shape[1])
    for i in range(0, weight.shape[0], height):
        for j in range(0, weight.shape[1], CHUNK):
            part = weight.detach()[i : i + height, j : j + CHUNK]
            yield i, j, part.cpu().view(INTEGERS[weight.dtype.itemsize])
