"""The thin route: certified against a float64 decomposition, its bounds against the truth, and how it hands over."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.kernel import ladder, missed
from pome.kernel.certificate import certify
from pome.kernel.decomposition import Undecided
from pome.kernel.equalize import equalize, equalize_matrix
from pome.kernel.missed import LEAST_MASS, PROBES, SLACK, bound_leading, bound_squared_norm
from pome.kernel.solvers import thin
from pome.kernel.solvers.thin import solve_thin
from support.deltas import KINDS, make_delta
from support.recipes import make_recipe, make_rule
from support.reference import assert_as_reference, plant, reference_edit
from support.spoiled import WRONG, spoil

CONVERGE = ["inverse", "inverse-root", "geometric", "deficient", "strong", "hilbert"]


def make_fixed(k):
    return make_rule("fixed", rank=k)


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Small matrices and any k take the route, which by itself is for large ones."""
    monkeypatch.setattr(ladder, "THIN", 0)
    monkeypatch.setattr(ladder, "SHARE", 1.0)


def assert_proved(edit, delta, k, power=0.0):
    """What a record says holds against float64, whichever route it came from."""
    if edit.solver != "thin":
        assert_as_reference(edit, delta, k=min(k, edit.rank), power=power)
        return
    wanted = reference_edit(delta, k=k, power=power)
    s = wanted.sigma
    assert edit.rank is None and edit.k == k and edit.sigma.numel() == k + 1
    assert not any(note.startswith("thin") for note in edit.warnings)
    best = float(s[:k].pow(1.0 + power).sum())
    objective = float((delta.double() * edit.value.double()).sum()) / edit.alpha / best
    assert abs(1 - objective) <= 1e-5 and abs(1 - edit.objective) <= 1e-5
    assert edit.objective <= objective + 1e-6  # by the bound, not above the truth but for float32 sums
    assert edit.orthogonality <= 1e-5 and (power == 0.0 or edit.power_residual <= 1e-5)
    assert edit.sigma_max == pytest.approx(float(s[0]), rel=1e-5)
    assert edit.sigma_k == pytest.approx(float(s[k - 1]), rel=3e-5)
    gap = float(1 - s[k] / s[k - 1])
    off = 1 - edit.sigma_next / float(s[k])
    assert -3e-5 <= off <= max(3e-5, thin.AFTER_GAP * gap)
    if gap > 1e-3:
        assert float((edit.value.double() - wanted.value).norm() / wanted.value.norm()) <= 1e-4


@settings(deadline=None, max_examples=80)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(60, 330),
    n=st.integers(60, 330),
    k=st.integers(1, 14),
    power=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_few_directions_agree_with_the_reference_on_any_spectrum(kind, m, n, k, power, dtype, seed):
    delta = make_delta(kind, m, n, seed).to(dtype)
    assert_proved(equalize(delta, rank=k, power=power), delta, k, power)


@pytest.mark.parametrize("k", [1, 5, 16])
@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(520, 300), (300, 520)], ids=str)
@pytest.mark.parametrize("kind", CONVERGE)
def test_spectra_that_fall_take_the_thin_route(kind, shape, power, k):
    delta = make_delta(kind, *shape, 5)
    if kind == "hilbert" and k == 16:  # its singular values fall below float32 before that
        return
    edit = equalize(delta, rank=k, power=power)
    assert edit.solver == "thin"
    assert_proved(edit, delta, k, power)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("width, tied", [(2, 0.0), (6, 0.0), (6, 1e-7), (6, 3e-5), (6, 5e-4), (2, 1.1e-3), (2, 2e-3)])
def test_at_a_cluster_around_the_cut_the_objective_decides(width, tied, power):
    """Directions k - width / 2 to k + width / 2 are as good as equal; which of them are kept does not matter."""
    k, n = 12, 400
    i = torch.arange(n, dtype=torch.float64)
    sigma = 1.0 / (i + 1.0).sqrt()
    low = k - width // 2
    sigma[low : low + width] = float(sigma[low]) * (1.0 - tied * i[:width] / (width - 1))
    delta = plant(sigma.sort(descending=True).values, 600, n)
    edit = equalize(delta, rank=k, power=power)
    assert edit.solver == "thin"
    assert_proved(edit, delta, k, power)
    assert edit.warnings or tied > 0.0
    assert not edit.warnings or tied < 1e-3


@pytest.mark.parametrize("kind", ["noise", "orthogonal", "clusters", "step", "signs"])
def test_a_bulk_without_a_gap_is_left_to_the_ladder_without_a_warning(monkeypatch, kind):
    products = []
    monkeypatch.setattr(thin, "orthonormalise", lambda Y, f=thin.orthonormalise: products.append(Y) or f(Y))
    delta = make_delta(kind, 420, 260, 3)
    edit = equalize(delta, rank=6)
    assert edit.solver == "deflated-float32"
    assert not any("thin" in note for note in edit.warnings)
    assert len(products) <= 1 + 2 * 3  # four blocks at most, of nine
    assert_as_reference(edit, delta, k=6)


