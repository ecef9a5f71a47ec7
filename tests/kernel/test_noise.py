"""Noise floor of storage rounding against real rounding noise, and the edge of its spectrum."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pome.kernel.noise import storage_noise_floor
from pome.kernel.spectral_edge import find_edge


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


def test_noise_floor_refuses_tensors_that_are_no_float_matrices():
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
