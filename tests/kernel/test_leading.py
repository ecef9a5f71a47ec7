"""The rung for leading directions alone: against float64, its proof of the rest, and how it hands over."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.kernel import ladder
from pome.kernel.certificate import certify
from pome.kernel.decomposition import Undecided
from pome.kernel.equalize import equalize, equalize_matrix
from pome.kernel.solvers import leading
from pome.kernel.solvers.leading import DETERMINED, filter_chebyshev, find_growth, is_above_rest, solve_leading
from support.deltas import KINDS, make_delta
from support.recipes import make_recipe, make_rule
from support.reference import assert_as_reference, plant, reference_edit
from support.spoiled import WRONG, spoil


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Small matrices are iterated on, and the thin route takes none before."""
    monkeypatch.setattr(leading, "WHOLE", 0)
    monkeypatch.setattr(leading, "SHARE", 0.5)
    monkeypatch.setattr(ladder, "THIN", 10**9)


def find_leading(delta, power=1.0, rank_rule="fixed", **numbers):
    return equalize_matrix(
        delta, dataclasses.replace(make_recipe(rank_rule, power=power, **numbers), leading_only=True)
    )


def assert_proved(edit, delta, k, power):
    """What a record says holds against float64, whichever rung it came from."""
    if edit.solver != "leading":
        assert_as_reference(edit, delta, k=min(k, edit.rank), power=power)
        return
    wanted = reference_edit(delta, k=k, power=power)
    s = wanted.sigma
    assert edit.k == k and edit.rank in (None, wanted.rank)
    assert edit.sigma.numel() == (k + 1 if edit.rank is None else s.numel())
    assert not any(note.startswith("leading") for note in edit.warnings)
    objective = float((delta.double() * edit.value.double()).sum()) / edit.alpha / float(s[:k].pow(1.0 + power).sum())
    assert abs(1 - objective) <= 1e-5 and abs(1 - edit.objective) <= 1e-5
    # By the bound, not above the truth but for float32 sums, which s^(1 + power) multiplies.
    assert edit.objective <= objective + 1e-6 * (1.0 + power)
    assert edit.orthogonality <= 1e-5 and (power == 0.0 or edit.power_residual <= 1e-5)
    assert edit.sigma_max == pytest.approx(float(s[0]), rel=1e-5)
    assert edit.energy_kept == pytest.approx(float(s[:k].square().sum() / s.square().sum()), rel=1e-5)
    # Beyond the rank of the delta there is the rounding of products with it in float32.
    assert edit.sigma_next <= float(s[k]) * (1.0 + 3e-5) + 2.0**-23 * float(s[0])
    if float(1 - s[k] / s[k - 1]) > DETERMINED:
        assert float((edit.value.double() - wanted.value).norm() / wanted.value.norm()) <= 1e-4


@settings(deadline=None, max_examples=120)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(96, 330),
    n=st.integers(96, 330),
    k=st.integers(1, 60),
    power=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_leading_directions_agree_with_the_reference_on_any_spectrum(kind, m, n, k, power, seed):
    delta = make_delta(kind, m, n, seed)
    assert_proved(find_leading(delta, power, rank=k), delta, k, power)


@pytest.mark.parametrize(
    "kind, k", [("strong", 12), ("strong", 22), ("strong", 30), ("rounded-lora", 6), ("inverse-root", 12)]
)
@pytest.mark.parametrize("shape", [(900, 640), (640, 900), (640, 640)], ids=str)
def test_few_directions_take_no_other_eigenvectors_not_even_within_a_bulk(monkeypatch, kind, shape, k):
    def refuse(G):
        raise AssertionError("all eigenvectors")

    monkeypatch.setattr(leading, "find_eigenvectors", refuse)
    delta = make_delta(kind, *shape, 5)
    edit = find_leading(delta, rank=k)
    assert edit.solver == "leading" and edit.rank is None
    assert_proved(edit, delta, k, 1.0)


@pytest.mark.parametrize("width, tied", [(2, 0.0), (6, 0.0), (6, 3e-5), (6, 5e-4), (2, 2e-3), (2, 2e-2)])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_at_a_cluster_around_the_cut_the_objective_decides(width, tied, power):
    k, n = 12, 400
    i = torch.arange(n, dtype=torch.float64)
    sigma = 1.0 / (i + 1.0).sqrt()
    low = k - width // 2
    sigma[low : low + width] = float(sigma[low]) * (1.0 - tied * i[:width] / (width - 1))
    delta = plant(sigma.sort(descending=True).values, 600, n)
    edit = find_leading(delta, power, rank=k)
    assert edit.solver == "leading"
    assert_proved(edit, delta, k, power)


