"""Rules for k and alpha, and the noise floor, against definitions and published numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pome.kernel.equalize import equalize, equalize_matrix
from pome.kernel.noise import storage_noise_floor
from pome.kernel.rank import (
    Spectrum,
    count_above,
    count_effective,
    count_energy,
    count_gavish_donoho,
    count_rank,
    marchenko_pastur_median,
)
from pome.kernel.spectral_edge import find_edge
from support.recipes import make_recipe, make_rule
from support.reference import plant

spectra = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


def see(sigma, shape=(100, 100)):
    return Spectrum(sigma, sigma.numel(), shape)


@given(spectra, st.floats(0.01, 1.0))
def test_energy_keeps_the_least_k_that_holds_the_share(sigma, energy):
    k = count_energy(see(sigma), energy)
    held = [float(sigma[:i].square().sum() / sigma.square().sum()) for i in range(sigma.numel() + 1)]
    # 1e-12: the sums are taken in another order than the rule takes them
    assert held[k] >= energy - 1e-12
    assert held[k - 1] < energy + 1e-12


@given(spectra, st.floats(1e-4, 1e4))
def test_noise_floor_counts_what_lies_above(sigma, floor):
    assert count_above(sigma, floor) == sum(s > floor for s in sigma.tolist())


# The table of omega(beta) in Gavish and Donoho 2014 (its cubic fit is 0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43).
def test_equal_directions_hold_their_share_exactly():
    for n in range(10, 151):
        sigma = torch.ones(n, dtype=torch.float64)
        assert [count_energy(see(sigma), i / n) for i in range(1, n + 1)] == list(range(1, n + 1))


@pytest.mark.parametrize("aspect", [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_gavish_donoho_threshold_follows_the_published_fit(aspect):
    n = 2000
    fit = 0.56 * aspect**3 - 0.95 * aspect**2 + 1.82 * aspect + 1.43
    # A spectrum whose median is 1, also without its few values around the threshold, shows where that lies.
    sigma = torch.cat([torch.linspace(fit + 0.2, fit - 0.2, 100, dtype=torch.float64), torch.ones(n - 100)])
    k = count_gavish_donoho(see(sigma, (round(1000 / aspect), 1000)))
    assert abs(float(sigma[k]) - fit) < 0.02  # the accuracy the paper states for its fit


def test_gavish_donoho_is_four_over_root_three_times_the_noise_for_square_matrices():
    # The paper's headline: lambda(1) = 4 / sqrt(3), omega(1) = 2.858.
    assert 4 / math.sqrt(3) / math.sqrt(marchenko_pastur_median(1.0)) == pytest.approx(2.858, abs=1e-3)


@pytest.mark.parametrize("aspect", [0.2, 0.6, 1.0])
def test_marchenko_pastur_median_is_that_of_a_random_matrix(aspect):
    m = 1500
    noise = torch.randn(m, round(aspect * m), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    observed = torch.linalg.svdvals(noise).square().div(m).median()
    # The median of n eigenvalues fluctuates by about 1/n; torch's median is the lower of two.
    assert marchenko_pastur_median(aspect) == pytest.approx(float(observed), rel=0.02)


def test_gavish_donoho_finds_planted_directions():
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(300, 200, generator=generator)
    strong = plant([200.0] * 7 + [0.0] * 193, 300, 200)  # the noise ends at about sqrt(300) + sqrt(200) = 31
    assert equalize(strong + noise, rank_rule="gavish-donoho").k == 7


@given(spectra)
def test_effective_rank_is_the_exponential_of_the_entropy(sigma):
    share = [s / float(sigma.sum()) for s in sigma.tolist()]
    assert abs(count_effective(see(sigma)) - math.exp(-sum(p * math.log(p) for p in share))) <= 0.5 + 1e-9


def test_effective_rank_of_equal_values_is_their_number():
    sigma = torch.tensor([2.0] * 5 + [0.0] * 3, dtype=torch.float64)
    assert count_effective(see(sigma)) == 5


def test_numerical_rank_counts_down_to_the_root_of_float64():
    tolerance = math.sqrt(100 * 2.0**-52)
    sigma = torch.tensor([1.0, 1.01 * tolerance, 0.99 * tolerance], dtype=torch.float64)
    assert count_rank(sigma, (100, 3)) == 2


@pytest.mark.parametrize("rule", ["ratio", "energy", "noise-floor", "gavish-donoho", "effective"])
def test_every_rule_stays_within_one_and_the_rank(rule):
    sigma = torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float64)
    for floor in (0.0, 10.0):
        k = make_rule(rule, floor, rank_ratio=1e-6, energy=1.0).choose(sigma, 4, (8, 8))
        assert 1 <= k <= 4


@pytest.mark.parametrize(("ratio", "rank", "k"), [(0.5, 5, 2), (0.5, 7, 4), (0.25, 1, 1), (1.0, 9, 9)])
def test_ratio_rounds_as_python_does(ratio, rank, k):
    sigma = torch.ones(rank, dtype=torch.float64)
    assert make_rule(rank_ratio=ratio).choose(sigma, rank, (rank, rank)) == k


def test_rank_beside_the_default_rule_is_fixed_and_bounded_by_the_rank():
    delta = plant([3.0, 2.0, 1.0] + [0.0] * 9, 20, 12)
    assert [equalize(delta, rank=n).k for n in (1, 2, 3, 50)] == [1, 2, 3, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"rank_ratio": 0.0},
        {"rank_ratio": 1.5},
        {"rank": 0},
        {"rank_rule": "fixed"},
        {"rank_rule": "energy", "energy": 0.0},
        {"rank_rule": "noise-floor"},
        {"rank_rule": "noise-floor", "noise_floor": -1.0},
        {"rank_rule": "best"},
        {"scale": "loud"},
        {"beta": math.nan},
        {"beta": 0.0},
        {"beta": "1"},
        {"beta": True},
        {"rank": 2.5},
        {"rank": True},
        {"rank": "3"},
        {"rank": 3, "rank_rule": "energy"},
        {"rank_ratio": None},
        {"rank_ratio": True},
        {"energy": "0.5"},
        {"noise_floor": math.nan},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError):
        equalize_matrix(torch.eye(3), make_recipe(**options))


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("frobenius", math.sqrt(14.0 / 2)),
        ("unit", 1.0),
        ("rms", math.sqrt(6 / 4)),
        ("mean", 2.5),
        ("spectral", 3.0),
    ],
)
def test_scales(scale, expected):
    delta = plant([3.0, 2.0, 1.0, 0.0], 6, 4, dtype=torch.float64)
    edit = equalize(delta, scale=scale, beta=1.5, rank=2)
    assert edit.alpha == pytest.approx(1.5 * expected, rel=1e-12)
    # The edit has k singular values of alpha each.
    assert torch.linalg.svdvals(edit.value)[:2].tolist() == pytest.approx([edit.alpha] * 2, rel=1e-12)
    assert edit.edit_norm == pytest.approx(float(edit.value.norm()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_noise_floor_is_the_norm_of_real_rounding_noise(dtype):
    exact = torch.randn(400, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.02
    stored = exact.to(dtype)
    actual = float(torch.linalg.svdvals(stored.double() - exact)[0])
    # The edge of the noise's spectrum fluctuates by about n^(-2/3), 2 % here; the uniform law of rounding within an
    # ulp is an assumption good to a few per cent.
    assert storage_noise_floor(stored) == pytest.approx(actual, rel=0.05)


def test_noise_floor_of_subnormals_and_zeros_is_the_least_ulp():
    least = 2.0**-24  # float16: the spacing of its subnormals, and of its smallest normals
    expected = least / math.sqrt(12) * (math.sqrt(2) + math.sqrt(3))
    for value in (0.0, least, 5 * least, 2.0**-14):
        weight = torch.full((2, 3), value, dtype=torch.float16)
        assert storage_noise_floor(weight) == pytest.approx(expected, rel=1e-12)


@given(st.integers(-14, 15), st.integers(1, 40), st.integers(1, 40))
def test_noise_floor_takes_the_ulp_of_each_exponent(exponent, m, n):
    weight = torch.full((m, n), 1.5 * 2.0**exponent, dtype=torch.float16)
    ulp = 2.0 ** (exponent - 10)
    # The edge is the minimum of a function found by iteration: good to the root of float64's rounding, 1.5e-8.
    assert storage_noise_floor(weight) == pytest.approx(ulp / math.sqrt(12) * (math.sqrt(m) + math.sqrt(n)), rel=1e-6)


def test_noise_floor_refuses_what_is_no_matrix_of_floats():
    for wrong in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, dtype=torch.int8)):
        with pytest.raises(ValueError):
            storage_noise_floor(wrong)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("heavy", [1, 5, 60])
def test_noise_floor_follows_outlier_rows_and_columns(axis, heavy):
    exact = torch.randn(500, 300, generator=torch.Generator().manual_seed(heavy), dtype=torch.float64)
    exact.narrow(axis, 0, heavy).mul_(40)
    stored = exact.bfloat16()
    actual = float(torch.linalg.svdvals(stored.double() - exact)[0])
    # 5 % as above for the edge. A row of Gaussian weights, few of them large, varies like some sixty equal entries:
    # the floor includes 30 % for one such row. Even noise of the same norm would end far lower.
    assert 0.95 * actual <= storage_noise_floor(stored) <= 1.35 * actual


@pytest.mark.parametrize("shape", [(1, 5), (7, 3), (12, 12), (30, 9)])
def test_edge_for_variances_that_are_products_is_that_of_the_dyson_equation(shape):
    generator = torch.Generator().manual_seed(shape[0])
    r, c = (torch.rand(side, generator=generator, dtype=torch.float64).pow(3) + 1e-3 for side in shape)
    v = r[:, None] * c
    edge, _ = find_edge(*(torch.stack([v.sum(axis), v.square().sum(axis)]) for axis in (1, 0)))

    def is_above(z):  # whether 1 / x = z - v y, 1 / y = z - v^T x has a positive solution
        x, y = torch.zeros_like(r), torch.zeros_like(c)
        for _ in range(1000):
            left, below = z - v @ y, z - v.T @ x
            if not (bool((left > 0).all()) and bool((below > 0).all())):
                return False
            x, y = 1 / left, 1 / below
        return True

    # Below the edge by a share e the iteration fails after some pi / sqrt(e) steps.
    assert is_above(1.001 * edge) and not is_above(0.999 * edge)