def test_a_rank_below_what_was_asked_for_is_found_by_the_ladder():
    delta = make_delta("low-rank", 300, 200, 1)
    for k in (7, 8, 12):
        edit = equalize(delta, rank=k)
        assert (edit.rank, edit.k) == (7, 7)
    assert equalize(delta, rank=6).rank is None


@pytest.mark.parametrize("factor", [1e-36, 1e-18, 1e18, 1e30])
def test_magnitudes_whose_squares_leave_float32(factor):
    delta = make_delta("inverse", 200, 150, 0) * factor
    edit = equalize(delta, rank=5)
    assert edit.solver == "thin"
    assert_proved(edit, delta, 5)


def test_same_bits_again_with_a_cache_and_with_another_state_of_the_generator():
    delta, cache = make_delta("inverse-root", 400, 200, 9), {}
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = equalize(delta, rank=9)
    torch.randn(100)
    second = equalize(delta.clone(), rank=9)
    cached = [equalize_matrix(delta, make_recipe("fixed", rank=9), cache) for _ in range(2)]
    torch.manual_seed(7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first.value, edit.value) and first.objective == edit.objective for edit in (second, *cached))
    assert list(cache) == ["thin-9-0.0@cpu"]
    equalize_matrix(delta, make_recipe("fixed", rank=9, power=1.0), cache)  # held to other bounds
    assert len(cache) == 2


def test_the_cache_remembers_that_the_thin_solver_gave_up():
    delta, cache = make_delta("noise", 300, 200, 0), {}
    plain = equalize(delta, rank=5)
    for _ in range(2):
        assert torch.equal(equalize_matrix(delta, make_recipe("fixed", rank=5), cache).value, plain.value)
    assert isinstance(cache["thin-5-0.0@cpu"], Undecided)


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_answer_fails_the_certificate_and_the_ladder_takes_over(monkeypatch, how):
    delta = make_delta("inverse-root", 300, 150, 3)
    kept = solve_thin(delta, make_fixed(10))
    assert certify(kept, (delta,)).find_fault() is None
    wrong = dataclasses.replace(kept, M=spoil(delta, kept, how))
    monkeypatch.setattr(ladder, "solve_thin", lambda *_, **__: wrong)
    edit = equalize(delta, rank=10)
    assert edit.warnings[0].startswith("thin handed over: ")
    assert_as_reference(edit, delta, k=10)


def test_the_bound_on_the_missed_sum_lowers_the_objective():
    delta = make_delta("inverse", 200, 120, 0)
    found = solve_thin(delta, make_fixed(4))
    missing = dataclasses.replace(found, missed=2e-5)
    certificate = certify(missing, (delta,))
    assert certificate.objective == pytest.approx(certify(found, (delta,)).objective / (1 + 2e-5), rel=1e-9)
    assert "objective" in certificate.find_fault()


