"""Reflectors and orthonormal bases against their definitions."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.kernel.householder import find_reflector, orthonormalise
from support.reference import plant


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(error, to):
    return float(torch.linalg.matrix_norm(error.double()) / torch.linalg.matrix_norm(to.double()))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 24), st.floats(0, 12), st.booleans(), st.integers(0, 999))
def test_a_basis_is_orthonormal_and_spans_the_columns_however_dependent(b, digits, has_zero, seed):
    """From independent columns to those that no float32 can tell apart, where a QR must take over."""
    sigma = torch.logspace(0, -digits, b, dtype=torch.float64)
    Y = plant(sigma, 60, b, seed)
    if has_zero and b > 1:
        Y[:, seed % b] = 0.0
    Q = orthonormalise(Y)
    assert Q.dtype == torch.float32
    assert float(torch.linalg.matrix_norm(Q.double().mT @ Q.double() - torch.eye(b))) < 2e-6 * b**0.5
    assert relative(Y.double() - Q.double() @ (Q.double().mT @ Y.double()), Y) < 2e-6


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 40), st.floats(0, 1), st.sampled_from(["random", "axes", "mixed"]), st.integers(0, 999))
def test_reflections_take_columns_to_the_first_axes_and_the_rest_to_their_complement(n, share, kind, seed):
    p = min(n - 1, int(share * n))
    Q = torch.linalg.qr(randn(n, max(p, 1), seed=seed, dtype=torch.float64)).Q[:, :p]
    if kind != "random":
        Q = torch.eye(n, dtype=torch.float64)[:, torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:p]]
    if kind == "mixed" and p:
        Q[:, -1] = randn(n, seed=seed, dtype=torch.float64)
        Q = torch.linalg.qr(Q).Q
    reflector = find_reflector(Q)
    unit = torch.eye(n, dtype=torch.float64)
    H = reflector.apply_transposed(unit).mT
    assert torch.allclose(H.mT @ H, unit, atol=1e-12)
    assert torch.allclose(H[:, :p].abs(), Q.abs(), atol=1e-12)
    assert torch.allclose((H[:, :p].mT @ Q).abs(), unit[:p, :p], atol=1e-12)
    G = randn(n, n, seed=seed + 1, dtype=torch.float64)
    G = G + G.mT
    left, right = reflector.conjugate(G)
    assert torch.allclose(G - left @ right.mT - right @ left.mT, H.mT @ G @ H, atol=1e-11)
    W = torch.linalg.qr(randn(n - p, n - p, seed=seed + 2, dtype=torch.float64)).Q
    assert torch.allclose(reflector.complete_basis(Q, W), torch.cat((Q, H[:, p:] @ W), 1), atol=1e-12)
