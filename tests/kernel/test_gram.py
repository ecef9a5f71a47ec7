"""The float64 solver by squares: what it says of its own resolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.kernel.decomposition import Undecided
from pome.kernel.solvers.gram import solve_gram
from support.recipes import make_rule
from support.reference import plant


@settings(deadline=None, max_examples=60)
@given(fall=st.floats(0.05, 0.6), k=st.integers(1, 16), seed=st.integers(0, 99))
def test_the_resolution_is_no_finer_than_a_rounding_of_the_largest_value(fall, k, seed):
    """A rounding of D, of s_1 2^-53, moves s_k by so much (Weyl): that much no solver can tell apart."""
    D = plant(10.0 ** (-fall * torch.arange(20).double()), 40, 20, seed, torch.float64)
    try:
        found = solve_gram(D, make_rule("fixed", rank=k))
    except Undecided:
        return
    s = torch.linalg.svdvals(D)
    assert found.k == min(k, found.rank)  # what lies below the threshold of the rank counts for nothing
    k = found.k
    assert float(found.sigma[k - 1]) == pytest.approx(float(s[k - 1]), abs=1e-13 * float(s[0]))
    assert found.resolution >= 0.999 * 2.0**-53 * float(s[0] / s[k - 1])
