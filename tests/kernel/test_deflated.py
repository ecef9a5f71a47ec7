"""The deflated float32 solver on the spectra that are hard for it."""

import pytest
import torch

from pome.kernel.decomposition import Undecided
from pome.kernel.equalize import equalize
from pome.kernel.solvers.deflated import deflate, solve_deflated
from support.deltas import make_delta
from support.recipes import make_rule
from support.reference import plant


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(error, to):
    return float(torch.linalg.matrix_norm(error.double()) / torch.linalg.matrix_norm(to.double()))


def test_a_flat_spectrum_deflates_nothing_and_a_steep_one_does():
    assert deflate(make_delta("noise", 400, 300, 0)).theta.numel() == 0
    assert deflate(make_delta("rounded-lora", 400, 300, 0)).theta.numel() == 8


def test_the_smaller_form_sends_the_short_side_only():
    sent = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.to and args[1:] == (helper,):
                sent.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    delta, helper = make_delta("inverse-root", 500, 160, 0), torch.device("cpu", 0)
    with Recorder():
        kept = solve_deflated(delta, make_rule(), helper=helper)
    rest = 160 - deflate(delta).theta.numel()
    assert sent == [(rest, rest)]
    assert torch.equal(kept.M, solve_deflated(delta, make_rule()).M)


@pytest.mark.parametrize("spikes, height", [(110, 40.0), (150, 300.0), (150, 3000.0)])
def test_more_strong_directions_than_any_sketch_holds_cost_no_accuracy(spikes, height):
    """What is then squared with them drowns; where the cut is open, no angle tells, but the objective does."""
    m, n = 640, 500
    sigma = torch.cat((torch.linspace(1.3, 1.0, spikes) * height, torch.linspace(1.3, 1.0, n - spikes))).double()
    D = plant(sigma, m, n, seed=spikes)
    edited = equalize(D)
    s = torch.linalg.svdvals(D.double())
    P = edited.value.double() / edited.alpha
    assert abs(1 - float((D.double() * P).sum() / s[: edited.k].sum())) < 1e-5
    # Within a cluster s_k is known to its width only; what the loss that is let through leaves was 9e-5 at most.
    assert edited.sigma_k == pytest.approx(float(s[edited.k - 1]), rel=2e-4)
    assert abs(1 - edited.objective) < 1e-5


@pytest.mark.parametrize("shape, fall", [((1200, 900), 100), ((400, 300), 30), ((1500, 750), 80)])
def test_weak_directions_kept_beside_strong_ones_are_the_references(shape, fall):
    """A steep fall to a flat end, all of it kept: no cut at all, so the data determine P."""
    n = min(shape)
    sigma = torch.exp(-torch.arange(n, dtype=torch.float64) / fall) + 1.5e-3
    D = plant(0.1 * sigma, *shape)
    edited = equalize(D, rank_ratio=1.0)
    U, s, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    assert edited.solver == "deflated-float32"
    assert relative(edited.value.double() / edited.alpha - U @ Vh, U) < 1e-4  # as promised; 1.3e-3 without the weights
    # Float32 squares know s^2 to some 1e-8 of the largest, which is 600 times the last one.
    assert edited.sigma_k == pytest.approx(float(s[-1]), rel=5e-3)


def test_an_open_cut_that_float32_blurs_is_handed_over():
    sigma = torch.cat((torch.linspace(390.0, 300.0, 150), torch.linspace(1.3, 1.0, 350))).double()
    with pytest.raises(Undecided, match="is known to .* only"):
        solve_deflated(plant(sigma, 640, 500, seed=1), make_rule())


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_one_strong_direction_alone_is_settled_in_float32(shape):
    u, v = randn(shape[0], 1), randn(shape[1], 1, seed=1)
    delta = 50 * (u / u.norm()) @ (v / v.norm()).mT + 1e-3 * randn(*shape, seed=2)
    assert deflate(delta if shape[0] > shape[1] else delta.mT).theta.numel() == 1
    found = solve_deflated(delta, make_rule("fixed", rank=1))
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    assert found.k == 1 and float(found.sigma[0]) == pytest.approx(float(S[0]), rel=1e-6)
    assert relative(found.M - U[:, :1] @ Vh[:1], found.M) < 1e-5
