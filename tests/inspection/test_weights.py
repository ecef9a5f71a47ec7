"""What `pome inspect --weights` finds, against the definitions with torch's decompositions and `pdist` in float64."""

from __future__ import annotations

import csv
import json
import statistics

import pytest
import torch
from safetensors.torch import save_file

from pome import EditSpec, edit
from pome.config.look import read_look
from pome.errors import NumericalError, SpecError
from pome.inspection.survey import survey
from pome.kernel import energy
from support.adapters import make_pair, quietly
from support.checkpoints import llama_pair, perturb, read_tensors, run_python, write_checkpoint
from support.reference import reference_edit

UP = "model.layers.0.mlp.up_proj.weight"


def pair_mean(W):
    return float(torch.pdist(W / W.norm(dim=1, keepdim=True)).reciprocal().mean())


def find_weights(base, ft, **options):
    """BASE, FT and both edits of one matrix, fan_out x fan_in, by definition."""
    base, ft = base.double(), ft.double()
    U, _, Vh = torch.linalg.svd(ft, full_matrices=False)
    return {
        "base": base,
        "fine_tuned": ft,
        "equalized": base + reference_edit(ft - base, **options).value,
        "equivalence": (U * torch.linalg.svdvals(base)) @ Vh,
    }


def assert_measured(weights, base, ft, **options):
    wanted = find_weights(base, ft, **options)
    sigma = torch.linalg.svdvals(wanted["base"])
    # 1e-6 of the norm: the edits are float32 sums. The energy is as smooth in the entries as the nearest rows are far
    # apart, here some tenths.
    for key, W in wanted.items():
        if key != "base":
            drift = float((torch.linalg.svdvals(W) - sigma).norm() / sigma.norm())
            assert weights.spectral_drift[key] == pytest.approx(drift, rel=1e-5, abs=1e-6)
        assert weights.hyperspherical_energy[key] == pytest.approx(pair_mean(W), rel=1e-5)
    assert 0 < weights.spectral_drift["equivalence"] < 1e-6 < weights.spectral_drift["fine_tuned"]
    assert (weights.rows, weights.zero_rows, weights.identical_pairs) == (base.shape[0], 0, 0)
    assert list(weights.spectral_drift) == ["fine_tuned", "equalized", "equivalence"]
    assert list(weights.hyperspherical_energy) == ["base", *weights.spectral_drift]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_measured_by_definition(tmp_path, dtype):
    base, ft = llama_pair(tmp_path, dtype=dtype)
    before, after = read_tensors(base), read_tensors(ft)
    found = survey(base, ft, weights=True).matrices
    assert {m.name for m in found} == {name for name, t in before.items() if t.ndim == 2}
    for m in found:
        assert_measured(m.weights, before[m.name], after[m.name])


def test_the_equalized_edit_is_that_of_the_options(tmp_path):
    base, ft = llama_pair(tmp_path)
    before, after = read_tensors(base), read_tensors(ft)
    spec = EditSpec(layers=("ffn",), rank_ratio=0.25, beta=1.7, overrides=({"match": "layers.1", "beta": 0.4},))
    found = survey(base, ft, spec, weights=True).matrices
    assert len(found) == 6
    for m in found:
        beta = 0.4 if "layers.1" in m.name else 1.7
        assert_measured(m.weights, before[m.name], after[m.name], rank_ratio=0.25, beta=beta)
        # The method `equivalence` is measured before beta.
    out = edit(base, ft, tmp_path / "out", spec)
    records = {record.name: record for record in out.tensors}
    for m in found:
        assert (m.weights.k, m.weights.alpha) == (records[m.name].k, pytest.approx(records[m.name].alpha, rel=1e-6))


def test_the_drift_is_what_an_edit_by_equivalence_records(tmp_path):
    base, ft = llama_pair(tmp_path, dtype=torch.bfloat16)
    records = edit(base, ft, tmp_path / "out", EditSpec(method="equivalence")).tensors
    found = {m.name: m.weights for m in survey(base, ft, weights=True).matrices}
    assert records
    for record in records:
        assert found[record.name].spectral_drift["fine_tuned"] == pytest.approx(record.spectral_drift, rel=1e-9)


def write_fine_tuned(tmp_path, kind):
    """[BASE, FT] of a tiny model of transformers, and the tensors of both."""
    pair = make_pair(tmp_path, kind, target_modules=r"nothing|.*\.0\.(attn|self_attn)\.(c_attn|q_proj|qkv_proj)")
    config = json.loads((pair.base / "config.json").read_text())
    before = read_tensors(pair.base)
    after = perturb(before, 0.002)
    return pair.base, write_checkpoint(tmp_path / "ft", after, config=config), before, after


