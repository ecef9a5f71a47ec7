"""Certificates of right and wrong answers."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.kernel import ladder
from pome.kernel.certificate import Certificate, certify, certify_factored, inner_dense
from pome.kernel.equalize import prove_product
from support.recipes import make_rule
from support.reference import plant


@pytest.mark.parametrize("wrong", ["left", "right", "directions"])
def test_wrong_factors_fail_the_certificate(wrong):
    b, a = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((300, 12), (12, 150)))
    kept = ladder.solve_factors(b, a, make_rule())
    left, right = kept.factors
    if wrong == "left":
        left = left * 1.0001
    elif wrong == "right":
        right = torch.roll(right, 1, 0) + 1e-4 * right
    else:
        left, right = torch.linalg.qr(b).Q[:, :6], torch.linalg.qr(a.T).Q.T[:6]
    assert prove_product(b, a, dataclasses.replace(kept, P=left @ right, factors=(left, right))).find_fault()


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
    proof = certify_factored(P, left, right, k, 2.0, b, a)
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
    proof = certify(P, min(m, n), 2.0, inner_dense(delta))
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
    proof = certify_factored(left @ right + d, left, right, k, float(k), b, a)
    assert proof.orthogonality == pytest.approx(3 * size / math.sqrt(k), rel=0.3)
    assert (proof.orthogonality <= 1e-5) == (proof.find_fault() is None) == (size < 1e-6)


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_the_factored_certificate_of_factors_of_another_length(strength):
    """Norm, objective and defect of s P are s sqrt(k), s and |s^2 - 1|."""
    left, right = (plant(torch.ones(4), *shape, 3, torch.float64) for shape in ((30, 4), (4, 20)))
    proof = certify_factored(strength * left @ right, strength * left, right, 4, 4.0, left, right)
    assert proof.norm == pytest.approx(2 * strength, rel=1e-12)
    assert proof.objective == pytest.approx(strength, rel=1e-12)
    assert proof.orthogonality == pytest.approx(abs(strength**2 - 1), rel=1e-12)


def test_a_product_of_zeros_has_no_certificate():
    left, right = torch.zeros(30, 4), torch.zeros(4, 20)
    for proof in (
        certify_factored(left @ right, left, right, 4, 1.0, left, right),
        certify(left @ right, 4, 1.0, inner_dense(left @ right)),
    ):
        assert proof.norm == 0.0 and math.isnan(proof.orthogonality) and proof.find_fault()


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
