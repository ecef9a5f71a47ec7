"""Every rung on its own, and what happens when one fails: the certificate decides, the next rung takes over."""

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pome.kernel.equalize as equalize_module
from pome.kernel import ladder, precision
from pome.kernel.certificate import certify
from pome.kernel.decomposition import Truncation, Undecided
from pome.kernel.equalize import Unsolved, equalize, equalize_product, prove_product
from pome.kernel.solvers.deflated import solve_deflated
from pome.kernel.solvers.gram import solve_gram
from pome.kernel.solvers.svd import solve_svd
from support.deltas import KINDS, make_delta
from support.recipes import make_recipe, make_rule
from support.reference import assert_as_reference, reference_edit
from support.spoiled import WRONG, spoil


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(96, 330),
    n=st.integers(96, 330),
    ratio=st.sampled_from([0.05, 0.25, 0.5, 0.5, 0.75, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_the_ladder_agrees_with_the_reference_on_any_spectrum(kind, m, n, ratio, seed):
    delta = make_delta(kind, m, n, seed)
    edit = equalize(delta, rank_ratio=ratio)
    assert_as_reference(edit, delta, rank_ratio=ratio)


@pytest.mark.parametrize("solve", [solve_deflated, solve_gram, solve_svd])
@pytest.mark.parametrize("kind", ["noise", "inverse", "strong", "rounded-lora", "deficient"])
@pytest.mark.parametrize("shape", [(420, 160), (160, 420)], ids=str)
def test_each_rung_alone_masters_the_usual_spectra(solve, kind, shape):
    delta = make_delta(kind, *shape, 5)
    kept, wanted = solve(delta, make_rule()), reference_edit(delta)
    assert (kept.rank, kept.k) == (wanted.rank, wanted.k)
    alpha = float(wanted.sigma.square().sum().sqrt()) / math.sqrt(kept.k)
    error = float((alpha * kept.M.double() - wanted.value).norm() / wanted.value.norm())
    assert error <= 1e-4  # what SUBSPACE promises, on spectra whose gaps are above GAP at this size
    assert kept.M.is_contiguous()


@pytest.mark.parametrize("kind", ["noise", "inverse", "strong", "rounded-lora", "deficient"])
def test_the_usual_spectra_take_the_first_rung(kind):
    assert equalize(make_delta(kind, 420, 160, 5)).solver == "deflated-float32"


@pytest.mark.parametrize(
    ("rule", "options"),
    [("energy", {"energy": 0.9}), ("noise-floor", {"noise_floor": 0.05}), ("gavish-donoho", {}), ("effective", {})],
)
def test_rules_choose_the_same_k_on_every_rung(rule, options):
    delta = make_delta("strong", 420, 160, 1) * 1e-3
    asked = make_rule(rule, **options)
    counts = {solve(delta, asked).k for solve in (solve_deflated, solve_gram, solve_svd)}
    assert len(counts) == 1


def test_an_energy_on_the_edge_is_left_to_the_rung_that_can_tell():
    delta = make_delta("noise", 300, 120, 2)
    squares = torch.linalg.svdvals(delta.double()).square().cumsum(0)
    edge = float(squares[59] / squares[-1])
    with pytest.raises(Undecided, match="leave k open"):
        solve_deflated(delta, make_rule("energy", energy=edge))
    assert equalize(delta, rank_rule="energy", energy=edge * (1 - 1e-10)).k == 60
    assert equalize(delta, rank_rule="energy", energy=edge * (1 + 1e-10)).k == 61


def fail_with(error):
    def solve(*_, **__):
        raise error

    return solve


@pytest.mark.parametrize(
    "error",
    [
        torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"),
        NotImplementedError("The operator 'aten::linalg_eigh' is not implemented for the MPS device"),
        Undecided("the kept subspace is known to 1e-03 only"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_driver_that_fails_hands_over_and_the_record_says_so(monkeypatch, error):
    delta = make_delta("noise", 200, 120, 0)
    rungs = (("first", fail_with(error)), ("second", fail_with(error)), ("svd-float64", solve_svd))
    monkeypatch.setattr(ladder, "RUNGS", rungs)
    edit = equalize(delta)
    assert edit.solver == "svd-float64"
    assert [note.split(" ")[0] for note in edit.warnings] == ["first", "second"]
    assert all(str(error)[:30] in note for note in edit.warnings)
    assert_as_reference(edit, delta)


def pretend_attempts(*rungs):
    """Attempts on an accelerator, for a delta that lies on the CPU: (name, device, solver) each."""
    return lambda D, *_: [
        ladder.Attempt(name, torch.device(device), functools.partial(solve, D)) for name, device, solve in rungs
    ]


def test_an_accelerator_out_of_memory_is_left_for_the_cpu(monkeypatch):
    delta = make_delta("noise", 200, 120, 0)
    spent = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    rungs = [("small", "cuda:0", fail_with(spent)), ("large", "cuda:0", fail_with(AssertionError("not to be tried")))]
    monkeypatch.setattr(
        equalize_module, "list_attempts", pretend_attempts(*rungs, ("svd-float64 on cpu", "cpu", solve_svd))
    )
    edit = equalize(delta)
    assert edit.solver == "svd-float64 on cpu"
    assert edit.warnings == ("small handed over: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",)


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_the_cpu_comes_after_every_rung_of_an_accelerator(device):
    class Elsewhere:
        """A float32 matrix that claims to lie on another device, of which it can only be copied away."""

        shape, dtype, device = (300, 200), torch.float32, None

        def cpu(self):
            return torch.ones(self.shape)

    delta = Elsewhere()
    delta.device = torch.device(device)
    names = [name for name, _ in ladder.RUNGS]
    attempts = list(ladder.list_attempts(delta))
    smaller = f"deflated-float32 on cpu, eigh on {device}"
    assert [attempt.name for attempt in attempts] == [*names, smaller, *(f"{name} on cpu" for name in names)]
    assert [attempt.device.type for attempt in attempts] == [torch.device(device).type] * 3 + ["cpu"] * 4


def test_when_every_rung_fails_each_is_named(monkeypatch):
    monkeypatch.setattr(ladder, "RUNGS", (("one", fail_with(RuntimeError("a"))), ("two", fail_with(RuntimeError("b")))))
    monkeypatch.setattr(ladder, "SMALL", 0)
    with pytest.raises(Unsolved, match=r"one handed over: RuntimeError: a; two handed over: RuntimeError: b"):
        equalize(torch.eye(4))


def test_factors_fall_back_on_the_dense_ladder(monkeypatch):
    b, a = torch.randn(120, 5, generator=torch.Generator().manual_seed(0)), torch.ones(5, 130)
    monkeypatch.setattr(ladder, "solve_factors", fail_with(RuntimeError("no QR on this device")))
    edit = equalize_product(b, a, make_recipe())
    assert edit.solver != "factors"
    assert_as_reference(edit, b @ a)


@pytest.mark.parametrize("how", ["one entry", "scaled", "sign", "not a number", "zero", "half precision"])
def test_a_product_that_is_not_what_its_factors_say_fails_the_certificate(monkeypatch, how):
    b, a = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((300, 12), (12, 150)))
    kept = ladder.solve_factors(b, a, make_rule())
    assert prove_product(b, a, kept).find_fault() is None
    wrong = dataclasses.replace(kept, M=spoil(b @ a, kept, how))
    monkeypatch.setattr(ladder, "solve_factors", lambda *_, **__: wrong)
    edit = equalize_product(b, a, make_recipe())
    assert edit.solver != "factors"
    assert edit.warnings[0].startswith("factors handed over: ")
    assert_as_reference(edit, b @ a)


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_answer_fails_the_certificate_and_the_next_rung_takes_over(monkeypatch, how):
    delta = make_delta("inverse-root", 300, 150, 3)
    kept = solve_svd(delta, make_rule())
    wrong = spoil(delta, kept, how)
    assert certify(kept, (delta,)).find_fault() is None
    assert certify(dataclasses.replace(kept, M=wrong), (delta,)).find_fault() is not None

    answer = Truncation(wrong, kept.sigma, kept.rank, kept.k, 0.0)
    broken = (("broken", lambda D, rule, **_: answer), *ladder.RUNGS)
    monkeypatch.setattr(ladder, "RUNGS", broken)
    edit = equalize(delta)
    assert edit.solver != "broken"
    assert edit.warnings[0].startswith("broken handed over: ")
    assert_as_reference(edit, delta)


@pytest.mark.parametrize("kind", ["noise", "strong", "geometric", "deficient"])
def test_every_rung_gives_the_same_bits_again(kind):
    delta = make_delta(kind, 300, 150, 9)
    first = equalize(delta)
    torch.randn(100)  # the global generator moves on, the answer does not
    second = equalize(delta.clone())
    assert torch.equal(first.value, second.value)
    assert first.solver == second.solver


@pytest.mark.parametrize("kind", ["noise", "strong", "geometric", "deficient", "sparse"])
def test_nothing_fails_unseen(kind):
    """A mistake in a rung would hide as a driver failure: on the CPU no rung raises anything but Undecided."""
    edit = equalize(make_delta(kind, 260, 140, 4))
    assert not any("Error" in note for note in edit.warnings)


def test_precision_is_restored_after_a_failure():
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ZeroDivisionError), precision.full_precision(torch.device("cpu")):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
