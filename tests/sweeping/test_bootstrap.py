"""Paired bootstrap: intervals that hold what they promise."""

from __future__ import annotations

import math
import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.sweeping import bootstrap
from pome.sweeping.bootstrap import DRAWS, MeanDifference, beats, compare, resample
from pome.sweeping.scorers.base import Scored


def mean(values, weights=None):
    weights = weights or [1.0] * len(values)
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def score(values, weights=None):
    return Scored(mean(values, weights), tuple(values), tuple(weights) if weights else None)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.1, 9)), min_size=3, max_size=40))
def test_resamples_are_weighted_means_of_the_same_draws(rows):
    values = torch.tensor([[value, 2.0 * value + 1.0] for value, _ in rows], dtype=torch.float64)
    means = resample(values, torch.tensor([weight for _, weight in rows], dtype=torch.float64))
    assert means.shape == (DRAWS, 2)
    torch.testing.assert_close(means[:, 1], 2.0 * means[:, 0] + 1.0)  # the same draws for both columns
    assert float(means[:, 0].min()) >= min(value for value, _ in rows) - 1e-9
    assert float(means[:, 0].max()) <= max(value for value, _ in rows) + 1e-9


def test_the_spread_of_the_resamples_is_the_standard_error():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 1, generator=generator, dtype=torch.float64)
    means = resample(values, torch.ones(300, dtype=torch.float64))
    assert float(means.std()) == pytest.approx(float(values.std(unbiased=False)) / math.sqrt(300), rel=0.05)
    assert float(means.mean()) == pytest.approx(float(values.mean()), abs=4e-3)


@pytest.mark.parametrize(("kind", "n"), [("accuracy", 400), ("loss", 60), ("loss", 200), ("weighted", 120)])
def test_a_95_per_cent_interval_holds_the_true_difference_in_95_per_cent(monkeypatch, kind, n):
    """1,000 draws of paired scores whose true difference is known. Binomial: 93 to 97 % is 3 standard errors."""
    monkeypatch.setattr(bootstrap, "DRAWS", 1000)
    dice = random.Random(kind + str(n))
    held = 0
    for _ in range(1000):
        if kind == "accuracy":  # both right 60 %, only one of them 12 and 8 %
            cases = dice.choices([(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)], [60, 12, 8, 20], k=n)
            ours, theirs = zip(*cases, strict=True)
            true, weights = 0.04, None
        else:
            hard = [dice.expovariate(1.0) for _ in range(n)]
            ours = tuple(x + dice.gauss(-0.05, 0.3) for x in hard)
            theirs = tuple(hard)
            true = -0.05
            weights = [dice.randint(1, 20) for _ in range(n)] if kind == "weighted" else None
        (found,) = compare([score(ours, weights)], score(theirs, weights))
        low, high = found.interval
        held += low <= true <= high
    assert 930 <= held <= 970


def test_the_interval_of_the_best_of_many_has_at_most_5_per_cent_false_wins(monkeypatch):
    """24 candidates that differ from the reference by noise alone: one at least seems better in most draws, and the
    interval that allows for the choice says so in 5 % of them only (one-sided: about half of that)."""
    monkeypatch.setattr(bootstrap, "DRAWS", 500)
    generator = torch.Generator().manual_seed(1)
    plain = adjusted = 0
    for _ in range(200):
        reference = torch.randn(150, generator=generator).tolist()
        tried = [[x + 0.2 * e for x, e in zip(reference, torch.randn(150, generator=generator).tolist(), strict=True)]
                 for _ in range(24)]  # fmt: skip
        found = compare([score(values) for values in tried], score(reference))
        best = max(found, key=lambda difference: difference.delta)
        plain += best.interval[0] > 0.0
        adjusted += beats(best, minimize=False)
    assert adjusted <= 0.08 * 200 < 0.2 * 200 < plain


def test_the_interval_of_the_best_is_the_max_t_bootstrap():
    """Both of its ends, by the definition: the mean difference plus and minus q standard errors, q the 95 % quantile of
    the largest |t| of any candidate, widened by sqrt(n / (n - 1)). Computed here draw by draw in numpy."""
    dice = random.Random(3)
    n = 12
    theirs = [dice.gauss(0.0, 1.0) for _ in range(n)]
    ours = [[x + dice.gauss(shift, spread) for x in theirs] for shift, spread in ((0.3, 0.2), (-0.4, 1.0), (0.0, 0.5))]
    found = compare([score(values) for values in ours], score(theirs))
    pairs = numpy.array(ours).T - numpy.array(theirs)[:, None]
    generator = torch.Generator().manual_seed(bootstrap.SEED)
    drawn = torch.randint(n, (DRAWS, n), generator=generator).numpy()
    means = pairs[drawn].mean(1)
    error = means.std(0, ddof=1)
    q = numpy.quantile((abs(means - pairs.mean(0)) / error).max(1), 0.95) * math.sqrt(n / (n - 1))
    for difference, center, width in zip(found, pairs.mean(0), q * error, strict=True):
        assert difference.best_interval == pytest.approx((center - width, center + width), rel=1e-9)


@pytest.mark.parametrize("minimize", [False, True])
def test_a_candidate_beats_only_if_its_whole_interval_is_better(minimize):
    """An interval that holds zero at either end decides nothing, whichever sign is the better one."""
    better, worse = ((-0.2, -0.1), (0.1, 0.2)) if minimize else ((0.1, 0.2), (-0.2, -0.1))
    for interval, expected in ((better, True), (worse, False), ((-0.1, 0.2), False), ((-0.2, 0.1), False)):
        assert beats(MeanDifference(sum(interval) / 2, interval, interval), minimize) is expected
    touching = (0.0, 0.2) if not minimize else (-0.2, 0.0)
    assert not beats(MeanDifference(0.1, touching, touching), minimize)


def test_the_difficulty_of_an_example_cancels_in_pairs():
    hard = [float(i) for i in range(100)]
    easier = [x - 0.1 + 0.01 * (-1) ** i for i, x in enumerate(hard)]
    (found,) = compare([score(easier)], score(hard))
    assert found.delta == pytest.approx(-0.1)
    assert -0.105 < found.interval[0] < found.interval[1] < -0.095
    assert beats(found, minimize=True) and not beats(found, minimize=False)


def test_without_examples_there_is_no_interval_and_the_score_decides():
    found = compare([Scored(0.6), Scored(0.4, (0.4, 0.4))], Scored(0.5, (0.5, 0.5, 0.5)))
    assert [difference.interval for difference in found] == [None, None]
    assert [beats(difference, minimize=False) for difference in found] == [True, False]
    assert [beats(difference, minimize=True) for difference in found] == [False, True]


def test_equal_models_do_not_beat_each_other():
    same = score([1.0, 0.0, 1.0, 1.0])
    (found,) = compare([same], same)
    assert (found.delta, found.interval) == (0.0, (0.0, 0.0))
    assert not beats(found, minimize=False) and not beats(found, minimize=True)


def test_the_same_scores_give_the_same_interval():
    ours, theirs = score([1.0, 0.5, 0.25, 0.0]), score([0.5, 0.5, 0.5, 0.25])
    assert compare([ours], theirs) == compare([ours], theirs)
