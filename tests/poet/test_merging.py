"""Merger: what a merge keeps and forgets, spectra after a thousand merges, schedules, resume in mid-interval."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from pome.errors import SpecError
from pome.poet import Merger, PoetConfig, PoetLinear, measure, parameter_groups, poet_layers, unwrap, wrap
from pome.poet.cayley import skew_symmetric
from pome.poet.merger import spectral_norm_exceeds
from pome.poet.rotation import apply_blocks


def make_model(config: PoetConfig | None = None, *, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 10, bias=False), nn.Linear(10, 6)
    )
    model = model.to(dtype)
    wrap(model, config or PoetConfig(block_size=6))
    return model


def adamw(model: nn.Module, poet_lr: float = 0.02) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, lr=0.01, poet_lr=poet_lr, weight_decay=0.1))


def batches(count: int, size: int = 8, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 12, generator=generator), torch.randn(size, 6, generator=generator)) for _ in range(count)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, merger: Merger | None, data: list) -> list[float]:
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if merger is not None:
            merger.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("q_norm", "dtype", "correct", "least", "most"),
    [
        (0.05, torch.float32, True, 0, 1e-3),
        (0.18, torch.float32, True, 0, 1e-3),
        (0.05, torch.bfloat16, True, 0, 1e-2),
        (0.18, torch.bfloat16, True, 0, 1e-2),
        (0.05, torch.float32, False, 5e-4, 1e-2),
        (0.18, torch.float32, False, 0.1, 0.4),
    ],
)
def test_spectrum_after_a_thousand_merges(q_norm, dtype, correct, least, most):
    torch.manual_seed(0)
    layer = nn.Linear(48, 64, bias=False).to(dtype)
    wrap(layer, PoetConfig(block_size=16, correct=correct, track_spectrum=True))
    assert isinstance(layer, PoetLinear)
    pool = []
    for _ in range(20):
        pair = []
        for count in (3, 4):
            upper = torch.randn(count, 120)
            norms = torch.linalg.matrix_norm(skew_symmetric(upper, 16), 2)
            pair.append((upper * (q_norm / norms)[:, None]).flatten())
        pool.append(pair)
    for number in range(1000):
        for upper, drawn in zip((layer.poet_in, layer.poet_out), pool[number % 20], strict=True):
            upper.data.copy_(drawn)
        layer.fold()
        layer.redraw()
    (found,) = measure(layer)
    assert found.merges == layer.draws == 1000
    assert least <= found.spectral_drift <= most


def test_a_merge_forgets_the_rotations_and_nothing_else():
    model = make_model()
    optimizer = adamw(model)
    merger = Merger(model, optimizer, every=3)
    data = batches(3)
    train(model, optimizer, merger, data[:2])
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    own = {id(p) for layer in poet_layers(model) for p in (layer.poet_in, layer.poet_out)}
    assert all(optimizer.state[p]["step"] == 2 for group in optimizer.param_groups for p in group["params"])
    before = model(data[0][0]).detach()
    draws = [layer.poet_index_in.clone() for layer in poet_layers(model)]
    merger.merge()
    torch.testing.assert_close(model(data[0][0]), before, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(old, layer.poet_index_in) for old, layer in zip(draws, poet_layers(model), strict=True))
    number = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in own:
                assert parameter not in optimizer.state and parameter.grad is None and not parameter.any()
            else:
                assert optimizer.state[parameter]["step"] == 2
                assert torch.equal(optimizer.state[parameter]["exp_avg"], kept[number]["exp_avg"])
            number += 1
    # The next step is that of an optimiser which never saw the rotations before.
    fresh_model = copy.deepcopy(model)
    fresh = adamw(fresh_model)
    train(model, optimizer, None, data[2:])
    train(fresh_model, fresh, None, data[2:])
    for layer, other in zip(poet_layers(model), poet_layers(fresh_model), strict=True):
        assert torch.equal(layer.poet_in, other.poet_in) and torch.equal(layer.poet_out, other.poet_out)


OPTIMIZERS = [
    torch.optim.Adadelta,
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
]


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_after_a_merge_every_optimiser_steps_as_a_new_one(kind):
    model = make_model()
    extra = {"momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}
    if kind is torch.optim.Adagrad:
        extra = {"initial_accumulator_value": 0.1}
    if kind is torch.optim.AdamW:
        extra = {"weight_decay": 0}

    def rotations_only(model):
        return [p for layer in poet_layers(model) for p in (layer.poet_in, layer.poet_out)]

    optimizer = kind(rotations_only(model), lr=0.01, **extra)
    data = batches(6)
    train(model, optimizer, Merger(model, optimizer, every=4), data[:4])
    fresh_model = copy.deepcopy(model)
    fresh = kind(rotations_only(fresh_model), lr=0.01, **extra)
    train(model, optimizer, None, data[4:])
    train(fresh_model, fresh, None, data[4:])
    for layer, other in zip(poet_layers(model), poet_layers(fresh_model), strict=True):
        assert layer.poet_in.any()
        assert torch.equal(layer.poet_in, other.poet_in) and torch.equal(layer.poet_out, other.poet_out)


def test_two_optimisers_share_a_merger():
    model = make_model()
    own = [p for layer in poet_layers(model) for p in (layer.poet_in, layer.poet_out)]
    first, second = torch.optim.SGD(own[::2], lr=0.1, momentum=0.9), torch.optim.Adam(own[1::2], lr=0.1)
    merger = Merger(model, [first, second], every=1)
    model(torch.ones(1, 12)).sum().backward()
    first.step()
    second.step()
    assert merger.step()
    assert not first.state and not second.state


def test_a_skipped_step_does_not_count_and_wrappers_are_looked_through():
    model = make_model()
    inner = adamw(model)

    class Wrapper:  # as accelerate wraps an optimiser under a gradient scaler
        optimizer = inner
        step_was_skipped = False

    wrapper = Wrapper()
    merger = Merger(model, wrapper, every=2)
    train(model, inner, None, batches(2))
    assert not merger.step()
    wrapper.step_was_skipped = True
    assert not merger.step() and merger.steps == 1
    wrapper.step_was_skipped = False
    assert merger.step()
    assert all(layer.poet_in not in inner.state for layer in poet_layers(model))


def test_resampling_and_early_merges():
    model = make_model()
    optimizer = adamw(model)
    merger = Merger(model, optimizer, every=2, resample_every=3)
    train(model, optimizer, merger, batches(13))
    assert merger.state_dict() == {"steps": 13, "since_merge": 1, "merges": 6}
    assert all((layer.merges, layer.draws) == (6, 2) for layer in poet_layers(model))

    model = make_model()
    optimizer = adamw(model, poet_lr=0.05)
    merger = Merger(model, optimizer, every=1000, max_norm=0.3)
    for x, y in batches(30):
        train(model, optimizer, None, [(x, y)])
        beyond = any(max(each.q_norm_in, each.q_norm_out) > 0.3 for each in measure(model))
        assert merger.step() == beyond
    assert merger.merges > 0


def test_norm_bound_is_that_of_the_singular_values():
    torch.manual_seed(0)
    upper = torch.randn(5, 28)
    norm = torch.linalg.matrix_norm(skew_symmetric(upper, 8), 2).max().item()
    assert spectral_norm_exceeds(upper, 8, norm * 0.999)
    assert not spectral_norm_exceeds(upper, 8, norm * 1.001)
    assert not spectral_norm_exceeds(upper[:, :0], 1, 0.1)


def test_ramp_scales_the_rotations_rate_within_the_step_only():
    model = make_model()
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.01, poet_lr=0.04))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    merger = Merger(model, optimizer, every=3, ramp=4)
    moved = []
    for number, (x, y) in enumerate(batches(9)):
        layer = poet_layers(model)[0]
        before = layer.poet_in.detach().clone()
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        slope = layer.poet_in.grad.clone()
        optimizer.step()
        rate = 0.04 * 0.5**number
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01 * 0.5**number, rate])
        moved.append(((before - layer.poet_in.detach()) / slope).median().item() / rate)
        schedule.step()
        merger.step()
    assert moved == pytest.approx([1, 1, 1, 0.25, 0.5, 0.75, 0.25, 0.5, 0.75], rel=1e-3)


@pytest.mark.parametrize("sampling", ["block", "full"])
def test_resume_in_mid_interval_is_bitwise(sampling):
    config = PoetConfig(sampling=sampling, block_size=6)
    data = batches(23)

    def start():
        model = make_model(config)
        optimizer = adamw(model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 23)
        return model, optimizer, schedule, Merger(model, optimizer, every=5, resample_every=2, ramp=3)

    def go_on(model, optimizer, schedule, merger, part):
        losses = []
        for pair in part:
            losses += train(model, optimizer, merger, [pair])
            schedule.step()
        return losses

    undisturbed = start()
    expected = go_on(*undisturbed, data)
    first = start()
    losses = go_on(*first, data[:13])
    buffer = io.BytesIO()
    torch.save([each.state_dict() for each in first], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    second = start()
    for each, state in zip(second, states, strict=True):
        each.load_state_dict(state)
    assert losses + go_on(*second, data[13:]) == expected
    for name, tensor in undisturbed[0].state_dict().items():
        assert torch.equal(tensor, second[0].state_dict()[name]), name
    assert second[3].state_dict() == undisturbed[3].state_dict()


def test_accumulation_of_four_equals_one_batch_of_four_times_the_size():
    results = []
    for parts in (1, 4):
        model = make_model(dtype=torch.float64)
        optimizer = adamw(model)
        merger = Merger(model, optimizer, every=3)
        for x, y in batches(8, size=16):
            optimizer.zero_grad()
            for part_x, part_y in zip(x.double().chunk(parts), y.double().chunk(parts), strict=True):
                (nn.functional.mse_loss(model(part_x), part_y) / parts).backward()
            optimizer.step()
            merger.step()
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_training_keeps_the_spectrum_and_unwrap_keeps_the_function():
    model = make_model(PoetConfig(block_size=6, track_spectrum=True))
    spectra = [torch.linalg.svdvals(layer.weight.detach()) for layer in poet_layers(model)]
    optimizer = adamw(model)
    losses = train(model, optimizer, Merger(model, optimizer, every=7), batches(4) * 40)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    x = batches(1, seed=9)[0][0]
    before = model(x).detach()
    for found in measure(model):
        assert found.spectral_drift < 1e-4 and abs(found.norm_drift) < 1e-4
        assert found.orthogonality < 1e-3
        assert 0 < found.q_norm_in < 1.5 and 0 < found.q_norm_out < 1.5
    assert unwrap(model) == ["0", "3", "4"]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    plain = nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 10, bias=False), nn.Linear(10, 6)
    )
    plain.load_state_dict(model.state_dict())
    for index, spectrum in zip((0, 3, 4), spectra, strict=True):
        torch.testing.assert_close(torch.linalg.svdvals(plain[index].weight), spectrum, rtol=1e-4, atol=1e-5)


def test_probe_cosines_follow_the_accumulated_rotation():
    layer = nn.Linear(10, 7, bias=False, dtype=torch.float64)
    wrap(layer, PoetConfig(block_size=4))
    assert [(each.cosine_in, each.cosine_out) for each in measure(layer)] == [pytest.approx((1, 1))]
    torch.manual_seed(0)
    right, left = torch.eye(10, dtype=torch.float64), torch.eye(7, dtype=torch.float64)
    start = layer.weight.detach().clone()
    for number in range(6):
        layer.poet_in.data.normal_(std=0.2)
        layer.poet_out.data.normal_(std=0.2)
        turn_in, turn_out = (
            apply_blocks(
                torch.eye(size, dtype=torch.float64),
                layer.rotation_blocks(side),
                getattr(layer, f"poet_index_{side}"),
                getattr(layer, f"poet_inverse_{side}"),
            )
            for side, size in (("in", 10), ("out", 7))
        )
        right, left = right @ turn_in.T, left @ turn_out
        if number < 5:
            layer.fold()
            layer.redraw()
    torch.testing.assert_close(layer.effective_weight(), left.T @ start @ right)
    probe_in, probe_out = (probe.double() for probe in layer.start_probes())
    cosine = torch.nn.functional.cosine_similarity
    (found,) = measure(layer)
    assert found.cosine_in == pytest.approx(cosine(probe_in, probe_in @ right, dim=0).item(), abs=1e-5)
    assert found.cosine_out == pytest.approx(cosine(probe_out, probe_out @ left, dim=0).item(), abs=1e-5)
    assert found.cosine_in < 0.999


def test_misuse_is_refused_by_name():
    model = make_model()
    early = torch.optim.AdamW([model[2].weight], lr=0.1, weight_decay=0)
    with pytest.raises(SpecError, match=r"no optimiser holds 0\.poet_in; make the optimiser after wrap"):
        Merger(model, early)
    optimizer = adamw(model)
    for options in ({"every": 0}, {"resample_every": 0}, {"ramp": -1}, {"max_norm": 0}, {"every": 2.5}):
        with pytest.raises(SpecError, match=next(iter(options))):
            Merger(model, optimizer, **options)
    with pytest.raises(SpecError, match="LBFGS"):
        Merger(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(SpecError, match="ramp: group 0"):
        Merger(model, torch.optim.SGD(model.parameters(), lr=0.1), ramp=2)
    with pytest.raises(SpecError, match="not a torch optimiser"):
        Merger(model, object())
    with pytest.warns(UserWarning, match="weight decay acts on 0.poet_in"):
        Merger(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    merger = Merger(model, optimizer, every=1)
    with pytest.raises(SpecError, match="after 3 merges, the model after 0"):
        merger.load_state_dict({"steps": 3, "since_merge": 0, "merges": 3})
    with pytest.raises(SpecError, match="state of a Merger holds"):
        merger.load_state_dict({"steps": 3})
    unwrap(model)
    with pytest.raises(SpecError, match="no POET layer"):
        merger.step()
