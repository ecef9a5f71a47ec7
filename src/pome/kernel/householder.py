"""Householder block reflectors, and an orthonormal basis by Cholesky factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pome.kernel.precision import to_float64

INDEPENDENT = 1e-3  # least distance of a unit column from the others' span at which squares in float64 serve float32


def orthonormalise(Y: Tensor) -> Tensor:
    """Orthonormal basis (n x b, in the precision of Y) of the columns of Y (n x b), a float32 tensor.

    By a float64 Cholesky factor of their scaled Gram matrix, a third of a QR's time; by QR where they are too near
    dependence for it. The diagonal of the factor tells: a column's distance from the span of those before it.
    """
    exact = to_float64(Y)
    exact = exact / torch.linalg.vector_norm(exact, dim=0)
    L, failed = torch.linalg.cholesky_ex(exact.mT @ exact)
    if int(failed) or not float(L.diagonal().min()) > INDEPENDENT:  # NaN for a column of zeros
        Q: Tensor = torch.linalg.qr(Y).Q
    else:
        Q = torch.linalg.solve_triangular(L.mT, exact, upper=True, left=False).to(Y)
    return Q


@dataclass(frozen=True)
class BlockReflector:
    """Product of p Householder reflections, H = I - Y T Y^T (n x n, orthogonal), in its compact WY form.

    Y is n x p, T p x p and upper triangular: Schreiber and Van Loan, "A storage-efficient WY representation for
    products of Householder transformations", SIAM J. Sci. Stat. Comput. 10(1), 1989. The first p columns of H are the
    ones it was made from, up to signs; the others span their orthogonal complement.
    """

    Y: Tensor
    T: Tensor

    def apply_transposed(self, X: Tensor) -> Tensor:
        """H^T X, for X with n rows."""
        return X - self.Y @ (self.T.mT @ (self.Y.mT @ X))

    def conjugate(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """Y and Z (n x p) with H^T G H = G - Y Z^T - Z Y^T, for a symmetric G (n x n)."""
        X = G @ (self.Y @ self.T)
        return self.Y, X - self.Y @ (self.T.mT @ (self.Y.mT @ X)) / 2

    def complete_basis(self, Q: Tensor, W: Tensor) -> Tensor:
        """Orthonormal basis [Q, H W] (n x (p + j)) from its columns Q and a W (n - p x j) in their complement."""
        n, p = Q.shape
        if not p:
            return W
        V = W.new_empty(n, p + W.shape[1])
        V[:, :p], V[:p, p:], V[p:, p:] = Q, 0.0, W
        V[:, p:].addmm_(self.Y, self.T @ (self.Y[p:].mT @ W), alpha=-1.0)
        return V


def find_reflector(Q: Tensor) -> BlockReflector:
    """Block reflector that takes orthonormal columns Q (n x p) to the first p unit vectors, up to signs."""
    packed, tau = torch.geqrf(to_float64(Q))
    Y = packed.tril(-1)
    Y.diagonal().fill_(1.0)
    # A column that is a unit vector already takes no reflection: tau = 0, which has no inverse. tau = 2 turns its sign.
    tau = torch.where(tau == 0.0, 2.0, tau)
    inverse = (Y.mT @ Y).triu(1) + tau.reciprocal().diag()
    T = torch.linalg.solve_triangular(inverse, torch.eye(len(tau)).to(inverse), upper=True)
    return BlockReflector(Y.to(Q), T.to(Q))
