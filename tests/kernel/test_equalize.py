"""One matrix in, one edited delta out: held to the float64 reference over shapes, dtypes and spectra."""

import math
import threading

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pome.kernel.equalize import ZeroDelta, equalize, equalize_product
from pome.kernel.precision import full_precision
from support.recipes import make_recipe
from support.reference import assert_as_reference, plant, reference_edit

SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (40, 24), (24, 40), (31, 31), (200, 130), (130, 200)]


def make_spectrum(kind, r):
    """min(m, n) singular values, descending."""
    i = torch.arange(r, dtype=torch.float64)
    return {
        "flat": torch.linspace(1.6, 0.4, r, dtype=torch.float64),
        "equal": torch.ones(r, dtype=torch.float64),
        "power": 1.0 / (i + 1.0),
        "root": 1.0 / (i + 1.0).sqrt(),
        "geometric": 10.0 ** (-8.0 * i / max(r - 1, 1)),
        "staircase": 10.0 ** -(i * 4 / r).floor(),
        "spike": torch.where(i == 0, 1e5, 1.0),
        "pairs": 1.0 / ((i / 2).floor() + 1.0),
        "deficient": torch.where(i < (r + 1) // 2, 1.0 / (i + 1.0), 0.0),
        "one": torch.where(i == 0, 1.0, 0.0),
    }[kind]


KINDS = ["flat", "equal", "power", "root", "geometric", "staircase", "spike", "pairs", "deficient", "one"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(shape, kind, dtype):
    delta = plant(make_spectrum(kind, min(shape)), *shape, dtype=dtype)
    assert_as_reference(equalize(delta), delta)


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    ratio=st.floats(0.01, 1.0),
    beta=st.floats(0.1, 3.0),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_reference_everywhere(m, n, kind, dtype, ratio, beta, seed):
    delta = plant(make_spectrum(kind, min(m, n)), m, n, seed, dtype)
    assume(bool(delta.isfinite().all()))  # a spike in a tiny float16 matrix is over its range
    edit = equalize(delta, rank_ratio=ratio, beta=beta)
    assert_as_reference(edit, delta, rank_ratio=ratio, beta=beta)


@pytest.mark.parametrize("factor", [1e-36, 1e-30, 1e-18, 1e18, 1e30])
def test_magnitudes_whose_squares_leave_float32(factor):
    delta = plant(make_spectrum("root", 20), 30, 20) * factor
    assert_as_reference(equalize(delta), delta)


def test_magnitudes_whose_squares_leave_float64():
    delta = plant(make_spectrum("root", 20), 30, 20, dtype=torch.float64)
    plain = equalize(delta)
    for exponent in (-1000, 1000):
        edit = equalize(delta * 2.0**exponent)
        assert edit.alpha == pytest.approx(math.ldexp(plain.alpha, exponent), rel=1e-12)
        torch.testing.assert_close(edit.value * 2.0**-exponent, plain.value, rtol=1e-12, atol=1e-15)


def test_a_zero_delta_is_named_so():
    with pytest.raises(ZeroDelta):
        equalize(torch.zeros(4, 3))
    with pytest.raises(ZeroDelta):
        equalize_product(torch.zeros(4, 2), torch.ones(2, 3), make_recipe())
    b, a = plant([1.0, 0.5], 6, 2), plant([2.0, 1.0], 2, 5)
    for left, right in (
        (torch.cat((b, -b), 1), torch.cat((a, a))),  # a sum that cancels
        (torch.cat((b, torch.zeros(6, 2)), 1), torch.cat((torch.zeros(2, 5), a))),  # halves that do not meet
    ):
        with pytest.raises(ZeroDelta):
            equalize_product(left, right, make_recipe())


@pytest.mark.parametrize(
    "shape", [(512, 256), (1, 131072), (8, 16384), (50000, 2), (1024, 1024), (40000, 100), (100, 40000)]
)
@pytest.mark.parametrize("signs", ["one", "two"])
def test_entries_of_one_size_sum_up_right(shape, signs):
    """Rounding of equal addends goes in one direction and does not average out: 3e-5 of the sum was seen."""
    m, n = shape
    delta = torch.full(shape, 0.05)
    if signs == "two":
        delta *= plant([1.0], m, 1).sign() @ plant([1.0], 1, n).sign()
    edit = equalize(delta)
    assert (edit.rank, edit.k, edit.sigma_next) == (1, 1, 0.0)
    assert edit.delta_norm == pytest.approx(float(delta.double().norm()), rel=5e-7)
    assert edit.energy_kept == pytest.approx(1.0, rel=1e-6)
    assert abs(1 - edit.objective) < 1e-6 and edit.orthogonality < 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_nan_and_infinity_are_refused_before_any_decomposition(monkeypatch, bad, dtype):
    delta = torch.ones(5, 4, dtype=dtype)
    delta[2, 1] = bad
    for name in ("svd", "eigh", "qr"):
        monkeypatch.delattr(torch.linalg, name)
    with pytest.raises(ValueError, match="NaN or infinity"):
        equalize(delta)


def test_numbers_out_of_range_are_refused_as_such():
    with pytest.raises(ValueError, match="out of the range of numbers"):
        equalize(torch.full((64, 32), 1e307, dtype=torch.float64))
    with pytest.raises(ValueError, match="dense tensor"):
        equalize([[1.0]])


@pytest.mark.parametrize(
    "wrong", [torch.tensor(1.0), torch.ones(3), torch.ones(2, 2, 2), torch.ones(0, 4), torch.ones(2, 2).long()]
)
def test_equalize_refuses_scalars_vectors_stacks_empty_and_integer_tensors(wrong):
    with pytest.raises(ValueError, match="m x n float tensor"):
        equalize(wrong)


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 80),
    n=st.integers(1, 80),
    r=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_factors_give_what_their_product_gives(m, n, r, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(m, r, generator=generator).to(dtype)
    a = torch.randn(r, n, generator=generator).to(dtype)
    edit = equalize_product(b, a, make_recipe())
    wanted = reference_edit(b.double() @ a.double())
    assert (edit.rank, edit.k) == (wanted.rank, wanted.k)
    assert edit.solver == "factors"
    s_next = float(wanted.sigma[edit.k]) if edit.k < wanted.sigma.numel() else 0.0
    if float(wanted.sigma[edit.k - 1]) - s_next > 1e-3 * float(wanted.sigma[edit.k - 1]):
        # 1e-6: the product of the two orthonormal factors is the only float32 step
        assert float((edit.value.double() - wanted.value).norm() / wanted.value.norm()) <= 1e-6


def test_factors_that_do_not_multiply_are_refused():
    with pytest.raises(ValueError, match="do not multiply"):
        equalize_product(torch.ones(4, 2), torch.ones(3, 4), make_recipe())


def test_a_cut_within_a_cluster_is_warned_of():
    assert equalize(torch.eye(20)).warnings != ()
    assert equalize(plant(make_spectrum("power", 20), 30, 20)).warnings == ()


def test_same_bits_again_and_global_state_untouched():
    delta = plant(make_spectrum("root", 300), 500, 300)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, second = equalize(delta), equalize(delta)
    assert torch.equal(first.value, second.value)
    assert (first.objective, first.orthogonality) == (second.objective, second.orthogonality)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_delta_is_left_as_it_was():
    delta = plant(make_spectrum("spike", 40), 60, 40)
    before = delta.clone()
    equalize(delta, beta=2.0)
    assert torch.equal(delta, before)


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_reduced_precision_is_neither_used_nor_changed(precision):
    delta = plant(make_spectrum("flat", 300), 500, 300)
    plain = equalize(delta)
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            edit = equalize(delta)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(edit.value, plain.value)


def test_two_threads_at_once_leave_the_precision_as_it_was():
    """The switch is the process's: the first to leave must not switch it back under the other."""
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with full_precision(torch.device("cpu")):
            inside.set()
            leave.wait(10)

    torch.set_float32_matmul_precision("medium")
    try:
        other = threading.Thread(target=hold)
        with full_precision(torch.device("cpu")):
            other.start()
            assert inside.wait(10)
        matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch before 2.9 has one switch for all
        assert (matmul.fp32_precision if matmul else torch.get_float32_matmul_precision()) in ("ieee", "highest")
        leave.set()
        other.join()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        leave.set()
        torch.set_float32_matmul_precision("highest")


def test_a_delta_that_carries_gradients_and_strides():
    delta = plant(make_spectrum("root", 20), 20, 30).T.requires_grad_()
    edit = equalize(delta)
    assert not edit.value.requires_grad
    assert_as_reference(edit, delta.detach())


@pytest.mark.parametrize(("p", "q"), [(70, 30), (-70, 10), (60, -90), (-60, -40), (0, 90)])
def test_factors_times_powers_of_two_give_the_edit_times_their_product(p, q):
    torch.manual_seed(0)
    b, a = torch.randn(60, 5), torch.randn(5, 40)
    plain = equalize_product(b, a, make_recipe())
    scaled = equalize_product(b * 2.0**p, a * 2.0**q, make_recipe())
    assert torch.equal(scaled.value.double(), plain.value.double() * 2.0 ** (p + q))
    assert scaled.alpha == plain.alpha * 2.0 ** (p + q) and torch.equal(scaled.sigma, plain.sigma * 2.0 ** (p + q))