# Of a stored tensor, the matrix of a part: of Conv1D the transpose, of a fused tensor a half of its rows.
@pytest.mark.parametrize(
    ("kind", "name", "parts"),
    [
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", {None: lambda t: t.T}),
        (
            "gpt2",
            "transformer.h.0.attn.c_attn.weight",
            {f"qkv={role}": (lambda t, i=i: t.T[32 * i : 32 * i + 32]) for i, role in enumerate("qkv")},
        ),
        (
            "phi3",
            "model.layers.0.mlp.gate_up_proj.weight",
            {"half=gate": lambda t: t[:40], "half=up": lambda t: t[40:]},
        ),
    ],
)
def test_rows_are_output_units_in_every_layout(tmp_path, kind, name, parts):
    base, ft, before, after = write_fine_tuned(tmp_path, kind)
    found = {m.part: m.weights for m in survey(base, ft, weights=True).matrices if m.name == name}
    assert set(found) == set(parts)
    for part, take in parts.items():
        assert_measured(found[part], take(before[name]), take(after[name]))


def test_every_expert_is_measured(tmp_path):
    torch.manual_seed(0)
    experts = {
        f"model.layers.0.mlp.experts.{one}": torch.randn(shape) * 0.1
        for one, shape in (("gate_up_proj", (3, 16, 48)), ("down_proj", (3, 24, 16)))
    }
    config = {"model_type": "gpt_oss", "hidden_size": 16, "intermediate_size": 24, "num_local_experts": 3}
    changed = perturb(experts, 0.004)
    base = write_checkpoint(tmp_path / "base", experts, config=config)
    ft = write_checkpoint(tmp_path / "ft", changed, config=config)
    found = survey(base, ft, weights=True).matrices
    assert len(found) == 9
    for m in found:
        expert = int(m.part.partition("expert=")[2][0])
        # gpt-oss stores (in, out), and interleaves gate and up.
        columns = slice(0 if "gate" in m.part else 1, None, 2) if "half" in m.part else slice(None)
        sides = (t[m.name][expert][:, columns].T for t in (experts, changed))
        assert_measured(m.weights, *sides)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_is_measured_as_peft_merges_it(tmp_path, kind, lora):
    modules = {"llama": ["q_proj", "up_proj", "down_proj"], "gpt2": ["c_fc", "c_attn"]}[kind]
    pair = make_pair(tmp_path, kind, target_modules=modules, fan_in_fan_out=kind == "gpt2", **lora)
    with quietly():
        merged = pair.save_merged(tmp_path / "merged")
    before = read_tensors(pair.base)
    found = survey(pair.base, pair.adapter, weights=True).matrices
    assert len(found) == {"llama": 6, "gpt2": 8}[kind]
    for m in found:
        sides = [t[m.name].T if kind == "gpt2" else t[m.name] for t in (before, merged)]
        if m.part:
            start = 32 * "qkv".index(m.role)
            sides = [t[start : start + 32] for t in sides]
        wanted = find_weights(*sides, k=m.weights.k)
        sigma = torch.linalg.svdvals(wanted["base"])
        assert m.weights.k == max(1, round(0.5 * m.rank))
        for key, W in wanted.items():
            # 1e-4: what is merged was rounded to float32, which moves the equalized directions of a short delta.
            assert m.weights.hyperspherical_energy[key] == pytest.approx(pair_mean(W), rel=1e-4)
            if key != "base":
                drift = float((torch.linalg.svdvals(W) - sigma).norm() / sigma.norm())
                assert m.weights.spectral_drift[key] == pytest.approx(drift, rel=1e-4, abs=1e-6)


