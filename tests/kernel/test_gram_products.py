"""Gram products against plain float64 algebra."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.kernel import gram_products
from pome.kernel.gram_products import add_upper, find_eigenvectors, multiply_gram


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(error, to):
    return float(torch.linalg.matrix_norm(error.double()) / torch.linalg.matrix_norm(to.double()))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
def test_a_gram_matrix_is_whole_and_only_its_upper_half_is_read(m, n, seed):
    A = randn(m, n, seed=seed)
    exact = A.double().mT @ A.double()
    assert relative(multiply_gram(A) - exact, exact) < 1e-6
    G = torch.full((n, n), float("nan"))
    step = -(-n // gram_products.BLOCKS)
    for start in range(0, n, step):  # add_upper fills whole blocks; what lies below them must never be read
        G[start : start + step, start:] = 0.0
    add_upper(G, A.mT, A.mT)
    values, vectors = find_eigenvectors(G)
    assert torch.allclose(values.double(), torch.linalg.eigvalsh(exact), atol=1e-5 * float(exact.trace()))
    assert relative(vectors * values @ vectors.mT - exact, exact) < 1e-5
