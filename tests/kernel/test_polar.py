"""The polar factor and its corrections against a float64 decomposition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.kernel import polar
from pome.kernel.polar import apply_correction, correct_by_newton, find_correction_blocks, multiply_polar, scaled_image
from support.reference import plant


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(error, to):
    return float(torch.linalg.matrix_norm(error.double()) / torch.linalg.matrix_norm(to.double()))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 30), st.floats(1e-6, 1e-3), st.floats(2, 1e4), st.integers(0, 99))
def test_uncoupling_leaves_the_polar_factor_of_the_image_to_first_order(p, rest, size, ratio, seed):
    k = p + rest
    """What a small rotation of the singular vectors mixes into D V / sigma is taken out of it, and not the rotation."""
    s = torch.cat((torch.linspace(ratio, ratio / 2, p), torch.linspace(1.0, 0.3, rest))).double()
    turn = torch.zeros(k, k, dtype=torch.float64)
    turn[:p, p:] = randn(p, rest, seed=seed, dtype=torch.float64)
    turn *= size / ratio / torch.linalg.matrix_norm(turn, 2)
    R = torch.linalg.matrix_exp(turn - turn.mT)
    U = torch.linalg.qr(randn(k + 5, k, seed=seed + 1, dtype=torch.float64)).Q
    image = U * s @ R  # D V of the rotated V, whose polar factor is U R
    B = image / s
    found = B @ apply_correction(find_correction_blocks(B, s, p), torch.eye(k, dtype=torch.float64))
    assert float(torch.linalg.matrix_norm(found - U @ R, 2)) < 20 * size**2


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("leak, is_thin", [(2e-4, True), (2e-2, False)])
def test_a_polar_factor_is_corrected_by_as_much_as_it_takes(monkeypatch, flipped, leak, is_thin):
    """Strong directions that leaked into the others, by a little and by more than a first-order correction mends."""
    sigma = torch.cat((torch.full((4,), 100.0), torch.linspace(2.0, 1.0, 76))).double()
    D = plant(sigma, 300, 80)
    _, s, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    V = Vh[:40].mT.clone()
    V[:, 4:] += leak / 100.0 * V[:, :4] @ randn(4, 36, dtype=torch.float64)
    U, _, W = torch.linalg.svd(D.double() @ V, full_matrices=False)
    taken = []
    monkeypatch.setattr(polar, "correct_by_newton", lambda *given: taken.append("newton") or correct_by_newton(*given))
    P = multiply_polar(scaled_image(D, V.float(), s[:40]), V.float(), s[:40], flipped, strong=4)
    assert taken == ([] if is_thin else ["newton"])
    expected = U @ W @ V.mT
    # Of the second order in the leak; P must be known to 1e-4.
    assert relative((P.mT if flipped else P) - expected, expected) < 3e-6 + leak**2 / 2
