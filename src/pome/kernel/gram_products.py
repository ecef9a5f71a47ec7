"""Products of tall matrices, and no more of them than needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pome.kernel.certificate import draw_gaussian
from pome.kernel.decomposition import Undecided

BLOCKS = 4  # a Gram matrix needs its upper half only: with 4 blocks 5/8 of the product, each still large
ORTHONORMAL = 60.0  # defect of B, in units of rounding, that P may keep: 7e-6 in float32, and the certificate's is 1e-5
INDEPENDENT = 1e-3  # least distance of a unit column from the others' span at which squares in float64 serve float32
ROWS = 1408  # rows of a tall matrix formed or converted at a time


def gram(A: Tensor) -> Tensor:
    """A^T A (n x n) of A (m x n), every entry of it."""
    G = A.new_zeros(A.shape[1], A.shape[1])
    add_upper(G, A.mT, A.mT)
    return mirror(G)


def gram_of_rest(D: Tensor, U: Tensor, F: Tensor) -> Tensor:
    """R^T R (n x n) of R = D - U F, which never exists as a whole."""
    G = D.new_zeros(D.shape[1], D.shape[1])
    rest = D.new_empty(min(ROWS, D.shape[0]), D.shape[1])
    for start in range(0, D.shape[0], ROWS):
        rows = slice(start, min(start + ROWS, D.shape[0]))
        R = torch.addmm(D[rows], U[rows], F, alpha=-1.0, out=rest[: rows.stop - start])
        add_upper(G, R.mT, R.mT)
    return mirror(G)


def add_upper(G: Tensor, X: Tensor, Y: Tensor) -> None:
    """G += X Y^T (all n x n), a symmetric sum, in the blocks at and above the diagonal: those `decompose` reads."""
    step = -(-G.shape[0] // BLOCKS)
    for start in range(0, G.shape[0], step):
        stop = start + step
        G[start:stop, start:].addmm_(X[start:stop], Y[start:].mT)


def mirror(G: Tensor) -> Tensor:
    """Copy the blocks above the diagonal below it, in place."""
    step = -(-G.shape[0] // BLOCKS)
    for start in range(step, G.shape[0], step):
        G[start : start + step, :start] = G[:start, start : start + step].mT
    return G


def decompose(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n, ascending) and eigenvectors (n x n, columns) of a symmetric G, of which the upper half is read:
    MKL was seen to take 4 to 10 % less time for it than for the lower one."""
    values, vectors = torch.linalg.eigh(G, UPLO="U")
    return values, vectors


def orthonormalise(Y: Tensor) -> Tensor:
    """Orthonormal basis (n x b, in the precision of Y) of the columns of Y (n x b), a float32 tensor.

    By a float64 Cholesky factor of their scaled Gram matrix, a third of a QR's time; by QR where they are too near
    dependence for it. The diagonal of the factor tells: a column's distance from the span of those before it.
    """
    wide = widen(Y)
    wide = wide / torch.linalg.vector_norm(wide, dim=0)
    L, failed = torch.linalg.cholesky_ex(wide.mT @ wide)
    if int(failed) or not float(L.diagonal().min()) > INDEPENDENT:  # NaN for a column of zeros
        Q: Tensor = torch.linalg.qr(Y).Q
    else:
        Q = torch.linalg.solve_triangular(L.mT, wide, upper=True, left=False).to(Y)
    return Q


