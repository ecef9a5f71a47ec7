"""Powers of the singular values against a float64 decomposition, over spectra, shapes, dtypes and rungs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.kernel import polar, power
from pome.kernel.certificate import certify
from pome.kernel.equalize import equalize, equalize_matrix, equalize_product
from pome.kernel.ladder import RUNGS
from pome.kernel.power import correct_power, multiply_power, weigh_directions
from pome.kernel.scale import KeptSpectrum, find_gain
from support.deltas import KINDS, make_delta
from support.recipes import make_recipe, make_rule
from support.reference import assert_as_reference, plant, reference_edit

POWERS = [0.0, 0.25, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("p", POWERS)
@settings(deadline=None, max_examples=12)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(96, 260),
    n=st.integers(96, 260),
    ratio=st.sampled_from([0.05, 0.25, 0.5, 0.75, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_the_ladder_agrees_with_the_reference_at_every_power(p, kind, m, n, ratio, seed):
    delta = make_delta(kind, m, n, seed)
    assert_as_reference(equalize(delta, rank_ratio=ratio, power=p), delta, rank_ratio=ratio, power=p)


@pytest.mark.parametrize("p", POWERS)
@settings(deadline=None, max_examples=20)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_small_matrices_of_every_dtype_agree_with_the_reference(p, m, n, kind, dtype, seed):
    delta = make_delta(kind, m, n, seed).to(dtype)
    if bool(delta.any()):
        assert_as_reference(equalize(delta, power=p), delta, power=p)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(("name", "solve"), RUNGS)
@pytest.mark.parametrize("kind", ["noise", "inverse", "strong", "rounded-lora", "deficient"])
@pytest.mark.parametrize("shape", [(420, 160), (160, 420)], ids=str)
def test_each_rung_alone_gives_every_power(name, solve, p, kind, shape):
    delta = make_delta(kind, *shape, 5)
    found, wanted = solve(delta, make_rule(), power=p), reference_edit(delta, power=p)
    M = found.M.double() * float(wanted.value.norm())
    M /= float(found.weights.norm())
    assert float((M - wanted.value).norm() / wanted.value.norm()) <= 1e-4  # as at p = 0
    assert certify(found, (delta,)).find_fault() is None
    if p:
        left, right = found.isometry
        isometry = reference_edit(delta)
        scale = math.sqrt(found.k) / float(isometry.value.norm())
        assert float((left.double() @ right.double() - scale * isometry.value).norm()) <= 1e-4 * math.sqrt(found.k)


@pytest.mark.parametrize("ratio", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["inverse", "inverse-root", "strong", "gentle", "rounded-lora", "noise"])
def test_power_one_with_scale_unit_is_the_best_approximation(kind, ratio):
    delta = make_delta(kind, 300, 200, 1)
    edit = equalize(delta, rank_ratio=ratio, power=1.0, scale="unit")
    U, s, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    best = (U[:, : edit.k] * s[: edit.k]) @ Vh[: edit.k]
    assert edit.alpha == pytest.approx(1.0, rel=1e-12)
    if float(s[edit.k - 1] - s[edit.k]) > 1e-3 * float(s[edit.k - 1]):
        assert float((edit.value.double() - best).norm()) <= 1e-4 * float(best.norm())  # as at every power
    assert edit.edit_norm == pytest.approx(float(best.norm()), rel=1e-5)


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("kind", KINDS)
def test_truncation_is_as_near_to_the_delta_as_any_matrix_of_its_rank(kind, ratio):
    """Eckart and Young, to 1e-5, on every spectrum, ties at the cut included.

    The theorem is about the distance, and only that is meant. The entries of the best approximation depend on the gap
    at the cut: rounding turns a kept direction by a small angle t towards a dropped one, with t about 1e-7 over the
    relative gap. The entries move by t, which is 1e-5 and more where the gap is below 1e-2, and by everything where
    there is no gap and the best approximation is not unique. The distance grows by t^2 times the gap.
    """
    delta = make_delta(kind, 300, 200, 1)
    edit = equalize(delta, rank_ratio=ratio, power=1.0, scale="unit")
    squares = torch.linalg.svdvals(delta.double()).square()
    missed = float((delta.double() - edit.value.double()).square().sum())
    # 1e-7 of all energy: where little is missed, a cluster at the cut is known to 2e-5 of that; elsewhere it is 1e-8.
    assert missed == pytest.approx(float(squares[edit.k :].sum()), rel=1e-5, abs=1e-7 * float(squares.sum()))


@pytest.mark.parametrize("kind", ["inverse", "strong", "noise", "clusters", "spike"])
def test_power_one_with_all_directions_gives_the_delta_back(kind):
    delta = make_delta(kind, 250, 130, 2)
    edit = equalize(delta, rank_ratio=1.0, power=1.0, scale="unit")
    # 3e-6: two float32 products, whose rounding partly averages out; what lies below the rank is 1e-7 of the rest.
    assert float((edit.value - delta).norm() / delta.norm()) <= 3e-6


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@settings(deadline=None, max_examples=15)
@given(m=st.integers(1, 80), n=st.integers(1, 80), r=st.integers(1, 30), seed=st.integers(0, 999))
def test_factors_give_what_their_product_gives_at_every_power(p, m, n, r, seed):
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
    edit = equalize_product(b, a, make_recipe(power=p))
    wanted = reference_edit(b.double() @ a.double(), power=p)
    assert edit.solver == "factors" and (edit.rank, edit.k) == (wanted.rank, wanted.k)
    assert max(abs(1 - edit.objective), edit.orthogonality, edit.power_residual) <= 1e-5
    s_next = float(wanted.sigma[edit.k]) if edit.k < wanted.rank else 0.0
    if float(wanted.sigma[edit.k - 1]) - s_next > 1e-3 * float(wanted.sigma[edit.k - 1]):
        assert float((edit.value.double() - wanted.value).norm() / wanted.value.norm()) <= 1e-6


SCALES = {
    "frobenius": lambda s, k, p: float(s.norm() / (s[:k] ** p).norm()),
    "unit": lambda s, k, p: 1.0,
    "rms": lambda s, k, p: math.sqrt(6 / 4) / float(s[0]) ** p,
    "mean": lambda s, k, p: float(s[:k].mean() / (s[:k] ** p).mean()),
    "spectral": lambda s, k, p: float(s[0] / s[0] ** p),
}


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("scale", SCALES)
def test_scales_are_about_the_singular_values_of_the_edit(scale, p):
    s = torch.tensor([3.0, 2.0, 1.0, 0.25], dtype=torch.float64)
    edit = equalize(plant(s, 6, 4, dtype=torch.float64), scale=scale, beta=1.5, rank=3, power=p)
    assert edit.alpha == pytest.approx(1.5 * SCALES[scale](s, 3, p), rel=1e-12)
    found = torch.linalg.svdvals(edit.value)
    assert found[:3].tolist() == pytest.approx((edit.alpha * s[:3] ** p).tolist(), rel=1e-12)
    assert float(found[3]) < 1e-12
    assert edit.edit_norm == pytest.approx(float(edit.value.norm()), rel=1e-12)


@pytest.mark.parametrize("exponent", [-900, -100, 100, 900])
def test_powers_neither_underflow_nor_overflow_on_the_way(exponent):
    """s^8 leaves the range of float64 long before the edit does, and alpha with it."""
    delta = plant([3.0, 2.0, 1.0, 0.5], 6, 4, dtype=torch.float64)
    plain = equalize(delta, power=2.0)
    for p in (0.5, 1.0):
        edit = equalize(delta * 2.0**exponent, power=p)
        torch.testing.assert_close(edit.value * 2.0**-exponent, equalize(delta, power=p).value, rtol=1e-12, atol=1e-15)
    if abs(exponent) == 100:
        edit = equalize(delta * 2.0**exponent, power=2.0)
        torch.testing.assert_close(edit.value * 2.0**-exponent, plain.value, rtol=1e-12, atol=1e-15)
        assert edit.alpha == pytest.approx(math.ldexp(plain.alpha, -exponent), rel=1e-12)
    else:
        with pytest.raises(ValueError, match="out of the range of numbers"):
            equalize(delta * 2.0**exponent, power=8.0)


@pytest.mark.parametrize("wrong", [-0.1, 8.1, math.nan, math.inf, "1", True, None])
def test_a_power_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="power must lie in"):
        equalize(torch.eye(3), power=wrong)


def test_a_cached_decomposition_serves_every_power():
    delta, cache = make_delta("strong", 300, 150, 0), {}
    for p in (1.0, 0.0, 0.5):
        plain, cached = (equalize_matrix(delta, make_recipe(power=p), c) for c in (None, cache))
        assert torch.equal(plain.value, cached.value)
    assert len(cache) == 1


@settings(deadline=None, max_examples=40)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0, 3))
def test_the_correction_is_the_divided_difference_of_the_power(s, t, p):
    """Of the function g -> g^((p - 1) / 2) of the Gram matrix, with w_j = t^p split off."""
    found = float(correct_power(torch.tensor([s]).double(), torch.tensor([t]).double(), p))
    if abs(t / s - 1) < 1e-6:
        assert found == pytest.approx((1 - p) / 2, rel=1e-5, abs=1e-9)
    else:
        h = [float(x) ** (p - 1) for x in (s, t)]
        assert -found * t**p == pytest.approx(s * (h[0] - h[1]) / (s * s - t * t) * s * t, rel=1e-6, abs=1e-9 * t**p)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("leak, route", [(0.0, "plain"), (2e-4, "blocks"), (2e-2, "rotated")])
def test_directions_that_leaked_into_each_other_are_corrected(monkeypatch, p, transposed, leak, route):
    sigma = torch.cat((torch.full((4,), 100.0), torch.linspace(2.0, 1.0, 76))).double()
    D = plant(sigma, 300, 80)
    _, s, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    V = Vh[:40].mT.clone()
    V[:, 4:] += leak / 100.0 * V[:, :4] @ torch.randn(4, 36, generator=torch.Generator().manual_seed(0)).double()
    U, h, W = torch.linalg.svd(D.double() @ V, full_matrices=False)
    taken = []
    for name in ("rotate_to_singular_vectors", "apply_correction"):
        original = getattr(power, name)
        monkeypatch.setattr(power, name, lambda *g, name=name, f=original: taken.append(name) or f(*g))
    B = polar.scaled_image(D, V.float(), s[:40])
    M, (left, right), factors = multiply_power(B, V.float(), s[:40], transposed, 4, p)
    assert float((factors[0] @ factors[1] - M).norm()) < 1e-6 * float(M.norm())
    assert taken == {"plain": [], "blocks": ["apply_correction"], "rotated": ["rotate_to_singular_vectors"]}[route]
    expected = (U * (h / h[0]) ** p) @ W @ V.mT
    M, P = (M.mT, (left @ right).mT) if transposed else (M, left @ right)
    # Of the second order in the leak; M must be known to 1e-4.
    assert float((M.double() - expected).norm() / expected.norm()) < 3e-6 + leak**2 / 2
    assert float((P.double() - U @ W @ V.mT).norm() / 40**0.5) < 3e-6 + leak**2 / 2


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_directions_without_strong_ones_are_corrected_to_first_order(p):
    """A rotation within the kept directions changes neither M nor its factors."""
    generator = torch.Generator().manual_seed(3)
    s = torch.linspace(2.0, 1.0, 30, dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(m, 30, generator=generator).double()).Q for m in (70, 50))
    turn = torch.randn(30, 30, generator=generator).double() * 1e-9
    R = torch.linalg.matrix_exp(turn - turn.mT)
    B, right, isometric = weigh_directions((U * s) @ R / s, (V @ R).mT, s, 0, p)
    assert float((B @ right - (U * (s / s[0]) ** p) @ V.mT).norm()) < 1e-14 * 30
    assert float((B @ isometric - U @ V.mT).norm()) < 1e-14 * 30


@pytest.mark.parametrize("how", ["another power", "scaled", "one entry", "sign", "not a number", "turned"])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_a_wrong_power_fails_the_certificate(how, p):
    import dataclasses

    delta = make_delta("inverse-root", 200, 120, 3)
    found = RUNGS[2][1](delta, make_rule(), power=p)
    M = found.M.clone()
    if how == "another power":
        M = RUNGS[2][1](delta, make_rule(), power=p + 0.01).M
    elif how == "scaled":
        M *= 1.0001
    elif how == "one entry":
        M[3, 4] += 0.01 * float(M.norm())
    elif how == "sign":
        M = -M
    elif how == "not a number":
        M[0, 0] = math.nan
    elif how == "turned":  # of the right norm and rank, with other directions
        turn = torch.randn(120, 120, generator=torch.Generator().manual_seed(0)) * 1e-4
        M = M @ torch.linalg.matrix_exp(turn - turn.mT)
    assert certify(found, (delta,)).find_fault() is None
    assert certify(dataclasses.replace(found, M=M), (delta,)).find_fault() is not None


def test_the_residual_is_given_for_power_zero_too():
    edit = equalize(make_delta("inverse", 300, 150, 0))
    assert 0.0 < edit.power_residual < 1e-4


def test_gain_of_a_scale_that_leaves_the_range_is_infinite():
    sigma = torch.tensor([1e200, 1.0], dtype=torch.float64)
    assert find_gain("unit", KeptSpectrum(sigma, 1, (2, 2), 1e200, 2.0)) == math.inf
