"""What `pome inspect` finds, against definitions, planted truth and what edits really do."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pome import EditSpec, edit
from pome.errors import NumericalError
from pome.inspection.records import find_place, sort_places
from pome.inspection.survey import survey
from pome.kernel.alignment import measure_alignment
from pome.kernel.decomposition import ZeroDelta
from pome.kernel.noise import measure_grid, storage_noise_floor
from pome.kernel.rank import Spectrum, count_effective, count_energy, count_gavish_donoho, count_signal
from pome.kernel.values import measure_product, measure_values
from support.adapters import make_pair, read_delta
from support.checkpoints import LLAMA, llama_pair, read_tensors, run_python, write_checkpoint
from support.recipes import make_rule
from support.reference import plant

SIDE = (640, 512)


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plant_signal(rank, weakest, seed):
    """A SIDE matrix of that rank, its singular values from 4 down to `weakest`."""
    sigma = torch.cat([torch.linspace(4.0, weakest, rank), torch.zeros(min(SIDE) - rank)])
    return plant(sigma, *SIDE, seed=seed, dtype=torch.float64)


# Exact where the weakest direction is twice the edge of the noise; where it is 1.2 times, 5 % may be missed.
@pytest.mark.parametrize("rank", [5, 40, 200])
@pytest.mark.parametrize(("weakest", "missed"), [(2.0, 0.0), (1.2, 0.05)])
@pytest.mark.parametrize("noise", ["gaussian", "rounding"])
def test_planted_ranks_are_recovered(rank, weakest, missed, noise):
    if noise == "gaussian":
        edge = 1e-3 * (math.sqrt(SIDE[0]) + math.sqrt(SIDE[1]))
        delta = edge * plant_signal(rank, weakest, rank) + 1e-3 * draw(SIDE, rank + 1)
    else:
        base = 0.02 * draw(SIDE, rank + 1)
        edge = storage_noise_floor(base.bfloat16())
        stored = (base + edge * plant_signal(rank, weakest, rank)).bfloat16()
        delta = stored.double() - base
        edge = storage_noise_floor(stored)
    sigma = torch.linalg.svdvals(delta)
    for k in (count_signal(sigma, edge, SIDE), count_gavish_donoho(Spectrum(sigma, len(sigma), SIDE))):
        assert abs(k - rank) <= missed * rank


def test_noise_alone_is_not_taken_for_signal():
    # Without the margin for the fluctuation of the edge every sixth matrix would show a direction.
    edge = math.sqrt(120) + math.sqrt(80)
    spectra = [torch.linalg.svdvals(draw((120, 80), seed)) for seed in range(40)]
    assert [count_signal(sigma, edge, (120, 80)) for sigma in spectra] == [0] * 40


def test_effective_and_energy_follow_their_formulas_on_a_geometric_spectrum():
    sigma = 0.9 ** torch.arange(60, dtype=torch.float64)
    spectrum = Spectrum(sigma, 60, (60, 60))
    share = [0.9**i * 0.1 / (1 - 0.9**60) for i in range(60)]
    assert count_effective(spectrum) == round(math.exp(-sum(p * math.log(p) for p in share)))
    # The first k hold (1 - 0.81^k) / (1 - 0.81^60) of the energy.
    assert count_energy(spectrum, 0.9) == math.ceil(math.log(1 - 0.9 * (1 - 0.81**60)) / math.log(0.81))


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (40, 25), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_are_those_of_a_float64_decomposition(shape, dtype):
    D = (1e-3 * draw(shape, 1) + draw((shape[0], 2), 2) @ draw((2, shape[1]), 3)).to(dtype)
    exact = torch.linalg.svdvals(D.double())
    found = measure_values(D)
    assert found.rank == min(shape)
    # The float32 route takes strong directions out of the bulk by subtraction: 32 * 2^-24 of s_1 may be left of them,
    # and here s_1 is up to 7e4 times the last value.
    assert torch.allclose(found.sigma, exact, rtol=5e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(-60, 60))
def test_low_rank_values_have_that_rank_on_every_scale(rank, exponent):
    b, a = draw((150, rank), rank).float(), draw((rank, 110), rank + 1).float() * 2.0**exponent
    exact = torch.linalg.svdvals(b.double() @ a.double())
    for found in (measure_product(b, a), measure_values(b @ a)):
        assert found.rank == rank
        assert torch.allclose(found.sigma[:rank], exact[:rank], rtol=1e-4)
        assert not found.sigma[rank:].any()
    with pytest.raises(ZeroDelta):
        measure_values(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="NaN"):
        measure_values(torch.full((3, 4), math.nan))


def test_alignment_sees_whether_a_delta_lies_in_the_base_s_leading_directions():
    U, V = torch.linalg.qr(draw((160, 128), 0)).Q, torch.linalg.qr(draw((128, 128), 1)).Q
    sigma = torch.cat([torch.linspace(9, 5, 16), torch.linspace(1, 0.5, 112)]).double()
    W = (U * sigma) @ V.T
    inside = U[:, :16] @ draw((16, 16), 2) @ V[:, :16].T
    outside = U[:, 16:] @ draw((112, 112), 3) @ V[:, 16:].T
    for D, share in ((inside, 1.0), (outside, 0.0)):
        alignment = measure_alignment(W, (D,), float(D.norm()))
        # The gap of 5 makes the subspace iteration converge by (1/5)^5 a squared step.
        assert alignment.r == 16 and alignment.spectral_norm == pytest.approx(9.0, rel=1e-6)
        assert [alignment.left, alignment.right] == pytest.approx([share, share], abs=1e-3)
    # A multiple of the base moves every singular value by the same share.
    assert measure_alignment(W, (0.01 * W,), float(0.01 * W.norm())).drift == pytest.approx(0.01, rel=1e-6)
    # The factors of a delta say the same as the delta.
    b, a = draw((160, 3), 4), draw((3, 128), 5)
    norm = float((b @ a).norm())
    thin, dense = measure_alignment(W, (b, a), norm), measure_alignment(W, (b @ a,), norm)
    assert (thin.left, thin.right, thin.drift) == pytest.approx((dense.left, dense.right, dense.drift), rel=1e-9)


@pytest.mark.parametrize("size", [3e-6, 1e-5, 3e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
def test_expected_rounding_is_what_storing_really_loses(size, base_dtype):
    base = (0.02 * draw(SIDE, 0)).to(base_dtype)
    step = size * draw(SIDE, 1)
    stored = (base.double() + step).bfloat16()
    lost = float((stored.double() - base.double() - step).norm() / step.norm())
    grid = measure_grid(stored)
    # Below the spacing the grid is that of the base's own exponents, not quite those of a binade's edge: 3 %.
    assert grid.expect_rounding(float(step.norm()), base_dtype == torch.bfloat16) == pytest.approx(lost, rel=0.03)


def test_a_survey_is_the_definition_of_its_numbers(tmp_path):
    base, ft = llama_pair(tmp_path, dtype=torch.bfloat16)
    found = survey(base, ft)
    before, after = read_tensors(base), read_tensors(ft)
    assert {m.name for m in found.matrices} == {name for name, t in before.items() if t.ndim == 2}
    assert [record.name for record in found.kept] == []
    for m in found.matrices:
        W, D = before[m.name].double(), after[m.name].double() - before[m.name].double()
        sigma, norm = torch.linalg.svdvals(D), float(D.norm())
        squares = sigma.square() / sigma.square().sum()
        # 1e-5: the delta is worked on in float32 and its singular values are kept in it
        assert torch.allclose(torch.tensor(m.sigma, dtype=torch.float64), sigma, rtol=1e-5, atol=0)
        half = round(0.5 * m.rank)
        expected = {
            "delta_norm": norm,
            "base_norm": float(W.norm()),
            "relative_norm": norm / float(W.norm()),
            "stable_rank": 1 / float(squares[0]),
            "noise_floor": storage_noise_floor(after[m.name]),
            "changed": float((D != 0).double().mean()),
            "effective_rank": math.exp(-sum(p * math.log(p) for p in (sigma / sigma.sum()).tolist())),
        }
        assert {key: getattr(m, key) for key in expected} == pytest.approx(expected, rel=1e-5)
        assert m.energy["0.5"] == pytest.approx(float(squares[:half].sum()), rel=1e-5)
        assert m.shape == tuple(W.shape) and m.rank == min(W.shape)
        for rule, k in m.k.items():
            assert k == make_rule(rule, m.noise_floor).choose(sigma, m.rank, m.shape)


def test_a_survey_foretells_what_the_edit_does(tmp_path):
    base, ft = llama_pair(tmp_path, dtype=torch.bfloat16)
    found = {m.name: m for m in survey(base, ft).matrices}
    for rule in ("ratio", "energy", "noise-floor", "gavish-donoho", "effective"):
        for scale in ("frobenius", "mean", "spectral", "rms", "unit"):
            out = tmp_path / f"{rule}-{scale}"
            if rule != "ratio" and scale != "frobenius":
                continue  # alpha is foretold at the default rule's k
            for record in edit(base, ft, out, EditSpec(rank_rule=rule, scale=scale)).tensors:
                m = found[record.name]
                assert record.k == m.k[rule]
                assert record.noise_floor == m.noise_floor
                if rule == "ratio":
                    assert record.alpha == pytest.approx(m.alpha[scale], rel=1e-5)
                    assert record.edit_norm / record.delta_norm == pytest.approx(m.edit_ratio[scale], rel=1e-5)
                if (rule, scale) == ("ratio", "frobenius"):
                    # 600 entries of an edit that is not quite Gaussian
                    assert record.rounding == pytest.approx(m.rounding, rel=0.1)


def test_an_adapter_is_seen_by_its_factors(tmp_path):
    pair = make_pair(tmp_path, "llama")
    found = survey(pair.base, pair.adapter)
    assert found.matrices
    for m in found.matrices:
        exact = torch.linalg.svdvals(read_delta(pair, m.name.removesuffix(".weight")).double())
        rank = int((exact > 1e-6 * exact[0]).sum())
        assert (m.rank, m.noise_floor, m.changed) == (rank, 0.0, None)
        assert torch.allclose(torch.tensor(m.sigma[:rank]).double(), exact[:rank], rtol=1e-4)


def test_unchanged_and_unfit_tensors_are_told_with_their_reasons(tmp_path):
    tensors = {
        "model.layers.0.mlp.up_proj.weight": draw((40, 16), 0).float(),
        "model.layers.1.mlp.up_proj.weight": draw((40, 16), 1).float(),
        "embeddings.position_ids": torch.arange(8)[None],
        "classifier.weight": draw((3, 16), 2).float(),
    }
    base = write_checkpoint(tmp_path / "base", tensors, config=LLAMA)
    changed = {**tensors, "model.layers.1.mlp.up_proj.weight": draw((40, 16), 3).float()}
    changed["classifier.weight"] = draw((5, 16), 2).float()
    ft = write_checkpoint(tmp_path / "ft", changed, config=LLAMA)
    found = survey(base, ft)
    assert [m.name for m in found.matrices] == ["model.layers.1.mlp.up_proj.weight"]
    reasons = {record.name: record.reason for record in found.kept}
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "its delta is zero: FT equals BASE"
    assert "no weights" in reasons["embeddings.position_ids"]
    assert "BASE's [3, 16]" in reasons["classifier.weight"]


def test_nan_is_an_error_that_names_tensor_and_side(tmp_path):
    base, ft = llama_pair(tmp_path)
    tensors = read_tensors(ft)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    broken = write_checkpoint(tmp_path / "broken", tensors, config=LLAMA)
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.down_proj.*FT holds NaN"):
        survey(base, broken)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.7.mlp.up_proj.weight", "model.layers.7"),
        ("transformer.h.0.mlp.c_fc.weight", "transformer.h.0"),
        ("encoder.block.3.layer.1.wi.weight", "encoder.block.3"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_the_place_of_a_tensor_is_its_layer(name, place):
    assert find_place(name) == place


def test_numbers_relative_to_a_base_of_zeros_are_null(tmp_path):
    base, ft = llama_pair(tmp_path)
    tensors = read_tensors(base)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].zero_()
    save_file(tensors, base / "model.safetensors")
    words = ["inspect", str(base), str(ft), "--layers", "up", "--json"]
    run = run_python("-m", "pome", *words, "--html", f"{tmp_path}/t.html", "--csv", f"{tmp_path}/t.csv")
    assert run.returncode == 0, run.stderr
    zero, other = json.loads(run.stdout)["tensors"]
    assert (zero["relative_norm"], zero["drift"]) == (None, None) and other["drift"] > 0
    assert re.search(r"^model.layers.0 +1 +- ", run.stderr, re.MULTILINE)
    assert "over 30% of the weight" in run.stderr
    assert ",40,16,," in (tmp_path / "t.csv").read_text()


def test_layer_ten_comes_after_layer_two():
    assert sort_places([f"m.{'9' * 6000}", "m.010", "m.9"]) == ["m.9", "m.010", f"m.{'9' * 6000}"]
    assert sort_places(["m.10", "head", "m.2", "m.10"]) == ["head", "m.2", "m.10"]


def test_the_command_writes_json_and_a_table_and_keeps_the_streams_apart(tmp_path):
    base, ft = llama_pair(tmp_path)
    words = ["inspect", str(base), str(ft), "--layers", "up,q", "--json", "--csv", f"{tmp_path}/t.csv"]
    run = run_python("-m", "pome", *words)
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert [(t["role"], t["shape"], len(t["sigma"])) for t in document["tensors"]] == [
        ("up", [40, 16], 16), ("q", [16, 16], 16), ("up", [40, 16], 16), ("q", [16, 16], 16)
    ]  # fmt: skip
    promised = {"name", "part", "stable_rank", "effective_rank", "noise_floor", "above_noise", "k"}
    assert promised <= set(document["tensors"][0])
    assert "suggested: An ordinary full fine-tune" in run.stderr
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("name,part,role,layer,fan_out,fan_in,relative_norm")
