"""Rows and medians that reports are made from."""

from __future__ import annotations

import pytest

from pome.reports.sheet import spread_indices, summarise_roles
from support.surveys import draw_sheet


def test_roles_are_summarised_by_medians(small):
    sheet = draw_sheet(small)
    found = {role: (count, medians) for role, count, medians in summarise_roles(sheet, ["drift"])}
    drifts = sorted(m.drift for m in small.matrices if m.role == "up")
    assert found["up"] == (3, {"drift": drifts[1]})


@pytest.mark.parametrize("n", [1, 2, 95, 96, 97, 100, 4096])
def test_a_sampled_spectrum_keeps_both_ends(n):
    indices = spread_indices(n, 96)
    assert (indices[0], indices[-1]) == (1, n) and len(indices) <= 96
    assert indices == sorted(set(indices))
