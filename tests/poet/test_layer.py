"""POET layers against a dense float64 oracle: forward, gradients, merges, states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from pome.errors import SpecError
from pome.poet import PoetConfig, PoetLinear, unwrap, wrap
from pome.poet.cayley import cayley, cayley_pullback, orthogonality_error, skew_symmetric, upper_triangle

from .oracle import dense_generator, dense_rotation, dense_weight


def make_layer(
    fan_in: int,
    fan_out: int,
    config: PoetConfig,
    *,
    bias: bool = True,
    conv: bool = False,
    dtype: torch.dtype = torch.float64,
    size: float = 0.1,
    seed: int = 0,
) -> PoetLinear:
    """A wrapped layer whose Q is random, of about `size` in spectral norm."""
    torch.manual_seed(seed)
    layer = Conv1D(fan_out, fan_in) if conv else nn.Linear(fan_in, fan_out, bias=bias)
    layer = layer.to(dtype)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    wrap(layer, config)
    assert isinstance(layer, PoetLinear)
    fill(layer, size)
    return layer


def fill(layer: PoetLinear, size: float, generator: torch.Generator | None = None) -> None:
    """Random Q of about spectral norm `size` in each block."""
    with torch.no_grad():
        for upper, blocks in ((layer.poet_in, layer.poet_blocks_in), (layer.poet_out, layer.poet_blocks_out)):
            deviation = size / 2 / blocks.size**0.5
            upper.copy_(torch.randn(upper.shape, generator=generator, dtype=upper.dtype) * deviation)


configs = st.builds(
    PoetConfig,
    sampling=st.sampled_from(["block", "full"]),
    block_size=st.one_of(st.integers(1, 9), st.sampled_from([0.25, 0.5, 1.0])),
    neumann_terms=st.sampled_from([0, 1, 2, 3, 4, 5, "exact"]),
    correct=st.booleans(),
    seed=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(
    config=configs,
    fan_in=st.integers(1, 11),
    fan_out=st.integers(1, 11),
    shape=st.sampled_from([(4,), (2, 3), (0,), (), (2, 0, 3), (1,)]),
    bias=st.booleans(),
    conv=st.booleans(),
)
def test_forward_and_gradients_equal_the_dense_oracle(config, fan_in, fan_out, shape, bias, conv):
    layer = make_layer(fan_in, fan_out, config, bias=bias, conv=conv, size=0.5)
    x = torch.randn(*shape, fan_in, dtype=torch.float64, requires_grad=True)
    seen = torch.randn(*shape, fan_out, dtype=torch.float64)

    upper_in, upper_out = (side.detach().clone().requires_grad_() for side in (layer.poet_in, layer.poet_out))
    x_too = x.detach().clone().requires_grad_()
    expected = x_too @ dense_weight(layer, upper_in, upper_out).T
    if layer.bias is not None:
        expected = expected + layer.bias.detach()
    (expected * seen).sum().backward()

    result = layer(x)
    assert result.shape == expected.shape
    (result * seen).sum().backward()
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(result, expected, **close)
    torch.testing.assert_close(x.grad, x_too.grad, **close)
    for parameter, reference in ((layer.poet_in, upper_in), (layer.poet_out, upper_out)):
        if parameter.numel():
            given_grad = reference.grad if reference.grad is not None else torch.zeros_like(reference)
            torch.testing.assert_close(parameter.grad, given_grad, **close)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, seen.reshape(-1, fan_out).sum(0), **close)
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.effective_weight(), dense_weight(layer, upper_in, upper_out).detach(), **close)


@pytest.mark.parametrize("sampling", ["block", "full"])
@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4, "exact"])
@pytest.mark.parametrize("correct", [True, False])
def test_backward_agrees_with_numerical_gradients(sampling, terms, correct):
    config = PoetConfig(sampling=sampling, block_size=3, neumann_terms=terms, correct=correct)
    layer = make_layer(7, 5, config, size=0.4)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def function(x, upper_in, upper_out):
        return torch.func.functional_call(layer, {"poet_in": upper_in, "poet_out": upper_out}, (x,))

    inputs = (x, layer.poet_in.detach().requires_grad_(), layer.poet_out.detach().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 12), terms=st.sampled_from([0, 1, 2, 3, 4, 5, 6, "exact"]), correct=st.booleans())
def test_rotation_equals_the_power_series(size, terms, correct):
    torch.manual_seed(size)
    upper = torch.randn(3, size * (size - 1) // 2, dtype=torch.float64) * 0.2 / size**0.5
    made = cayley(skew_symmetric(upper, size), terms, correct)
    for block in range(3):
        expected = dense_rotation(dense_generator(upper[block], size), terms, correct)
        torch.testing.assert_close(made.value[block] + torch.eye(size), expected, rtol=1e-12, atol=1e-13)


def test_upper_triangle_is_the_adjoint_of_skew_symmetric():
    torch.manual_seed(0)
    upper, matrix = torch.randn(2, 10, dtype=torch.float64), torch.randn(2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close((skew_symmetric(upper, 5) * matrix).sum(), (upper * upper_triangle(matrix)).sum())
    assert cayley_pullback(cayley(skew_symmetric(upper, 5), 3, True), matrix, 3).shape == (2, 5, 5)


@pytest.mark.parametrize("theta", [0.02, 0.1, 0.3])
def test_orthogonality_error_is_that_of_the_theory(theta):
    """An eigenvalue i theta of Q gives |lambda|^2 = 1 + t^2, (1 + t^2)^2, 1 + t^6, (1 - t^4)^2 for k = 0..3."""
    torch.manual_seed(0)
    frame, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    plane = torch.tensor([[0.0, theta], [-theta, 0.0]], dtype=torch.float64)
    generator = (frame @ torch.block_diag(*[plane] * 6) @ frame.T)[None]
    theory = {0: theta**2, 1: (1 + theta**2) ** 2 - 1, 2: theta**6, 3: 1 - (1 - theta**4) ** 2}
    for terms, expected in theory.items():
        plain = cayley(generator, terms, correct=False)
        error = torch.linalg.matrix_norm(orthogonality_error(plain.value), 2).item()
        assert error == pytest.approx(expected, rel=1e-6, abs=1e-15)
        corrected = cayley(generator, terms, correct=True)
        after = torch.linalg.matrix_norm(orthogonality_error(corrected.value), 2).item()
        assert after == pytest.approx(3 / 4 * expected**2 + expected**3 / 4, rel=expected, abs=1e-15)
    exact = torch.linalg.matrix_norm(orthogonality_error(cayley(generator, "exact", True).value), 2).item()
    assert exact < 1e-14


@settings(max_examples=30, deadline=None)
@given(config=configs, conv=st.booleans(), redraws=st.booleans())
def test_merge_and_redraw_leave_the_function(config, conv, redraws):
    layer = make_layer(10, 7, config, conv=conv, dtype=torch.float32, size=0.3)
    x = torch.randn(5, 10)
    before = layer(x).detach()
    layer.fold()
    assert not layer.poet_in.any() and not layer.poet_out.any()
    if redraws:
        layer.redraw()
    after = layer(x).detach()
    assert (after - before).norm() <= 1e-5 * before.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_keep_the_function_within_their_rounding(dtype):
    layer = make_layer(96, 64, PoetConfig(block_size=20), dtype=dtype, size=0.2)
    assert layer.poet_in.dtype == layer.poet_out.dtype == torch.float32
    x = torch.randn(32, 96, dtype=dtype)
    exact = x.double() @ layer.effective_weight().double().T + layer.bias.double()
    unit = torch.finfo(dtype).eps
    before = layer(x).double()
    assert (before - exact).norm() <= 2 * unit * exact.norm()
    layer.fold()
    layer.redraw()
    assert (layer(x).double() - exact).norm() <= 2 * unit * exact.norm()
    wanted = dense_weight(layer, layer.poet_in.double(), layer.poet_out.double())
    torch.testing.assert_close(wanted.float(), layer.weight.float())


def test_stochastic_rounding_keeps_small_steps_on_average():
    """Each step is far below half a unit of bfloat16: rounding to nearest loses them all."""
    left_over = {}
    for rounding in ("nearest", "stochastic"):
        config = PoetConfig(block_size=16, rounding=rounding)
        layer = make_layer(64, 48, config, dtype=torch.bfloat16, bias=False, size=0)
        exact = make_layer(64, 48, config, bias=False, size=0)
        exact.weight.data.copy_(layer.weight)
        start = exact.weight.clone()
        step = torch.randn(layer.poet_in.shape) * 2e-5
        for _ in range(200):
            for each in (layer, exact):
                each.poet_in.data.copy_(step)
                each.fold()
        left_over[rounding] = ((layer.weight.double() - exact.weight).norm() / (exact.weight - start).norm()).item()
    assert left_over["nearest"] > 0.9
    assert left_over["stochastic"] < 0.5


def test_stochastic_rounding_of_float16_is_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).half())
    with pytest.raises(SpecError, match=r"^1: stochastic rounding is for bfloat16"):
        wrap(model, PoetConfig(rounding="stochastic"))
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]


def test_backward_keeps_only_the_input_and_one_product():
    """Only the layer's input, the product with W, and the parameters: no blocks, no copy of W."""
    layer = make_layer(96, 128, PoetConfig(block_size=32), dtype=torch.float32)
    x = torch.randn(10, 96, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers(), x]}
    assert sum(size for place, size in kept.items() if place not in own) == 10 * 128 * 4


