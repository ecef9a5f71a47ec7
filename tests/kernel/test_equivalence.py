"""The method equivalence against a float64 singular value decomposition, on every kind of spectrum, shape and dtype."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import pome
from pome.kernel import equivalence
from pome.kernel.decomposition import DecompositionCache
from pome.kernel.equivalence import Match, match_matrix, match_spectrum
from support.deltas import KINDS, make_delta
from support.reference import plant

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def values(W: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(W.double())


def reference(W_base: torch.Tensor, W_ft: torch.Tensor) -> torch.Tensor:
    """W_E by the definition."""
    U, _, Vh = torch.linalg.svd(W_ft.double(), full_matrices=False)
    return (U * values(W_base)) @ Vh


def assert_nearest(found: pome.Matched, W_base: torch.Tensor, W_ft: torch.Tensor) -> torch.Tensor:
    """W_E has the singular values of W_base and the distance that no such matrix undercuts (Mirsky); returns W_E.

    The value is rounded to float32 once, an error of EPS beside its own norm.
    """
    base, ft = W_base.double(), W_ft.double()
    W_E = base + found.value.double() / found.beta
    s, wanted = values(W_E), values(base)
    slack = EPS * float(found.value.double().norm()) / found.beta + 1e-9 * float(base.norm())
    assert float((s - wanted).norm()) <= slack
    least = float((wanted - values(ft)).norm())
    assert float((W_E - ft).norm()) == pytest.approx(least, abs=slack, rel=1e-5)
    assert found.distance == pytest.approx(least, rel=1e-5, abs=1e-9 * float(base.norm()))
    assert found.spectral_drift == pytest.approx(least / float(wanted.norm()), rel=1e-5, abs=1e-9)
    assert torch.allclose(found.sigma, wanted, rtol=1e-6, atol=1e-7 * float(wanted[0]))
    assert abs(found.objective - 1.0) <= 1e-5 and found.orthogonality <= 1e-5
    D = ft - base
    assert found.delta_norm == pytest.approx(float(D.norm()))
    assert found.edit_norm == pytest.approx(float(found.value.double().norm()), rel=1e-5, abs=slack)
    assert found.departure == pytest.approx(float((found.value.double() - D).norm() / D.norm()), rel=1e-4, abs=1e-6)
    return W_E


shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)), st.sampled_from([(150, 100), (97, 300), (128, 128)])
)


@settings(deadline=None, max_examples=60)
@given(shape=shapes, dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)), seed=st.integers(0, 99),
       size=st.sampled_from([1e-3, 0.1, 1.0]), beta=st.sampled_from([1.0, 0.3, 2.5]))  # fmt: skip
def test_random_weights_become_those_of_the_definition(shape, dtypes, seed, size, beta):
    generator = torch.Generator().manual_seed(seed)
    W_base = torch.randn(*shape, generator=generator)
    W_ft = (W_base + size * torch.randn(*shape, generator=generator)).to(dtypes[1])
    W_base = W_base.to(dtypes[0])
    assume(not torch.equal(W_base.double(), W_ft.double()))  # bfloat16 may round the difference away
    found = match_spectrum(W_base, W_ft, beta=beta)
    assert found.value.dtype == (torch.float64 if dtypes[0] == torch.float64 else torch.float32)
    assert found.warnings == ()
    W_E = assert_nearest(found, W_base, W_ft)
    if size >= 0.1:  # gaps of the spectrum at which the definition itself is known in float64
        wanted = reference(W_base, W_ft)
        assert float((W_E - wanted).norm()) <= 1e-6 * float(wanted.norm())


@settings(deadline=None, max_examples=80)
@given(kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)), wide=st.booleans(), small=st.booleans(),
       seed=st.integers(0, 99))  # fmt: skip
def test_every_pair_of_spectra_is_certified(kinds, wide, small, seed):
    """Rank-deficient, tied and spread spectra on either side, where W_E may not be unique: the certificate holds."""
    m, n = (30, 20) if small else (140, 100)
    W_base, W_ft = (make_delta(kind, m, n, seed + i) for i, kind in enumerate(kinds))
    if wide:
        W_base, W_ft = W_base.T, W_ft.T
    if torch.equal(W_base, W_ft):  # of some kinds there is one
        W_ft = W_ft.flip(0)
    found = match_spectrum(W_base, W_ft)
    assert_nearest(found, W_base, W_ft)


def test_a_rank_deficient_weight_is_warned_of_where_its_base_is_not():
    full, deficient = make_delta("gentle", 120, 100, 0), make_delta("low-rank", 120, 100, 1)
    assert any("W_ft has rank 7 and W_base 100" in text for text in match_spectrum(full, deficient).warnings)
    assert not any("not determined" in text for text in match_spectrum(deficient, full).warnings)
    # Of one rank, but with directions of their own: W_E has them and no other.
    found = match_spectrum(make_delta("low-rank", 120, 100, 2), deficient)
    assert not any("not determined" in text for text in found.warnings)


def test_tied_values_are_warned_of_where_the_base_has_others():
    tied, spread = torch.eye(40), plant(torch.linspace(2, 1, 40).double(), 40, 40)
    assert any("tied" in text for text in match_spectrum(spread, tied).warnings)
    assert match_spectrum(tied, spread).warnings == ()
    assert match_spectrum(tied, 3.0 * tied).warnings == ()  # every choice is the same


@settings(deadline=None, max_examples=40)
@given(runs=st.lists(st.integers(1, 4), min_size=2, max_size=6), seed=st.integers(0, 99), apart=st.booleans())
def test_the_spread_of_the_bases_values_within_runs_of_ties_is_what_is_open(runs, seed, apart):
    ft = torch.cat([torch.full((count,), 2.0 - i / 10) for i, count in enumerate(runs)]).double()
    base = (1 + torch.rand(len(ft), generator=torch.Generator().manual_seed(seed)).double()).sort(descending=True)[0]
    if not apart:  # the base is tied where W_ft is, and any choice is the same
        base = torch.cat([part.mean().expand(len(part)) for part in base.split(runs)])
    n = len(ft)
    warned = match_spectrum(
        plant(base, n + 3, n, seed, torch.float64), plant(ft, n + 3, n, seed + 1, torch.float64)
    ).warnings
    # Turned by a rotation, the values of a run may change their places: at most twice their distance from their mean.
    spread = 2 * math.sqrt(sum(float((part - part.mean()).square().sum()) for part in base.split(runs)))
    if max(runs) == 1 or not apart:
        assert warned == ()
    else:
        (text,) = warned
        assert "tied" in text
        said = float(re.search(r"beyond (\S+) of", text)[1])
        assert said == pytest.approx(spread / float(base.norm()), rel=0.5)  # one digit


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"norm": 5.01}, "norm 5.01 of the base, 5 of its singular values"),
        ({"residual": 1.1e-5}, "singular values off by 1.1e-05"),
        ({"residual": math.nan}, "singular values off by nan"),
        ({"objective": 1 - 1.1e-5}, "1 - objective 1.1e-05"),
        ({"objective": 1 + 1.1e-5}, "1 - objective -1.1e-05"),
        ({"distance": 2.01}, "distance 2.01 instead of 2"),
        ({"residual": 0.9e-5, "objective": 1 - 0.9e-5, "distance": 2 * (1 + 0.9e-5), "norm": 5 * (1 + 0.9e-5)}, None),
    ],
)
def test_each_number_of_a_match_is_held_to_its_bound(changes, fault):
    sigma = torch.tensor([4.0, 3.0]).double()
    numbers = {"norm": 5.0, "gap": 2.0, "distance": 2.0, "objective": 1.0, "residual": 0.0, **changes}
    assert Match(sigma.diag(), sigma, 2, sigma, 2, **numbers).find_fault() == fault


@pytest.mark.parametrize("shape", [(60, 40), (130, 110)])
def test_a_rotated_base_and_a_scaled_one(shape):
    """An orthogonal equivalence of W_base has no drift and stays as it is; a multiple of W_base becomes W_base."""
    generator = torch.Generator().manual_seed(0)
    W_base = torch.randn(*shape, generator=generator, dtype=torch.float64)
    R, P = (torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q for d in shape)
    turned = R @ W_base @ P
    found = match_spectrum(W_base, turned)
    assert torch.allclose(W_base + found.value, turned, atol=1e-11)
    assert max(found.spectral_drift, found.departure) <= 1e-12
    assert match_spectrum(W_base, 3.0 * W_base).edit_norm <= 1e-10
    assert match_spectrum(torch.ones(1, 1), torch.full((1, 1), 2.0)).edit_norm == 0.0


def test_beta_goes_from_the_base_through_w_e():
    generator = torch.Generator().manual_seed(0)
    W_base, W_ft = (torch.randn(50, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    one = match_spectrum(W_base, W_ft)
    for beta in (0.25, 2.0):
        other = match_spectrum(W_base, W_ft, beta=beta)
        assert torch.allclose(other.value, beta * one.value)
        assert (other.distance, other.objective, other.orthogonality) == (
            one.distance,
            one.objective,
            one.orthogonality,
        )


@pytest.mark.parametrize("scale", [1e-300, 1e-38, 1e30, 1e300])
def test_numbers_at_the_ends_of_the_range(scale):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if scale in (1e-300, 1e300) else torch.float32
    one, other = (torch.randn(20, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    found = match_spectrum((one * scale).to(dtype), (other * scale).to(dtype))
    plain = match_spectrum(one, other)
    assert torch.allclose(found.value.double() / scale, plain.value, atol=1e-5)
    assert found.distance / scale == pytest.approx(plain.distance, rel=1e-5)


def test_a_cache_changes_no_bit_and_is_asked_for_everything():
    W_base, W_ft = make_delta("noise", 130, 100, 0), make_delta("gentle", 130, 100, 1)
    cache: DecompositionCache = {}
    first = match_matrix(W_base, W_ft, 1.0, cache)
    kept = {key: (found.V.clone(), found.sigma.clone()) for key, found in cache.items()}
    second = match_matrix(W_base, W_ft, 2.0, cache)
    assert torch.equal(first.value, match_spectrum(W_base, W_ft).value)
    assert torch.equal(second.value, match_spectrum(W_base, W_ft, beta=2.0).value)
    assert all(torch.equal(cache[key].V, V) and torch.equal(cache[key].sigma, s) for key, (V, s) in kept.items())
    assert len(cache) == 2


W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def test_equal_weights_are_a_zero_delta():
    with pytest.raises(pome.ZeroDelta, match="equals W_base"):
        match_spectrum(W, W.double())
    with pytest.raises(pome.ZeroDelta):
        match_spectrum(torch.zeros(6, 4), torch.zeros(6, 4))


@pytest.mark.parametrize(
    ("W_base", "W_ft", "said"),
    [
        (torch.zeros(6, 4), W, "W_base is zero"),
        (W, torch.zeros(6, 4), "W_ft is zero"),
        (W, W.T, "one shape"),
        (W, W * math.inf, "W_ft holds NaN or infinity"),
        (W * math.nan, W, "W_base holds NaN"),
        (W, W[0], "m x n"),
    ],
    ids=["zero base", "zero ft", "other shape", "infinity", "nan", "vector"],
)
def test_sides_that_have_no_nearest_matrix_are_refused(W_base, W_ft, said):
    with pytest.raises(ValueError, match=said):
        match_spectrum(W_base, W_ft)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, True])
def test_a_beta_that_is_no_positive_number_is_refused(beta):
    with pytest.raises(ValueError, match="beta"):
        match_spectrum(W, 2 * W, beta=beta)


def test_an_edit_out_of_the_range_of_floats_is_refused():
    with pytest.raises(ValueError, match="out of the range"):
        match_spectrum(W * 1e38, W.flip(0) * 1e38, beta=1e6)


@pytest.mark.parametrize("fault", ["U", "V", "sigma", "order", "nan", "driver"])
def test_a_solver_that_is_wrong_hands_over(monkeypatch, fault):
    """Each factor, the spectrum and their order are held by the certificate; the next solver is asked.

    A driver that does not sort its values was reported (pytorch/pytorch#120912).
    """
    W_base, W_ft = make_delta("gentle", 130, 100, 0), make_delta("inverse-root", 130, 100, 1)
    right = equivalence.decompose_squares(W_ft.double())

    def decompose(tall):
        if fault == "driver":
            raise torch.linalg.LinAlgError("it does not converge")
        U, V, sigma = right.U.clone(), right.V.clone(), right.sigma.clone()
        if fault in "UV":
            (U if fault == "U" else V)[:, 3] *= 1.01
        elif fault == "sigma":
            sigma *= 1.001
        elif fault == "order":
            U, V, sigma = U.flip(1), V.flip(1), sigma.flip(0)
        else:
            U[0, 0] = math.nan
        return equivalence.replace(right, U=U, V=V, sigma=sigma)

    monkeypatch.setattr(equivalence, "RUNGS", (("gram-float64", decompose), equivalence.RUNGS[1]))
    found = match_spectrum(W_base, W_ft)
    assert found.solver == "svd-float64" and "gram-float64 handed over" in found.warnings[0]
    assert_nearest(found, W_base, W_ft)
    monkeypatch.setattr(equivalence, "RUNGS", (("gram-float64", decompose),))
    with pytest.raises(pome.Unsolved, match="no solver could be certified"):
        match_spectrum(W_base, W_ft)


@pytest.mark.parametrize(
    "failure, tries",
    [(torch.cuda.OutOfMemoryError("CUDA out of memory"), 1), (RuntimeError("cusolver error: 7"), 2),
     (NotImplementedError("The operator 'aten::linalg_eigh' is not implemented for the MPS device"), 2)],
)  # fmt: skip
def test_the_cpu_takes_over_where_an_accelerator_fails(monkeypatch, failure, tries):
    assert equivalence.list_places(torch.device("cuda:0")) == [torch.device("cuda:0"), torch.device("cpu")]
    assert equivalence.list_places(torch.device("cpu")) == [torch.device("cpu")]
    accelerator = torch.device("cpu", 0)  # stands for one: another name for what is there
    monkeypatch.setattr(equivalence, "list_places", lambda device: [accelerator, device])
    prepare, asked = equivalence.Pair.prepare, []

    def fail_there(W_base, W_ft, place, exponent, wide):
        asked.append(place)
        if place == accelerator:
            raise failure
        return prepare(W_base, W_ft, place, exponent, wide)

    monkeypatch.setattr(equivalence.Pair, "prepare", fail_there)
    W_base, W_ft = make_delta("gentle", 130, 100, 0), make_delta("inverse-root", 130, 100, 1)
    found = match_spectrum(W_base, W_ft)
    assert asked == [accelerator] * tries + [torch.device("cpu")]
    assert len(found.warnings) == tries and all(str(failure) in text for text in found.warnings)
    assert_nearest(found, W_base, W_ft)


def test_a_driver_for_values_that_does_not_converge_is_replaced_by_squares(monkeypatch):
    """As LAPACK's was seen not to for cumulative products of one row (pytorch/pytorch#181641)."""
    generator = torch.Generator().manual_seed(0)
    row = 2.0 * torch.rand(13, generator=generator)
    W_base = torch.cumprod(row.repeat(16, 1), 0)
    W_ft = W_base + torch.randn(16, 13, generator=generator)
    usual = match_spectrum(W_base, W_ft)
    assert_nearest(usual, W_base, W_ft)

    def fail(_):
        raise torch.linalg.LinAlgError("The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svdvals", fail)
    found = match_spectrum(W_base, W_ft)
    # The squares of the least values are lost beside that of the largest: 1e-8 of it.
    assert torch.allclose(found.sigma, usual.sigma, rtol=0, atol=1e-7 * float(usual.sigma[0]))
    assert torch.allclose(found.value, usual.value, rtol=0, atol=1e-6 * float(usual.sigma[0]))


def test_a_condition_number_of_ten_to_the_fifteen():
    """Weights of which a rotation by SVD was reported to be imprecise (s1dlx/meh#50), on either side."""
    W_base = plant(torch.logspace(0, -15, 128, dtype=torch.float64), 128, 128, 0, torch.float64)
    for W_ft in (W_base + 1e-3 * plant(torch.ones(128), 128, 128, 1, torch.float64), W_base.flip(0)):
        assert_nearest(match_spectrum(W_base, W_ft), W_base, W_ft)
        assert_nearest(match_spectrum(W_ft, W_base), W_ft, W_base)


def test_wrong_values_of_the_base_are_found(monkeypatch):
    W_base, W_ft = make_delta("gentle", 130, 100, 0), make_delta("inverse-root", 130, 100, 1)
    found = equivalence.find_values(W_base.double())
    monkeypatch.setattr(equivalence, "find_values", lambda _: equivalence.replace(found, sigma=found.sigma * 1.0001))
    with pytest.raises(pome.Unsolved, match="of its singular values"):
        match_spectrum(W_base, W_ft)