@pytest.mark.parametrize("steepness, deflated", [(3.0, False), (30.0, False), (300.0, True), (3000.0, True)])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_strong_directions_are_deflated_only_where_they_hide_the_cut(monkeypatch, steepness, deflated, power):
    calls = []
    original = leading.deflate
    monkeypatch.setattr(leading, "deflate", lambda *given: calls.append(1) or original(*given))
    sigma = torch.cat((torch.linspace(1.0, 0.6, 8) * steepness, torch.linspace(1.0, 0.3, 392))).double()
    delta = plant(sigma, 600, 400)
    edit = find_leading(delta, power, rank=12)
    assert bool(calls) == deflated and edit.solver == "leading"
    assert_proved(edit, delta, 12, power)
    edit = find_leading(delta, power, rank=8)  # whose cut lies above what rounding hides
    assert len(calls) == deflated and edit.solver == "leading"
    assert_proved(edit, delta, 8, power)


@pytest.mark.parametrize("steepness, deflated", [(3.0, 0), (10.0, 0), (300.0, 8)])
def test_before_all_eigenvectors_only_directions_that_may_hide_the_cut_are_deflated(monkeypatch, steepness, deflated):
    counts = []
    original = leading.truncate
    note = lambda D, split, *given: counts.append(split.theta.numel()) or original(D, split, *given)  # noqa: E731
    monkeypatch.setattr(leading, "truncate", note)
    monkeypatch.setattr(leading, "SHARE", 0.0)
    sigma = torch.cat((torch.linspace(1.0, 0.6, 8) * steepness, torch.linspace(1.0, 0.3, 392))).double()
    delta = plant(sigma, 600, 400)
    edit = find_leading(delta, rank=60)
    assert counts == [deflated] and edit.solver == "leading"
    assert_proved(edit, delta, 60, 1.0)


def test_fewer_directions_than_the_rank_leave_nothing_behind():
    delta = make_delta("low-rank", 300, 200, 1)
    edit = find_leading(delta, rank=5)
    assert edit.solver == "leading"
    assert_proved(edit, delta, 5, 1.0)


@pytest.mark.parametrize("degree", [1, 2, 5, 8])
def test_the_filter_is_the_chebyshev_polynomial(degree):
    generator = torch.Generator().manual_seed(degree)
    values = torch.linspace(0.0, 5.0, 60).double()
    U = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q
    G, X, edge = (U * values) @ U.mT, torch.randn(60, 4, generator=generator).double(), 3.0
    x = 2.0 * values / edge - 1.0
    grown = torch.where(x > 1.0, (degree * x.clamp_min(1.0).acosh()).cosh(), (degree * x.clamp(-1.0, 1.0).acos()).cos())
    wanted = (U * grown) @ (U.mT @ X)
    assert float((filter_chebyshev(G, X, G @ X, edge, degree) - wanted).norm() / wanted.norm()) < 1e-12
    assert float(grown[-1]) == pytest.approx(math.cosh(degree * find_growth(5.0, edge)), rel=1e-12)


@pytest.mark.parametrize("shape", [(700, 560), (560, 700)], ids=str)
@pytest.mark.parametrize("factor", [1e-36, 1.0, 1e30])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("solver", ["leading", "thin"])
def test_the_factors_are_balanced_and_multiply_to_the_edit(monkeypatch, solver, power, factor, shape):
    if solver == "thin":
        monkeypatch.setattr(ladder, "THIN", 0)
        monkeypatch.setattr(ladder, "LEADING", 0)
    edit = find_leading(make_delta("strong", *shape, 1) * factor, power, rank=9)
    assert edit.solver == solver and edit.factors is not None
    B, A = (side.double() for side in edit.factors)
    assert (B.shape, A.shape) == ((shape[0], 9), (9, shape[1]))
    assert float((B @ A - edit.value.double()).norm()) < 1e-6 * edit.edit_norm
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=1e-5)
    assert find_leading(make_delta("strong", *shape, 1), 0.0, rank=9).factors is None


def test_many_directions_and_rules_by_the_spectrum_take_all_eigenvectors():
    delta = make_delta("strong", 300, 200, 2)
    for given_, k in (({"rank": 150}, 150), ({"rank_rule": "energy", "energy": 0.6}, None)):
        edit = find_leading(delta, **given_)
        assert edit.solver == "leading" and edit.rank == 200 and edit.sigma.numel() == 200
        assert_proved(edit, delta, k or edit.k, 1.0)
    assert edit.k == equalize(delta, rank_rule="energy", energy=0.6).k


def test_a_rank_that_float32_leaves_open_is_left_open_for_a_number_alone():
    delta = plant(torch.linspace(1.0, 5e-4, 200), 300, 200)
    assert find_leading(delta, rank=120).rank is None  # of all eigenvectors
    edit = find_leading(delta, rank_rule="energy", energy=0.6)
    assert edit.solver == "gram-float64" and edit.rank == 200