def test_unwrap_gives_the_layer_back():
    for conv in (False, True):
        plain = Conv1D(7, 10) if conv else nn.Linear(10, 7)
        layer = make_layer(10, 7, PoetConfig(block_size=4), conv=conv, dtype=torch.float32)
        before = layer(torch.ones(3, 10)).detach()
        assert unwrap(layer) == [""]
        assert type(layer) is type(plain)
        assert list(layer.state_dict()) == list(plain.state_dict())
        assert set(layer.__dict__) == set(plain.__dict__)
        assert all(parameter.requires_grad for parameter in layer.parameters())
        torch.testing.assert_close(layer(torch.ones(3, 10)), before, rtol=1e-5, atol=1e-6)


def test_casting_and_moving_leaves_q_in_float32():
    layer = make_layer(10, 7, PoetConfig(block_size=4, track_spectrum=True), dtype=torch.float32)
    exact = layer.poet_in.detach().clone()
    for cast in (nn.Module.bfloat16, nn.Module.half, lambda m: m.to("cpu", torch.bfloat16), nn.Module.float):
        cast(layer)
        for tensor in (layer.poet_in, layer.poet_out, layer.poet_probe_in, layer.poet_norm, layer.poet_spectrum):
            assert tensor.dtype == torch.float32
        assert torch.equal(layer.poet_in, exact)
    assert layer.bfloat16().weight.dtype == torch.bfloat16
    assert layer(torch.ones(2, 10, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.double().poet_in.dtype == torch.float64


def test_state_of_other_options_is_refused_by_name():
    states = nn.ModuleDict({"up": nn.Linear(8, 8)})
    wrap(states, PoetConfig(block_size=4, neumann_terms=2))
    other = nn.ModuleDict({"up": nn.Linear(8, 8)})
    wrap(other, PoetConfig(block_size=4))
    with pytest.raises(RuntimeError, match="up: this layer was wrapped with"):
        other.load_state_dict(states.state_dict())
    wider = nn.ModuleDict({"up": nn.Linear(8, 8)})
    wrap(wider, PoetConfig(block_size=5))
    with pytest.raises(RuntimeError, match=r"\[3, 1, 0, 4, 4\], the state was saved with \[3, 1, 0, 5, 5\]"):
        other.load_state_dict(wider.state_dict())


def test_a_layer_that_is_not_whole_is_not_merged():
    layer = make_layer(8, 8, PoetConfig(block_size=4), dtype=torch.float32)
    layer.poet_out = nn.Parameter(layer.poet_out.detach()[:5])
    before = layer.weight.clone()
    with pytest.raises(SpecError, match="sharded over processes"):
        layer.fold()
    assert torch.equal(layer.weight, before)


def test_a_state_carries_its_permutations():
    """The function of a state is whole without a Merger, also where the seeds differ."""
    first = make_layer(10, 7, PoetConfig(block_size=4, seed=1), dtype=torch.float32)
    first.fold()
    first.redraw()
    fill(first, 0.3)
    second = make_layer(10, 7, PoetConfig(block_size=4, seed=2), dtype=torch.float32, seed=5)
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, 10)
    assert torch.equal(first(x), second(x))


def test_draws_touch_no_global_state_and_depend_on_the_name():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    model = nn.Sequential()
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    wrap(model, PoetConfig(block_size=8, init="normalized"))
    assert torch.equal(torch.rand(1), expected)
    assert not torch.equal(model[0].poet_index_in, model[1].poet_index_in)
    assert not torch.equal(model[0].poet_index_in, model[0].poet_index_out)
    first = model[0].poet_index_in.clone()
    model[0].redraw()
    assert not torch.equal(model[0].poet_index_in, first)
    again = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    wrap(again, PoetConfig(block_size=8, init="normalized"))
    assert torch.equal(again[0].poet_index_in, first)
    assert torch.equal(again[1].weight, model[1].weight)
