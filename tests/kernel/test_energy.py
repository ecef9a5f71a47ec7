"""Hyperspherical energy against `torch.pdist` in float64, and what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.kernel import energy
from pome.kernel.energy import ROWS, find_directions, measure_energy


def draw(m, n, seed, dtype=torch.float64):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair_mean(W):
    """Mean of 1 / distance over pairs of directions; torch takes each distance from the difference of the rows."""
    W = W.double()
    return float(torch.pdist(W / W.norm(dim=1, keepdim=True)).reciprocal().mean())


def measure(*weights):
    return measure_energy([find_directions(W) for W in weights])


SIDES = st.integers(2, 40)
# 1e-9: a distance above 0.01 is good to some 1e-11, one below it to 1e-15 / distance.
AS_PDIST = {"rel": 1e-9}


@settings(deadline=None, max_examples=60)
@given(SIDES, st.integers(3, 40), st.integers(0, 99), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_energy_is_that_of_pdist(m, n, seed, dtype):
    W = draw(m, n, seed, dtype)
    found = measure(W)
    assert found.means[0] == pytest.approx(pair_mean(W), **AS_PDIST)
    assert (found.rows, found.zero_rows, found.identical_pairs) == (m, 0, 0)
    assert found.means[0] >= 0.5


@pytest.mark.parametrize("m", [ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 7])
def test_blocks_of_rows_leave_no_pair_out(m, monkeypatch):
    W, shapes = draw(m, 30, m), []
    taken = energy.find_distances
    monkeypatch.setattr(energy, "find_distances", lambda U, V: shapes.append((len(U), len(V))) or taken(U, V))
    assert measure(W).means[0] == pytest.approx(pair_mean(W), **AS_PDIST)
    assert max(rows for rows, _ in shapes) <= ROWS  # never m x m


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, st.integers(0, 99), st.integers(-900, 900))
def test_the_length_of_rows_and_a_rotation_of_the_inputs_do_not_matter(m, n, seed, exponent):
    W = draw(m, n, seed)
    before = measure(W).means[0]
    lengths = 10.0 ** torch.linspace(-3, 3, m, dtype=torch.float64)[:, None] * 2.0**exponent
    Q = torch.linalg.qr(draw(n, n, seed + 1)).Q
    # Rounding turns a row by 1e-15, which counts beside the distance of the nearest two.
    nearest = float(torch.pdist(W / W.norm(dim=1, keepdim=True)).min())
    for changed in (lengths * W, W @ Q):
        assert measure(changed).means[0] == pytest.approx(before, rel=1e-12 / min(nearest, 1.0))


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 60), st.floats(-9, -1), st.integers(0, 99))
def test_near_rows_are_told_apart(n, exponent, seed):
    near = 10.0**exponent
    W = draw(5, n, seed)
    W[1] = W[0] + near * draw(1, n, seed + 1)[0]
    U = W / W.norm(dim=1, keepdim=True)
    distance = float((U[0] - U[1]).norm())
    # Rounding of the two rows alone moves their distance by 1e-15.
    assert measure(W).means[0] == pytest.approx(pair_mean(W), rel=1e-9 + 4e-15 / distance)


def test_rows_of_one_direction_are_left_out_of_all_and_counted():
    W, other = draw(9, 7, 0), draw(9, 7, 1)
    W[3], W[5] = W[1], 3.0 * W[1]  # three pairs
    other[8] = other[0]
    found = measure(W, other)
    assert (found.zero_rows, found.identical_pairs) == (0, 4)
    first, second = torch.triu_indices(9, 9, 1)
    out = {(1, 3), (1, 5), (3, 5), (0, 8)}
    kept = torch.tensor([pair not in out for pair in zip(first.tolist(), second.tolist(), strict=True)])
    for mean, matrix in zip(found.means, (W, other), strict=True):
        distances = torch.pdist(matrix / matrix.norm(dim=1, keepdim=True))[kept]
        assert mean == pytest.approx(float(distances.reciprocal().mean()), **AS_PDIST)


def test_rows_of_zeros_are_left_out_of_all_and_counted():
    W, other = draw(9, 7, 0), draw(9, 7, 1)
    W[2] = 0.0
    other[2], other[6] = 0.0, -0.0
    found = measure(W, other)
    rows = [0, 1, 3, 4, 5, 7, 8]
    assert (found.rows, found.zero_rows, found.identical_pairs) == (9, 2, 0)
    assert found.means == pytest.approx([pair_mean(W[rows]), pair_mean(other[rows])], **AS_PDIST)


@pytest.mark.parametrize("W", [torch.zeros(4, 3), torch.ones(4, 3), torch.ones(1, 3)])
def test_there_is_no_energy_without_two_directions(W):
    assert measure(W).means == (None,)


def test_two_opposite_rows_have_the_least_and_directions_in_many_dimensions_a_known_one():
    assert measure(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])).means[0] == pytest.approx(0.5)
    # E (2 - 2c)^(-1/2) for a cosine of variance 1 / n, to second order; 1,200 rows: its own fluctuation is below 1e-4.
    n = 300
    assert measure(draw(1200, n, 3)).means[0] == pytest.approx((1 + 3 / (8 * n)) / math.sqrt(2), rel=2e-4)


def test_of_many_rows_a_seeded_sample_is_taken_the_same_for_all(monkeypatch):
    monkeypatch.setattr(energy, "MOST_ROWS", 50)
    W, other = draw(400, 6, 0), draw(400, 6, 1)
    before = torch.get_rng_state()
    sample, again, others = (find_directions(matrix) for matrix in (W, W.float(), other))
    assert torch.equal(before, torch.get_rng_state())
    chosen = [int((W / W.norm(dim=1, keepdim=True) - row).norm(dim=1).argmin()) for row in sample]
    assert len(set(chosen)) == 50 and max(chosen) > 300
    assert torch.allclose(again, sample, atol=1e-6)
    assert torch.allclose(others, other[chosen] / other[chosen].norm(dim=1, keepdim=True), atol=1e-14)
    found = measure(W, other)
    assert found.rows == 50 and found.means == pytest.approx([pair_mean(W[chosen]), pair_mean(other[chosen])])


def test_what_is_measured_stays_as_it_is():
    W = draw(8, 5, 0)
    copy = W.clone()
    directions = find_directions(W)
    kept = directions.clone()
    measure_energy([directions])
    assert torch.equal(W, copy) and torch.equal(directions, kept)