def test_more_than_the_rank_is_left_to_the_ladder():
    delta = make_delta("low-rank", 300, 200, 1)
    edit = find_leading(delta, rank=12)
    assert (edit.rank, edit.k) == (7, 7) and edit.solver != "leading"


@pytest.mark.parametrize("hidden", [0, 5, 20])
def test_the_level_is_above_the_rest_or_it_is_said_not_to_be(hidden):
    """With a direction left out of the Ritz vectors their residuals are small, and the factor shows it."""
    generator = torch.Generator().manual_seed(hidden)
    values = torch.linspace(4.0, 0.1, 150).double()
    U = torch.linalg.qr(torch.randn(150, 150, generator=generator, dtype=torch.float64)).Q
    G = ((U * values) @ U.mT).float()
    kept = [i for i in range(21) if i != hidden]
    W = U[:, kept].float()
    squares = values[kept]
    E = G @ W - W * squares.float()
    rest = float(values[hidden])
    assert is_above_rest(rest * (1 + 1e-4), G, W, squares, E)
    assert not is_above_rest(rest * (1 - 1e-4), G, W, squares, E)
    rough = torch.linalg.qr(W + 0.02 * torch.randn(150, 20, generator=generator)).Q
    inner = rough.mT @ G @ rough
    squares, X = torch.linalg.eigh(inner.double())
    rough = rough @ X.float()
    outside = torch.eye(150) - rough @ rough.mT
    truth = float(torch.linalg.eigvalsh((outside @ G @ outside).double())[-1])
    E = G @ rough - rough * squares.float()
    assert is_above_rest(truth * (1 + 1e-4), G, rough, squares, E)
    assert not is_above_rest(truth * (1 - 1e-4), G, rough, squares, E)


def test_a_direction_that_the_start_misses_is_not_missed(monkeypatch):
    """In exact arithmetic the iteration never sees it: here it is kept away."""
    sigma = torch.cat((torch.linspace(4.0, 3.0, 12), torch.linspace(0.8, 0.4, 388))).double()
    delta = plant(sigma, 600, 400)
    v = torch.linalg.svd(delta).Vh[3]
    original = leading.orthonormalise
    monkeypatch.setattr(leading, "orthonormalise", lambda Y: original(Y - torch.outer(v, v @ Y)))
    assert leading.iterate(leading.deflate(delta), 11, 1.0)[0] is None
    monkeypatch.setattr(leading, "is_above_rest", lambda *_: True)  # without the proof it would be taken for certain
    assert leading.iterate(leading.deflate(delta), 11, 1.0)[0] is not None


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_answer_fails_the_certificate_and_the_ladder_takes_over(monkeypatch, how):
    delta = make_delta("inverse-root", 300, 150, 3)
    kept = solve_leading(delta, make_rule("fixed", rank=10))
    assert certify(kept, (delta,)).find_fault() is None
    wrong = dataclasses.replace(kept, M=spoil(delta, kept, how))
    monkeypatch.setattr(ladder, "solve_leading", lambda *_, **__: wrong)
    edit = find_leading(delta, 0.0, rank=10)
    assert edit.warnings[0].startswith("leading handed over: ")
    assert_as_reference(edit, delta, k=10)


def test_an_edit_does_not_take_it_nor_a_float64_matrix():
    delta = make_delta("noise", 300, 200, 0)
    assert equalize(delta, rank=20, power=1.0).solver == "deflated-float32"
    assert find_leading(delta.double(), rank=20).solver == "gram-float64"
    assert find_leading(delta, rank=20).solver == "leading"


def test_the_thin_route_comes_first_only_where_the_short_side_is_long(monkeypatch):
    monkeypatch.undo()
    rule = make_rule("fixed", rank=10)
    names = [
        [attempt.name for attempt in ladder.list_attempts(torch.zeros(2000, n), rule=rule, leading_only=True)][:2]
        for n in (576, 1024)
    ]
    assert names == [["leading", "deflated-float32"], ["thin", "leading"]]


def test_magnitudes_whose_squares_leave_float32():
    for factor in (1e-36, 1e30):
        delta = make_delta("strong", 200, 150, 0) * factor
        edit = find_leading(delta, rank=5)
        assert edit.solver == "leading" and math.isfinite(edit.edit_norm)
        assert_proved(edit, delta, 5, 1.0)


def test_directions_that_do_not_exist_are_undecided():
    with pytest.raises(Undecided):
        solve_leading(make_delta("low-rank", 300, 200, 1), make_rule("fixed", rank=12), 1.0)
