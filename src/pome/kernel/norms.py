"""Inner products, Frobenius and spectral norms of large matrices, and the seeded Gaussian probes that estimate them."""

from __future__ import annotations

import torch
from torch import Tensor

from pome.kernel.precision import to_float64

SEED = 20251006
BLOCK = 1 << 17  # entries looked at in one go: they stay in the cache
# Equal addends are rounded in one direction. MKL on an AMD EPYC adds them one after the other, in `addmm` to what is
# there already: 150,000 of them were off by 7e-4 in float32, 256 are by 2e-6.
ADDENDS = 256


def dot(left: Tensor, right: Tensor) -> float:
    """Inner product of two matrices of one shape, in the tensors' own precision: for a block, not for a matrix.

    By `sum`, which adds pairwise: good to 2e-7 in float32. A running sum (`torch.dot`) of a block of equal entries is
    rounded in one direction each time, and was seen to be off by 1e-5.
    """
    return float((left * right).sum())


def squared_norm(matrix: Tensor) -> float:
    """Squared Frobenius norm, summed over blocks of rows in double precision."""
    return sum(dot(matrix[rows], matrix[rows]) for rows in split_rows(matrix))


def split_rows(matrix: Tensor) -> list[slice]:
    """Blocks of rows that stay in a CPU's cache; an accelerator is better off with few large ones."""
    entries = BLOCK if matrix.device.type == "cpu" else 512 * BLOCK
    step = max(1, entries // matrix.shape[1])
    return [slice(start, start + step) for start in range(0, matrix.shape[0], step)]


def multiply_thin(A: Tensor, X: Tensor) -> Tensor:
    """A X (m x s) for A (m x n) and a thin X (n x s): products of at most ADDENDS columns of A, added in float64.

    They are taken as X^T A^T: for the transpose of a large matrix that was seen to be four times as fast.
    """
    total = to_float64(X.new_zeros(X.shape[1], A.shape[0]))
    for start in range(0, A.shape[1], ADDENDS):
        some = slice(start, start + ADDENDS)
        total += to_float64(X[some].mT @ A[:, some].mT)
    return total.mT.to(X)


def draw_gaussian(rows: int, columns: int, like: Tensor, stream: int = 0) -> Tensor:
    """Seeded Gaussian matrix (rows x columns) in the dtype and on the device of `like`.

    The same numbers on every device and in every call, drawn without touching the global generator. Those of another
    `stream` are independent.
    """
    generator = torch.Generator(device="cpu").manual_seed(SEED + stream)
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(like.device, like.dtype)


def estimate_spectral_norm(A: Tensor) -> float:
    """Estimate of the spectral norm of A (m x n) by a short subspace iteration: a lower bound, seen within a tenth."""
    X = draw_gaussian(A.shape[1], 4, A)
    for _ in range(4):
        X = torch.linalg.qr(A.mT @ (A @ X)).Q
    return float(torch.linalg.matrix_norm(A @ X, 2))