@dataclass(frozen=True)
class Mirrors:
    """H = I - Y T Y^T (n x n, orthogonal): p Householder reflections at once, Y n x p and T p x p, upper triangular
    (Schreiber and Van Loan, 1989). Its first p columns are the given ones, up to signs; the others their complement."""

    Y: Tensor
    T: Tensor

    def apply(self, X: Tensor) -> Tensor:
        """H^T X, n x anything."""
        return X - self.Y @ (self.T.mT @ (self.Y.mT @ X))

    def move(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """Y and Z (n x p) with H^T G H = G - Y Z^T - Z Y^T, for a symmetric G (n x n)."""
        X = G @ (self.Y @ self.T)
        return self.Y, X - self.Y @ (self.T.mT @ (self.Y.mT @ X)) / 2

    def complete(self, Q: Tensor, W: Tensor) -> Tensor:
        """[Q, H W] (n x n), for the columns Q and a W (n - p square) in their complement."""
        n, p = Q.shape
        if not p:
            return W
        V = W.new_empty(n, n)
        V[:, :p], V[:p, p:], V[p:, p:] = Q, 0.0, W
        V[:, p:].addmm_(self.Y, self.T @ (self.Y[p:].mT @ W), alpha=-1.0)
        return V


def reflect(Q: Tensor) -> Mirrors:
    """The reflections that take orthonormal columns Q (n x p) to the first p unit vectors, up to signs."""
    packed, tau = torch.geqrf(widen(Q))
    Y = packed.tril(-1)
    Y.diagonal().fill_(1.0)
    # A column that lies where it should takes no reflection, tau = 0, which has no inverse; turned round, it does.
    tau = torch.where(tau == 0.0, 2.0, tau)
    inverse = (Y.mT @ Y).triu(1) + tau.reciprocal().diag()
    T = torch.linalg.solve_triangular(inverse, torch.eye(len(tau)).to(inverse), upper=True)
    return Mirrors(Y.to(Q), T.to(Q))


def estimate_norm(A: Tensor) -> float:
    """Spectral norm of A (m x n), from below and seen within a tenth: by a short subspace iteration."""
    X = draw_gaussian(A.shape[1], 4, A)
    for _ in range(4):
        X = torch.linalg.qr(A.mT @ (A @ X)).Q
    return float(torch.linalg.matrix_norm(A @ X, 2))


def widen(A: Tensor) -> Tensor:
    """A in float64: where it is, or on the CPU where its device (mps) has no float64."""
    return A.cpu().double() if A.device.type == "mps" else A.double()


def image_of(D: Tensor, V: Tensor) -> Tensor:
    """D V in float64 (m x j) for D (m x n) of any precision and a thin V (n x j)."""
    V = widen(V)
    return torch.cat([widen(rows) @ V for rows in torch.split(D, ROWS)])


def measure_cut(D: Tensor, V: Tensor, sigma: Tensor, k: int) -> None:
    """Set s_k and s_{k+1} to norm(D v) of their directions: the error is that of v, squared."""
    lengths = torch.linalg.vector_norm(image_of(D, V[:, k - 1 : k + 1]), dim=0)
    sigma[k - 1 : k + 1] = lengths.sort(descending=True).values.cpu()


def scaled_image(D: Tensor, V: Tensor, sigma: Tensor) -> Tensor:
    """D V with every column divided by its singular value (m x k, in the precision of D): nearly U."""
    return (D @ V).mul_(sigma.reciprocal().to(D))


def polar(B: Tensor, V: Tensor, sigma: Tensor, flipped: bool, strong: int = 0) -> Tensor:
    """Orthonormal polar factor of D V times V^T, for V (n x k) nearly the leading singular vectors of D (m x n), from
    B = D V / sigma.

    B is nearly orthonormal already. Its defect E = B^T B - I is what the rounding of V mixed in, times the ratio of
    singular values: a rotation d of V makes E_ij = d_ij (s_i^2 - s_j^2) / (s_i s_j). So the factor of D V, which any d
    leaves as it is, is to first order B (I - L) with L_ij = E_ij s_i / (s_i + s_j): of two directions the weaker one
    gives way. The symmetric half of E would be the factor of B, and is off by s_i / (2 s_j) times d. Mostly there is
    nothing to correct but what the `strong` leading directions left in all others, which has only strong rows.
    """
    W, most = V.mT, ORTHONORMAL * torch.finfo(B.dtype).eps
    if measure_defect(B) > most:
        coupling = couple(B, sigma, strong)
        is_enough = 0 < strong < B.shape[1] and measure_defect(B, coupling) <= most
        W = uncouple(coupling, W) if is_enough else correct_root(gram(B), W, sigma)
    return W.mT @ B.mT if flipped else B @ W


Coupling = tuple[Tensor, Tensor]  # the blocks p x (k - p) and (k - p) x p of an L that is zero elsewhere


def couple(B: Tensor, sigma: Tensor, p: int) -> Coupling:
    """What the first p columns of B (m x k) and the others have to give each other."""
    E = B[:, :p].mT @ B[:, p:]
    share = share_of(sigma[:p], sigma[p:]).to(E)
    return E * share, (E * (1.0 - share)).mT


def uncouple(coupling: Coupling, X: Tensor) -> Tensor:
    """(I - L) X."""
    upper, lower = coupling
    return X - torch.cat((upper @ X[len(upper) :], lower @ X[: len(upper)]))


def share_of(s: Tensor, t: Tensor) -> Tensor:
    """s_i / (s_i + t_j)."""
    return s[:, None] / (s[:, None] + t)


def correct_root(C: Tensor, W: Tensor, sigma: Tensor) -> Tensor:
    """T W for the T that `polar` asks for, with C = B^T B (k x k) near the identity: one step of first order after the
    other, each of which squares what is left of E = C - I."""
    share = share_of(sigma, sigma).to(C)
    for _ in range(5):
        E = C.clone()
        E.diagonal().sub_(1.0)
        size = float(torch.linalg.matrix_norm(E))
        if not size < 0.7:
            break
        L = E.mul_(share)
        W = torch.addmm(W, L, W, alpha=-1.0)
        if size**2 < torch.finfo(E.dtype).eps * C.shape[0] ** 0.5:
            return W
        L.diagonal().sub_(1.0)
        C = L.mT @ C @ L
    raise Undecided("the kept directions are not orthogonal enough")


def measure_defect(B: Tensor, coupling: Coupling | None = None) -> float:
    """norm_F(B^T B - I) / sqrt(k), about, for B (m x k), uncoupled first if so, by a few probes."""
    probes = draw_gaussian(B.shape[1], 4, B)
    image = B.mT @ (B @ (probes if coupling is None else uncouple(coupling, probes)))
    image = image if coupling is None else uncouple((coupling[1].mT, coupling[0].mT), image)
    return float(torch.linalg.vector_norm(image - probes) / torch.linalg.vector_norm(probes))