def test_a_driver_that_fails_is_warned_of(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no QR on this device")

    monkeypatch.setattr(ladder, "solve_thin", fail)
    delta = make_delta("inverse", 200, 120, 0)
    edit = equalize(delta, rank=4)
    assert edit.warnings[0] == "thin handed over: RuntimeError: no QR on this device"
    assert_as_reference(edit, delta, k=4)


@pytest.mark.parametrize("hidden", [0, 3, 10])
def test_a_direction_that_the_start_misses_is_not_missed(monkeypatch, hidden):
    """A start without any part in one of the leading directions: the residuals are small, the bound is not."""
    sigma = torch.cat((torch.linspace(30.0, 8.0, 12), torch.linspace(1.0, 0.1, 188))).double()
    delta = plant(sigma, 300, 200, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(delta)
    # In exact arithmetic the iteration never sees that direction: it stays away from it here as well.
    u, v = U[:, hidden], Vh[hidden]
    original = thin.orthonormalise
    monkeypatch.setattr(thin, "orthonormalise", lambda Y: original(Y - torch.outer(v, v @ Y)))
    monkeypatch.setattr(
        thin, "draw_gaussian", lambda m, b, D, f=thin.draw_gaussian: f(m, b, D) - torch.outer(u, u @ f(m, b, D))
    )
    with pytest.raises(Undecided):
        solve_thin(delta, make_fixed(11))
    # and without the bound it would be taken for certain
    monkeypatch.setattr(thin, "bound_squared_norm", lambda D, V: 1.1)
    found = solve_thin(delta, make_fixed(11))
    assert float(found.sigma[:11].sum()) < float(sigma[:11].sum()) * 0.995


def test_the_least_mass_is_the_quantile_of_its_chi_square():
    half = torch.tensor(PROBES / 2, dtype=torch.float64)
    below = torch.special.gammainc(half, torch.tensor(LEAST_MASS / 2, dtype=torch.float64))
    assert 0.99e-7 < float(below) <= 1e-7
    assert thin.STEPS * 1e-7 < 1e-6


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(20, 300),
    n=st.integers(20, 300),
    h=st.integers(0, 12),
    exact=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_bound_on_the_rest_is_above_it_and_near(kind, m, n, h, exact, seed):
    delta = make_delta(kind, max(m, n), min(m, n), seed).double()
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(delta.shape[1], h, generator=generator, dtype=torch.float64)).Q
    if exact:
        V = torch.linalg.svd(delta).Vh[:h].mT
    truth = float(torch.linalg.matrix_norm(delta - delta @ V @ V.mT, 2)) ** 2
    bound = bound_squared_norm(delta, V)
    floor = 1e-14 * float(delta.norm()) ** 2  # what rounding leaves of nothing
    assert truth * (1 - 1e-12) - floor <= bound <= 1.05 * SLACK * truth + floor


def test_the_probes_are_not_the_numbers_that_the_start_was_drawn_from(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        missed, "draw_gaussian", lambda *g, f=missed.draw_gaussian, **k: drawn.append(f(*g, **k)) or drawn[0]
    )
    delta = make_delta("inverse", 300, 200, 0)
    solve_thin(delta, make_fixed(4))
    start = thin.draw_gaussian(300, 4 + 2 + 8, delta)
    assert len(drawn) == 1 and drawn[0].shape == (200, PROBES)
    assert not torch.isin(drawn[0][:50], start).any()


def test_the_bound_on_the_rest_of_nothing_is_nothing():
    assert bound_squared_norm(torch.zeros(40, 30), torch.eye(30)[:, :3]) <= 1e-30
    assert bound_squared_norm(torch.ones(40, 30), torch.eye(30)) <= 1e-10


def test_the_bound_fails_where_the_probes_do(monkeypatch):
    """Probes that are blind to the largest direction: the probability is about exactly that."""
    delta = torch.diag(torch.linspace(3.0, 0.1, 40)).double()
    delta[0] *= 2.0
    blind = missed.draw_gaussian(40, PROBES, delta, stream=1)
    blind[0] = 0.0
    monkeypatch.setattr(missed, "draw_gaussian", lambda *_, **__: blind)
    assert bound_squared_norm(delta, torch.zeros(40, 0).double()) < 10.0


@settings(deadline=None, max_examples=120)
@given(
    n=st.integers(3, 40),
    h=st.integers(1, 12),
    k=st.integers(1, 12),
    error=st.sampled_from([0.0, 1e-6, 1e-3, 0.03, 0.3]),
    power=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    fall=st.floats(0.0, 2.0),
    seed=st.integers(0, 2**16),
)
def test_the_bound_on_the_leading_sum_is_above_it(n, h, k, error, power, fall, seed):
    """Of any symmetric matrix, Ritz vectors of any quality and the norm of the rest: against eigvalsh."""
    h = min(h, n - 1)
    k = min(k, h)
    generator = torch.Generator().manual_seed(seed)
    values = (1.0 + torch.arange(n, dtype=torch.float64)).pow(-fall)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    H = (Q * values.square()) @ Q.mT
    V = torch.linalg.qr(Q[:, :h] + error * torch.randn(n, h, generator=generator, dtype=torch.float64)).Q
    squares, X = torch.linalg.eigh(V.mT @ H @ V)
    squares, V = squares.flip(0), V @ X.flip(1)
    coupling = torch.linalg.vector_norm(H @ V - V * squares, dim=0)
    outside = torch.eye(n, dtype=torch.float64) - V @ V.mT
    rest = float(torch.linalg.eigvalsh(outside @ H @ outside)[-1])
    share, limit = bound_leading(squares, coupling, k, rest, power)
    truth = float(values[:k].pow(1.0 + power).sum())
    assert squares[:k].pow((1.0 + power) / 2).sum() * (1.0 + share) >= truth * (1.0 - 1e-12)
    assert limit >= float(values[k]) ** 2 * (1.0 - 1e-12)
    if error == 0.0 and fall > 0.5 and h > k:  # and it closes where nothing was missed
        assert share < 1e-6


def test_ties_and_unknown_values_leave_the_bound_on_the_next_one_open():
    unknown = torch.tensor([4.0, 1.0]).double()
    assert bound_leading(unknown, torch.tensor([0.0, 9.0]).double(), 1, 3.9, 0.0)[0] > 0.1
    assert math.isfinite(bound_leading(unknown, torch.tensor([0.0, 0.0]).double(), 2, 1.0, 0.0)[1])


def test_the_thin_route_is_taken_for_few_directions_of_large_matrices(monkeypatch):
    monkeypatch.undo()
    large = torch.zeros(1, 1).expand(4096, 2048)
    assert ladder.is_thin(large, make_fixed(64)) and ladder.is_thin(large.mT, make_fixed(64))
    assert not ladder.is_thin(large, make_fixed(65))
    assert not ladder.is_thin(large[:500], make_fixed(4))
    assert not ladder.is_thin(large, make_rule("energy", energy=0.5))
    assert not ladder.is_thin(large, make_rule("ratio", rank_ratio=0.01))
