"""Rank rules against definitions and published numbers."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pome.choices import RANK_RULES, RankRuleName
from pome.kernel import rank
from pome.kernel.equalize import equalize, equalize_matrix
from pome.kernel.rank import (
    Spectrum,
    count_above,
    count_above_noise,
    count_effective,
    count_energy,
    count_gavish_donoho,
    count_rank,
    marchenko_pastur_median,
    noise_margin,
)
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


def test_equal_directions_hold_their_share_exactly():
    for n in range(10, 151):
        sigma = torch.ones(n, dtype=torch.float64)
        assert [count_energy(see(sigma), i / n) for i in range(1, n + 1)] == list(range(1, n + 1))


# The table of omega(beta) in Gavish and Donoho 2014 (its cubic fit is 0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43).
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


@pytest.mark.parametrize("aspect", [0.003, 0.05, 0.25, 0.5, 0.77, 0.999, 1.0])
def test_marchenko_pastur_median_halves_the_law(aspect):
    """The mass below it by Gauss-Legendre quadrature, over the angle that makes the density smooth."""
    low, high = (1 - aspect**0.5) ** 2, (1 + aspect**0.5) ** 2
    share = (marchenko_pastur_median(aspect) - low) / (high - low)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    t = (nodes + 1) / 2 * math.asin(math.sqrt(share))
    x = low + (high - low) * np.sin(t) ** 2
    slope = 2 * (high - low) * np.sin(t) * np.cos(t)
    density = np.sqrt((high - x) * (x - low)) / (2 * math.pi * aspect * x)
    mass = float((weights * density * slope).sum()) * math.asin(math.sqrt(share)) / 2
    # The step of the tabulated angle is 8e-5: taking its next point instead of interpolating would be off by that.
    # What remains is the trapezoid rule's error, of the order of the squared step.
    assert mass == pytest.approx(0.5, abs=1e-7)


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


BY_SPECTRUM = [("energy", {"energy": 0.8}), ("noise-floor", {}), ("gavish-donoho", {}), ("effective", {})]


@pytest.mark.parametrize(("rule", "options"), BY_SPECTRUM)
@given(sigma=spectra, slack=st.floats(1e-6, 1e-3), seed=st.integers(0, 99))
def test_the_two_answers_with_slack_enclose_that_of_every_spectrum_within_it(rule, options, sigma, slack, seed):
    asked, n = make_rule(rule, 20.0, **options), sigma.numel()
    fewer, more = sorted(asked.choose(sigma, n, (n, n + 3), way * slack) for way in (1, -1))
    draws = 2 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    for errors in (draws, draws.sign(), torch.linspace(1, -1, n, dtype=torch.float64).sign()):
        # 0.99: the slack is a bound to first order, and leaves out its square.
        other = (sigma * (1 + 0.99 * slack * errors)).sort(descending=True).values
        assert fewer <= asked.choose(other, n, (n, n + 3)) <= more


@pytest.mark.parametrize("slack", [1e-6, 1e-4, 1e-2])
def test_slack_moves_a_floor_by_itself(slack):
    sigma = torch.tensor([9.0, 1 + 1.1 * slack, 1 + 0.9 * slack, 1 - 0.9 * slack, 1 - 1.1 * slack]).double()
    assert [count_above(sigma, 1.0, way * slack) for way in (1, 0, -1)] == [2, 3, 4]
    margin = noise_margin((40, 30))
    for way, k in ((1, 2), (0, 3), (-1, 4)):
        assert count_above_noise(Spectrum(sigma * margin, 5, (40, 30), 1.0, way * slack)) == k
        assert make_rule("noise-floor", 1.0).choose(sigma * margin, 5, (40, 30), way * slack) == k


@pytest.mark.parametrize("slack", [1e-6, 1e-4, 1e-3])
def test_slack_moves_an_energy_by_twice_itself(slack):
    """Squares move by twice the relative error of their roots."""
    sigma = torch.ones(100, dtype=torch.float64)
    for share, ks in ((0.5 / (1 + 1.9 * slack), (51, 50, 50)), (0.5 / (1 + 2.1 * slack), (50, 50, 50))):
        answers = tuple(count_energy(Spectrum(sigma, 100, (100, 100), 0.0, way * slack), share) for way in (1, 0, -1))
        assert answers == ks


@pytest.mark.parametrize("slack", [1e-6, 1e-4, 1e-3])
def test_slack_moves_the_hard_threshold_by_twice_itself(slack):
    """Once for the value beside the threshold, once for the median that the threshold is a multiple of."""
    factor = 4 / math.sqrt(3) / math.sqrt(marchenko_pastur_median(1.0))
    for inside, expected in ((1.9, (1, 2, 2)), (2.1, (2, 2, 2))):
        sigma = torch.tensor([50.0, factor * (1 + inside * slack), *[1.0] * 98], dtype=torch.float64)
        answers = [count_gavish_donoho(Spectrum(sigma, 100, (100, 100), 0.0, way * slack)) for way in (1, 0, -1)]
        assert tuple(answers) == expected


def test_slack_moves_the_effective_rank_by_the_change_of_its_entropy():
    # Entropy changes by at most slack (log n + 1): of a hundred equal values exp(1e-3 (log 100 + 1)) = 1.0056.
    sigma = torch.ones(100, dtype=torch.float64)
    for slack, k in ((1e-3, 101), (-1e-3, 99), (8e-4, 100), (-8e-4, 100)):
        assert count_effective(Spectrum(sigma, 100, (100, 100), 0.0, slack)) == k


def test_every_choice_of_a_rule_has_its_function_and_every_function_its_choice():
    assert list(rank.RULES) == list(RANK_RULES)
    assert {name for name, choice in RANK_RULES.items() if choice.number} == {
        name for name, (_, number) in rank.RULES.items() if number
    }
    assert get_args(RankRuleName) == tuple(RANK_RULES)


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