def test_what_has_no_answer_is_null_and_what_is_left_out_is_told(tmp_path):
    base, ft = llama_pair(tmp_path)
    before, after = read_tensors(base), read_tensors(ft)
    before[UP].zero_()
    gate, down = UP.replace("up", "gate"), UP.replace("up", "down")
    after[gate].zero_()
    for tensors in (before, after):  # as the rows of padding in an embedding are
        tensors[down][3] = 0.0
        tensors[down][5] = tensors[down][9] = tensors[down][1]
    save_file(before, base / "model.safetensors")
    save_file(after, ft / "model.safetensors")
    words = ["inspect", str(base), str(ft), "--layers", "ffn", "--weights", "--json", "--csv", f"{tmp_path}/t.csv"]
    run = run_python("-m", "pome", *words)
    assert run.returncode == 0, run.stderr
    found = {tensor["name"]: tensor["weights"] for tensor in json.loads(run.stdout)["tensors"]}
    assert set(found[UP]["spectral_drift"].values()) == {None}
    assert set(found[UP]["hyperspherical_energy"].values()) == {None} and found[UP]["zero_rows"] == 40
    assert found[gate]["spectral_drift"]["fine_tuned"] == pytest.approx(1.0)
    assert found[gate]["spectral_drift"]["equivalence"] is None and found[gate]["zero_rows"] == 40
    assert (found[down]["rows"], found[down]["zero_rows"], found[down]["identical_pairs"]) == (16, 1, 3)
    first, second = torch.triu_indices(16, 16, 1)
    out = {(1, 5), (1, 9), (5, 9)} | {(i, 3) for i in range(16)} | {(3, i) for i in range(16)}
    kept = torch.tensor([pair not in out for pair in zip(first.tolist(), second.tolist(), strict=True)])
    for key, tensors in (("base", before), ("fine_tuned", after)):
        W = tensors[down].double()
        distances = torch.pdist(W / W.norm(dim=1, keepdim=True).clamp_min(1e-9))[kept]
        assert found[down]["hyperspherical_energy"][key] == pytest.approx(float(distances.reciprocal().mean()))
    # Where an edit's rows of one direction are apart by rounding alone, nothing is made of it.
    assert max(found[down]["hyperspherical_energy"].values()) < 1.0
    assert "Left out of the energy, of all weights: 81 rows of zeros, 3 pairs of one direction." in run.stderr, (
        run.stderr
    )
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "t.csv").read_text().splitlines())}
    assert rows[UP]["spectral_drift_fine_tuned"] == "" and rows[down]["zero_rows"] == "1"
    energies = found[down]["hyperspherical_energy"]
    assert {key: float(rows[down][f"hyperspherical_energy_{key}"]) for key in energies} == energies


def test_a_sample_of_rows_is_told(tmp_path, monkeypatch, capsys):
    from pome.cli.app import run_command

    monkeypatch.setattr(energy, "MOST_ROWS", 20)
    base, ft = llama_pair(tmp_path)
    assert run_command(["inspect", str(base), str(ft), "--layers", "ffn", "--weights", "--json"]) == 0
    out, err = capsys.readouterr()
    assert {t["role"]: t["weights"]["rows"] for t in json.loads(out)["tensors"]} == {"up": 20, "gate": 20, "down": 16}
    assert "Energy from a seeded sample of 20 rows: 4 of 6 matrices have more." in " ".join(err.split())
    tensors = read_tensors(base)
    again = survey(base, ft, EditSpec(layers=("up",)), weights=True).matrices
    assert pair_mean(energy.find_directions(tensors[again[0].name])) == pytest.approx(
        again[0].weights.hyperspherical_energy["base"], rel=1e-9
    )


def test_without_the_option_nothing_is_measured_nor_told(tmp_path, monkeypatch):
    base, ft = llama_pair(tmp_path)
    monkeypatch.setattr("pome.inspection.measure.measure_weights", None)
    found = survey(base, ft)
    assert {m.weights for m in found.matrices} == {None}
    assert "weights" not in json.loads("".join(found.to_json()))["tensors"][0]


def test_options_of_an_edit_need_weights_and_a_batch_s_defaults_do_not():
    spec, weights = read_look({"weights": True, "beta": 1.5, "rank_rule": "effective"}, {"beta": 1.5})
    assert (weights, spec.beta, spec.rank_rule) == (True, 1.5, "effective")
    spec, weights = read_look({"beta": 1.5, "energy": 0.5}, {"energy": 0.5})
    assert (weights, spec.beta, spec.energy) == (False, 1.0, 0.5)
    with pytest.raises(SpecError, match="beta: has no effect without weights; give both or neither"):
        read_look({"beta": 1.5}, {"beta": 1.5})
    with pytest.raises(SpecError, match="weights: 1 is not true or false"):
        read_look({"weights": 1}, {})


def test_a_driver_that_fails_is_an_error_that_names_the_matrix(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("the algorithm failed to converge")

    base, ft = llama_pair(tmp_path)
    monkeypatch.setattr("pome.inspection.weights.match_part", lambda *_: None)  # whose drivers are the same
    monkeypatch.setattr("pome.kernel.equivalence.find_values", fail)
    with pytest.raises(NumericalError, match=r"layers\.[01]\.mlp\.up_proj.*failed to converge; leave it out"):
        survey(base, ft, EditSpec(layers=("up",)), weights=True)


def test_a_real_pair_drifts_by_some_thousandths_and_an_edit_takes_it_back(rxnfp):
    found = survey(*rxnfp, EditSpec(layers=("ffn",)), weights=True).matrices
    before, after = (read_tensors(side) for side in rxnfp)
    for m in found[::6]:
        assert_measured(m.weights, before[m.name], after[m.name])
    drifts = {
        key: statistics.median(m.weights.spectral_drift[key] for m in found) for key in found[0].weights.spectral_drift
    }
    assert len(found) == 24 and 0.003 < drifts["fine_tuned"] < 0.005 and drifts["equivalence"] < 1e-9
