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
from pome.kernel.certificate import certify, certify_factored, inner_dense
from pome.kernel.decomposition import Undecided
from pome.kernel.equalize import Unsolved, equalize, equalize_product, prove_product
from pome.kernel.solvers.deflated import deflate, solve_deflated
from pome.kernel.solvers.gram import solve_gram
from pome.kernel.solvers.svd import solve_svd
from support.recipes import make_recipe, make_rule
from support.reference import assert_as_reference, plant, reference_edit


def make_delta(kind, m, n, seed):
    """A float32 matrix large enough for the whole ladder, of a kind that has broken solvers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    r = min(m, n)
    i = torch.arange(r, dtype=torch.float64)
    spectra = {
        "inverse": 1.0 / (i + 1.0),
        "inverse-root": 1.0 / (i + 1.0).sqrt(),
        "geometric": 10.0 ** (-8.0 * i / r),
        "gentle": 10.0 ** (-2.0 * i / r),
        "staircase": 10.0 ** -(i * 6 / r).floor(),
        "spike": torch.where(i < 2, 1e6, 1.5 - i / r),
        "step": torch.where(i < r // 2, 1.0, 0.9985),
        "clusters": 10.0 ** -(i * 3 / r).floor() * (1.0 + 1e-4 * torch.rand(r, generator=generator)),
        "at-the-threshold": torch.where(i < r // 3, 1.5 - i / r, 10.0 ** (-6.2 - i / r)),
        "deficient": torch.where(i < 2 * r // 3, 1.0 / (i + 1.0).sqrt(), 0.0),
        "orthogonal": torch.ones(r),
    }
    if kind in spectra:
        return plant(spectra[kind], m, n, seed)
    if kind == "noise":
        return draw(m, n) * 1e-3
    if kind == "strong":
        return draw(m, n) + (draw(m, 20) * torch.logspace(0, 2, 20)) @ draw(20, n)
    if kind == "rounded-lora":
        base = (draw(m, n) * 0.02).bfloat16().float()
        return (base + draw(m, 8) @ draw(8, n) * 1e-4).bfloat16().float() - base
    if kind == "low-rank":
        return draw(m, 7) @ draw(7, n)
    if kind == "integer":
        return torch.randint(-3, 4, (m, n), generator=generator).float()
    if kind == "sparse":
        return draw(m, n) * (torch.rand(m, 1, generator=generator) < 0.3) * (torch.rand(n, generator=generator) < 0.6)
    if kind == "signs":
        return draw(m, n).sign() * 2e-5
    assert kind == "hilbert"
    return 1.0 / (torch.arange(m)[:, None] + torch.arange(n) + 1.0)


KINDS = [
    *("inverse", "inverse-root", "geometric", "gentle", "staircase", "spike", "step", "clusters", "at-the-threshold"),
    *("deficient", "orthogonal", "noise", "strong", "rounded-lora", "low-rank", "integer", "sparse", "signs"),
    "hilbert",
]


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
    error = float((alpha * kept.P.double() - wanted.value).norm() / wanted.value.norm())
    assert error <= 1e-4  # what SUBSPACE promises, on spectra whose gaps are above GAP at this size
    assert kept.P.is_contiguous()


@pytest.mark.parametrize("kind", ["noise", "inverse", "strong", "rounded-lora", "deficient"])
def test_the_usual_spectra_take_the_first_rung(kind):
    assert equalize(make_delta(kind, 420, 160, 5)).solver == "deflated-float32"


def test_a_flat_spectrum_deflates_nothing_and_a_steep_one_does():
    assert deflate(make_delta("noise", 400, 300, 0)).theta.numel() == 0
    assert deflate(make_delta("rounded-lora", 400, 300, 0)).theta.numel() == 8


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
    def solve(*_):
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
    return lambda D, cache=None: [
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
    assert torch.equal(kept.P, solve_deflated(delta, make_rule()).P)


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
    solve = ladder.solve_factors
    kept = solve(b, a, make_rule())
    assert prove_product(b, a, kept).find_fault() is None
    monkeypatch.setattr(ladder, "solve_factors", lambda *given: dataclasses.replace(solve(*given), P=spoil(kept, how)))
    edit = equalize_product(b, a, make_recipe())
    assert edit.solver != "factors"
    assert edit.warnings[0].startswith("factors handed over: ")
    assert_as_reference(edit, b @ a)


@pytest.mark.parametrize("wrong", ["left", "right", "directions"])
def test_wrong_factors_fail_the_certificate(wrong):
    b, a = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((300, 12), (12, 150)))
    kept = ladder.solve_factors(b, a, make_rule())
    left, right = kept.factors
    if wrong == "left":
        left = left * 1.0001
    elif wrong == "right":
        right = torch.roll(right, 1, 0) + 1e-4 * right
    else:
        left, right = torch.linalg.qr(b).Q[:, :6], torch.linalg.qr(a.T).Q.T[:6]
    assert prove_product(b, a, dataclasses.replace(kept, P=left @ right, factors=(left, right))).find_fault()


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    k=st.integers(1, 9),
    size=st.floats(1e-4, 1e-1),
    seed=st.integers(0, 99),
)
def test_the_factored_certificate_measures_what_it_says(m, n, k, size, seed):
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n, k)
    left, right = (plant(torch.ones(k), *shape, seed, torch.float64) for shape in ((m, k), (k, n)))
    left += size * torch.randn(m, k, generator=generator, dtype=torch.float64) / math.sqrt(m)
    b, a = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, 3), (3, n)))
    P = left @ right
    proof = certify_factored(P, left, right, k, 2.0, b, a)
    assert proof.norm == pytest.approx(float(P.norm()), rel=1e-9)
    assert proof.objective == pytest.approx(float((b @ a * P).sum()) / 2.0, rel=1e-9, abs=1e-12)
    assert proof.orthogonality == pytest.approx(float((P @ P.T @ P - P).norm() / P.norm()), rel=1e-6, abs=1e-12)


def spoil(kept, how):
    """A P that a broken driver might return."""
    P, k = kept.P.clone(), kept.k
    if how == "scaled":
        P *= 1.001
    elif how == "rank too high":
        P = solve_svd(spoil.delta, make_rule(rank=k + 1)).P
    elif how == "rank too low":
        P = solve_svd(spoil.delta, make_rule(rank=k - 1)).P
    elif how == "wrong directions":
        U, _, Vh = torch.linalg.svd(spoil.delta)
        chosen = torch.cat((torch.arange(k - 5), torch.arange(k, k + 5)))
        P = U[:, chosen] @ Vh[chosen]
    elif how == "sign":
        P = -P
    elif how == "one entry":
        P[3, 4] += 0.01
    elif how == "not a number":
        P[0, 0] = math.nan
    elif how == "zero":
        P.zero_()
    elif how == "half precision":
        P = P.bfloat16().float()
    return P


WRONG = [
    *("scaled", "rank too high", "rank too low", "wrong directions", "sign", "one entry", "not a number", "zero"),
    "half precision",
]


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_answer_fails_the_certificate_and_the_next_rung_takes_over(monkeypatch, how):
    delta = make_delta("inverse-root", 300, 150, 3)
    kept = solve_svd(delta, make_rule())
    spoil.delta = delta
    wrong = spoil(kept, how)
    attainable = float(kept.sigma[: kept.k].sum())
    assert certify(kept.P, kept.k, attainable, inner_dense(delta)).find_fault() is None
    assert certify(wrong, kept.k, attainable, inner_dense(delta)).find_fault() is not None

    broken = (("broken", lambda D, rule: type(kept)(wrong, kept.sigma, kept.rank, kept.k, 0.0)), *ladder.RUNGS)
    monkeypatch.setattr(ladder, "RUNGS", broken)
    edit = equalize(delta)
    assert edit.solver != "broken"
    assert edit.warnings[0].startswith("broken handed over: ")
    assert_as_reference(edit, delta)


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 60), n=st.integers(1, 60), size=st.floats(1e-6, 1e-1), seed=st.integers(0, 2**16))
def test_probes_estimate_the_orthogonality(m, n, size, seed):
    generator = torch.Generator().manual_seed(seed)
    P = plant(torch.ones(min(m, n)), m, n, seed, torch.float64)
    P += size * torch.randn(m, n, generator=generator, dtype=torch.float64) / math.sqrt(max(m, n))
    delta = torch.randn(m, n, generator=generator, dtype=torch.float64)
    proof = certify(P, min(m, n), 2.0, inner_dense(delta))
    assert proof.norm == pytest.approx(float(P.norm()), rel=1e-12)
    assert proof.objective == pytest.approx(float((delta * P).sum()) / 2.0, rel=1e-9, abs=1e-12)
    true = float((P @ P.T @ P - P).norm() / P.norm())
    # 8 Gaussian probes: chi-square of 8 degrees in the worst case, within these factors in all but 1e-5 of the draws
    assert true / 6 <= proof.orthogonality <= 2.5 * true
    if min(m, n) <= 8:
        assert proof.orthogonality == pytest.approx(true, rel=1e-6)


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
