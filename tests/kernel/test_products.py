"""The kernel's products against plain float64 algebra, and the cut that float32 would have blurred."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.kernel import gram_products, polar
from pome.kernel.decomposition import Undecided
from pome.kernel.equalize import equalize
from pome.kernel.gram_products import add_upper, find_eigenvectors, multiply_gram
from pome.kernel.householder import find_reflector, orthonormalise
from pome.kernel.polar import (
    apply_correction,
    correct_by_newton,
    find_correction_blocks,
    multiply_polar,
    scaled_image,
)
from pome.kernel.solvers.deflated import solve_deflated
from support.recipes import make_rule
from support.reference import plant


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


@pytest.mark.parametrize("spikes, height", [(110, 40.0), (150, 300.0), (150, 3000.0)])
def test_more_strong_directions_than_any_sketch_holds_cost_no_accuracy(spikes, height):
    """What is then squared with them drowns; where the cut is open, no angle tells, but the objective does."""
    m, n = 640, 500
    sigma = torch.cat((torch.linspace(1.3, 1.0, spikes) * height, torch.linspace(1.3, 1.0, n - spikes))).double()
    D = plant(sigma, m, n, seed=spikes)
    edited = equalize(D)
    s = torch.linalg.svdvals(D.double())
    P = edited.value.double() / edited.alpha
    assert abs(1 - float((D.double() * P).sum() / s[: edited.k].sum())) < 1e-5
    # Within a cluster s_k is known to its width only; what the loss that is let through leaves was 9e-5 at most.
    assert edited.sigma_k == pytest.approx(float(s[edited.k - 1]), rel=2e-4)
    assert abs(1 - edited.objective) < 1e-5


@pytest.mark.parametrize("shape, fall", [((1200, 900), 100), ((400, 300), 30), ((1500, 750), 80)])
def test_weak_directions_kept_beside_strong_ones_are_the_references(shape, fall):
    """A steep fall to a flat end, all of it kept: no cut at all, so the data determine P."""
    n = min(shape)
    sigma = torch.exp(-torch.arange(n, dtype=torch.float64) / fall) + 1.5e-3
    D = plant(0.1 * sigma, *shape)
    edited = equalize(D, rank_ratio=1.0)
    U, s, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    assert edited.solver == "deflated-float32"
    assert relative(edited.value.double() / edited.alpha - U @ Vh, U) < 1e-4  # as promised; 1.3e-3 without the weights
    # Float32 squares know s^2 to some 1e-8 of the largest, which is 600 times the last one.
    assert edited.sigma_k == pytest.approx(float(s[-1]), rel=5e-3)


def test_an_open_cut_that_float32_blurs_is_handed_over():
    sigma = torch.cat((torch.linspace(390.0, 300.0, 150), torch.linspace(1.3, 1.0, 350))).double()
    with pytest.raises(Undecided, match="is known to .* only"):
        solve_deflated(plant(sigma, 640, 500, seed=1), make_rule())
