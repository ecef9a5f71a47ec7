"""The numbers of the paired bootstrap, held to numpy's quantiles and to Student's distribution by mpmath."""

from __future__ import annotations

import math
from statistics import NormalDist

import mpmath
import numpy as np
import pytest
import torch

from pome.sweeping import bootstrap
from pome.sweeping.bootstrap import Difference, beats, compare, resample, spread_levels
from pome.sweeping.scorers.command import Scored

GENERATOR_SEED = 20251006  # of the draws: intervals that a journal holds must not change when a sweep goes on


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, from the incomplete beta function."""

    def excess(t: mpmath.mpf) -> mpmath.mpf:
        tail = mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t**2), regularized=True) / 2
        return tail - mpmath.mpf("0.025")

    return float(mpmath.findroot(excess, 2.0 + 3.0 / freedom))


@pytest.mark.parametrize("n", [6, 10, 21, 101, 1001, 10001])
def test_levels_are_those_of_student_s_t_widened_for_the_missing_degree(n: int) -> None:
    low, high = spread_levels(n)
    assert low == pytest.approx(1.0 - high, abs=1e-15)
    t = NormalDist().inv_cdf(high) / math.sqrt(n / (n - 1))
    exact = student_quantile(n - 1)
    # The first term that the expansion leaves out is 2.6 / (n - 1)^3; the documented 1 % is for the smallest n.
    assert t == pytest.approx(exact, abs=4.0 / (n - 1) ** 3 + 1e-11)
    assert t == pytest.approx(exact, rel=0.01)


def test_two_examples_are_read_at_their_ends() -> None:
    low, high = spread_levels(2)
    assert 0.0 <= low < 1e-9 < 1.0 - 1e-9 < high <= 1.0


def make_scores(n: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(candidates, reference, weights): arrays of (n, columns), (n,), (n,) in float64."""
    generator = np.random.default_rng(seed)
    reference = generator.normal(size=n)
    return (
        reference[:, None] + generator.normal(0.1, 0.3, size=(n, columns)),
        reference,
        generator.integers(1, 20, n).astype(float),
    )


def score(values: np.ndarray, weights: np.ndarray | None) -> Scored:
    return Scored(
        float(np.average(values, weights=weights)),
        tuple(values.tolist()),
        tuple(weights.tolist()) if weights is not None else None,
    )


@pytest.mark.parametrize("block", [1, 40, 7 * 3999, bootstrap.BLOCK])
def test_resamples_are_means_of_drawn_rows(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """However many indices are drawn at a time."""
    monkeypatch.setattr(bootstrap, "BLOCK", block)
    values, _, weights = make_scores(7, 3)
    drawn = torch.randint(7, (4000, 7), generator=torch.Generator().manual_seed(GENERATOR_SEED)).numpy()
    wanted = (values[drawn] * weights[drawn][:, :, None]).sum(1) / weights[drawn].sum(1)[:, None]
    means = resample(torch.from_numpy(values), torch.from_numpy(weights))
    np.testing.assert_allclose(means.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 50])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_intervals_are_numpys(n: int, weighted: bool) -> None:
    candidates, reference, weights = make_scores(n, 4, seed=n)
    candidates[:, 2] = reference  # no difference and no spread: it must not reach into the others' intervals
    used = weights if weighted else None
    found = compare([score(column, used) for column in candidates.T], score(reference, used))
    pairs = candidates - reference[:, None]
    means = resample(torch.from_numpy(pairs), torch.from_numpy(weights if weighted else np.ones(n))).numpy()
    center, spread = np.average(pairs, axis=0, weights=used), means.std(0, ddof=1)
    moving = spread > 0.0
    steps = np.abs(means - center)[:, moving] / spread[moving]
    reach = np.quantile(steps.max(1), 0.95) * math.sqrt(n / (n - 1)) * spread
    ends = np.quantile(means, spread_levels(n), axis=0)
    assert moving.tolist() == [True, True, False, True]
    for at, difference in enumerate(found):
        assert difference.delta == pytest.approx(center[at], abs=1e-12)
        assert difference.interval == pytest.approx(tuple(ends[:, at]), abs=1e-12)
        assert difference.best_interval == pytest.approx((center[at] - reach[at], center[at] + reach[at]), abs=1e-12)


def test_candidates_without_the_reference_s_examples_have_no_interval() -> None:
    reference = Scored(0.5, (0.5, 0.5, 0.5), (1.0, 2.0, 3.0))
    others = {
        "no examples": Scored(0.6),
        "another number": Scored(0.6, (0.6, 0.6), (1.0, 2.0)),
        "other weights": Scored(0.6, (0.6, 0.6, 0.6), (1.0, 2.0, 4.0)),
        "no weights": Scored(0.6, (0.6, 0.6, 0.6)),
    }
    fitting = Scored(0.7, (0.6, 0.7, 0.8), (1.0, 2.0, 3.0))
    *alone, paired = compare([*others.values(), fitting], reference)
    assert [(found.interval, found.best_interval) for found in alone] == [(None, None)] * 4
    assert [found.delta for found in alone] == pytest.approx([0.1] * 4)
    assert paired == compare([fitting], reference)[0]
    assert paired.interval is not None and paired.delta == pytest.approx(0.2)


@pytest.mark.parametrize(("examples", "has_interval"), [((0.5,), False), ((0.5, 0.75), True)])
def test_an_interval_takes_two_examples(examples: tuple[float, ...], has_interval: bool) -> None:
    (found,) = compare([Scored(0.5, examples)], Scored(0.25, tuple(0.5 * x for x in examples)))
    assert (found.interval is not None, found.best_interval is not None) == (has_interval, has_interval)


def test_a_reference_without_examples_gives_differences_alone() -> None:
    assert compare([Scored(0.5, (0.5, 0.5))], Scored(0.25)) == [Difference(0.25)]
    assert compare([], Scored(0.25, (0.25, 0.25))) == []


@pytest.mark.parametrize(
    ("delta", "best_interval", "higher", "lower"),
    [
        (0.5, None, True, False),
        (-0.5, None, False, True),
        (0.0, None, False, False),
        (0.5, (0.25, 0.75), True, False),
        (0.5, (0.0, 1.0), False, False),  # an interval that holds zero, at its end too, decides nothing
        (0.5, (-0.25, 1.25), False, False),
        (-0.5, (-0.75, -0.25), False, True),
        (-0.5, (-1.0, 0.0), False, False),
    ],
)
def test_better_is_beyond_zero_on_the_right_side(
    delta: float, best_interval: tuple[float, float] | None, higher: bool, lower: bool
) -> None:
    # The interval of the candidate alone has no say: it does not allow for the choice.
    difference = Difference(delta, (delta, delta), best_interval)
    assert (beats(difference, minimize=False), beats(difference, minimize=True)) == (higher, lower)
