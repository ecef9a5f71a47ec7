"""Certificates of right and wrong answers."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.kernel import ladder
from pome.kernel.certificate import Certificate, certify, certify_factored
from pome.kernel.decomposition import Truncation
from pome.kernel.equalize import prove_product
from support.recipes import make_rule
from support.reference import plant


def claim(M, k, attainable, factors=None):
    """A truncation that says that M has k directions of equal singular values, which sum up to `attainable`."""
    sigma = torch.full((k,), attainable / k, dtype=torch.float64)
    return Truncation(M, sigma, k, k, 0.0, 0.0, factors, factors is not None)


@pytest.mark.parametrize("wrong", ["left", "right", "directions"])
def test_wrong_factors_fail_the_certificate(wrong):
    b, a = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((300, 12), (12, 150)))
    kept = ladder.solve_factors(b, a, make_rule())
    left, right = kept.isometry
    if wrong == "left":
        left = left * 1.0001
    elif wrong == "right":
        right = torch.roll(right, 1, 0) + 1e-4 * right
    else:
        left, right = torch.linalg.qr(b).Q[:, :6], torch.linalg.qr(a.T).Q.T[:6]
    assert prove_product(b, a, dataclasses.replace(kept, M=left @ right, isometry=(left, right))).find_fault()


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    k=st.integers(1, 9),
    size=st.floats(1e-4, 1e-1),
    seed=st.integers(0, 99),
)
def test_the_factored_certificate_measures_what_it_says(m, n, k, size, seed):
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n, k)
    left, right = (plant(torch.ones(k), *shape, seed, torch.float64) for shape in ((m, k), (k, n)))
    left += size * torch.randn(m, k, generator=generator, dtype=torch.float64) / math.sqrt(m)
    b, a = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, 3), (3, n)))
    P = left @ right
    proof = certify_factored(claim(P, k, 2.0, (left, right)), b, a)
    assert proof.norm == pytest.approx(float(P.norm()), rel=1e-9)
    assert proof.objective == pytest.approx(float((b @ a * P).sum()) / 2.0, rel=1e-9, abs=1e-12)
    assert proof.orthogonality == pytest.approx(float((P @ P.T @ P - P).norm() / P.norm()), rel=1e-6, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 60), n=st.integers(1, 60), size=st.floats(1e-6, 1e-1), seed=st.integers(0, 2**16))
def test_probes_estimate_the_orthogonality(m, n, size, seed):
    generator = torch.Generator().manual_seed(seed)
    P = plant(torch.ones(min(m, n)), m, n, seed, torch.float64)
    P += size * torch.randn(m, n, generator=generator, dtype=torch.float64) / math.sqrt(max(m, n))
    delta = torch.randn(m, n, generator=generator, dtype=torch.float64)
    proof = certify(claim(P, min(m, n), 2.0), (delta,))
    assert proof.norm == pytest.approx(float(P.norm()), rel=1e-12)
    assert proof.objective == pytest.approx(float((delta * P).sum()) / 2.0, rel=1e-9, abs=1e-12)
    true = float((P @ P.T @ P - P).norm() / P.norm())
    # 8 Gaussian probes: chi-square of 8 degrees in the worst case, within these factors in all but 1e-5 of the draws
    assert true / 6 <= proof.orthogonality <= 2.5 * true
    if min(m, n) <= 8:
        assert proof.orthogonality == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("size", [1e-7, 1e-4, 1e-2])
def test_the_factored_certificate_adds_what_sets_a_product_apart_from_its_factors(size):
    """A difference d between P and L R adds at most 3 norm(d) to the defect. Eight probes estimate norm(d) within this
    factor in all but 1e-5 of the draws."""
    m, n, k = 50, 40, 5
    left, right = (plant(torch.ones(k), *shape, 3, torch.float64) for shape in ((m, k), (k, n)))
    d = torch.randn(m, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    d *= size / float(d.norm())
    b, a = left, right
    proof = certify_factored(claim(left @ right + d, k, float(k), (left, right)), b, a)
    assert proof.orthogonality == pytest.approx(3 * size / math.sqrt(k), rel=0.3)
    assert (proof.orthogonality <= 1e-5) == (proof.find_fault() is None) == (size < 1e-6)


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_the_factored_certificate_of_factors_of_another_length(strength):
    """Norm, objective and defect of s P are s sqrt(k), s and |s^2 - 1|."""
    left, right = (plant(torch.ones(4), *shape, 3, torch.float64) for shape in ((30, 4), (4, 20)))
    proof = certify_factored(claim(strength * left @ right, 4, 4.0, (strength * left, right)), left, right)
    assert proof.norm == pytest.approx(2 * strength, rel=1e-12)
    assert proof.objective == pytest.approx(strength, rel=1e-12)
    assert proof.orthogonality == pytest.approx(abs(strength**2 - 1), rel=1e-12)


def test_a_product_of_zeros_has_no_certificate():
    left, right = torch.zeros(30, 4), torch.zeros(4, 20)
    for proof in (
        certify_factored(claim(left @ right, 4, 1.0, (left, right)), left, right),
        certify(claim(left @ right, 4, 1.0), (left @ right,)),
    ):
        assert proof.norm == 0.0 and math.isnan(proof.orthogonality) and proof.find_fault()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (6, 30), (30, 6), (5, 4)], ids=str)
def test_a_certificate_measures_the_asymmetry_that_another_matrix_has(shape, power):
    """norm(M^T D - D^T M) / norm(M^T D) of an M whose right singular vectors are turned against those of D."""
    m, n = shape
    k = min(m, n) // 2
    s = torch.linspace(2.0, 1.0, min(m, n), dtype=torch.float64)
    D = plant(s, m, n, 1, torch.float64)
    U, _, Vh = torch.linalg.svd(D, full_matrices=False)
    turn = 1e-3 * torch.randn(n, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    R = torch.linalg.matrix_exp(turn - turn.mT)
    weights = (s[:k] / s[0]) ** power
    left, right = U[:, :k], Vh[:k] @ R
    M = (left * weights) @ right
    true = float((M.mT @ D - D.mT @ M).norm() / (s[:k] * weights).norm())
    b, a = U * s, Vh
    dense = certify(Truncation(M, s, len(s), k, 0.0, power, (left, right)), (D,)).residual
    product = certify(Truncation(M, s, len(s), k, 0.0, power, (left, right)), (b, a)).residual
    factored = certify_factored(Truncation(M, s, len(s), k, 0.0, power, (left, right), is_product=True), b, a).residual
    assert product == pytest.approx(dense, rel=1e-9)
    if n <= 8:
        assert dense == pytest.approx(true, rel=1e-9)
    for measured in (dense, factored):  # within these factors eight probes are in all but 1e-5 of the draws
        assert true / 6 <= measured <= 2.5 * true


@pytest.mark.parametrize(
    ("numbers", "fault"),
    [
        ((1.0, 0.0, 2.0, 4.0 * (1 + 0.9e-5), 0.9e-5), None),
        ((1.0, 0.0, 2.0, 4.0 * (1 - 0.9e-5), 0.9e-5), None),
        ((1.0, 0.0, 2.0, 4.0 * (1 + 1.1e-5), 0.0), "squared norm 4 instead of 4.00004"),
        ((1.0, 0.0, 2.0, 4.0 * (1 - 1.1e-5), 0.0), "squared norm 4 instead of 3.99996"),
        ((1.0, 0.0, 2.0, 4.0, 1.1e-5), "power residual 1.1e-05"),
        ((1.0, 0.0, 2.0, 4.0, math.nan), "power residual nan"),
        ((1.0, 0.0, math.nan, 4.0, 0.0), "squared norm nan instead of 4"),
    ],
)
def test_the_certificate_of_a_power_holds_norm_and_residual_to_their_bounds(numbers, fault):
    assert Certificate(*numbers, power=0.5).find_fault() == fault


@pytest.mark.parametrize(
    ("numbers", "fault"),
    [
        ((1.0 - 0.9e-5, 0.9e-5, 2.0), None),
        ((1.0 + 0.9e-5, 0.9e-5, 2.0), None),
        ((1.0 - 1.1e-5, 0.0, 2.0), "1 - objective 1.1e-05"),
        ((1.0 + 1.1e-5, 0.0, 2.0), "1 - objective -1.1e-05"),
        ((1.0, 1.1e-5, 2.0), "orthogonality 1.1e-05"),
        ((1.0, 0.0, math.sqrt(4.49)), None),
        ((1.0, 0.0, math.sqrt(4.51)), "4.51 directions instead of 4"),
        ((1.0, 0.0, math.sqrt(3.49)), "3.49 directions instead of 4"),
        ((math.nan, 0.0, 2.0), "1 - objective nan"),
        ((1.0, math.nan, 2.0), "orthogonality nan"),
    ],
)
def test_the_certificate_holds_each_number_to_its_bound(numbers, fault):
    assert Certificate(*numbers, 4).find_fault() == fault
