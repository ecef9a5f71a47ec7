"""--method equivalence from the command line to the bytes: outputs, overrides, adapters, verification, reports."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import pome
from pome import EditSpec
from pome.cli.tables.edit import make_closing_table
from pome.editing.session import open_pair
from pome.kernel import equivalence
from pome.manifest import Manifest
from pome.output.card import make_card
from pome.reports.edit_warnings import group_warnings
from pome.reports.inspection import make_csv, make_page
from pome.reports.plots import write_plots
from pome.reports.sheet import make_edit_sheet
from support.adapters import FUSED_EXPERTS, LINEAR, make_pair
from support.browser import open_page, read_attribute
from support.checkpoints import LLAMA, assert_only_edited, llama_pair, read_tensors, run_python, write_checkpoint

SPEC = EditSpec(layers=("ffn",), method="equivalence")
NULLS = {"rank", "k", "alpha", "sigma_max", "sigma_k", "sigma_next", "energy_kept", "power_residual"}
MANIFEST = "pome_manifest.json"


def define(W_base: torch.Tensor, W_ft: torch.Tensor) -> torch.Tensor:
    U, _, Vh = torch.linalg.svd(W_ft.double(), full_matrices=False)
    return (U * torch.linalg.svdvals(W_base.double())) @ Vh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_an_output_holds_the_definition(tmp_path: Path, dtype: torch.dtype, beta: float) -> None:
    base, ft = llama_pair(tmp_path, dtype=dtype)
    manifest = pome.edit(base, ft, tmp_path / "out", dataclasses.replace(SPEC, beta=beta))
    assert_only_edited(ft, tmp_path / "out", [record.name for record in manifest.tensors])
    W, W_ft, out = (read_tensors(folder) for folder in (base, ft, tmp_path / "out"))
    raw = json.loads((tmp_path / "out" / MANIFEST).read_bytes())["tensors"]
    assert len(raw) == 6
    for record in raw:
        assert record["method"] == "equivalence" and {key for key, value in record.items() if value is None} >= NULLS
        before, tuned = W[record["name"]].double(), W_ft[record["name"]].double()
        W_E = define(before, tuned)
        wanted, made = before + beta * (W_E - before), out[record["name"]]
        ulp = torch.finfo(dtype).eps * wanted.abs() + torch.finfo(dtype).tiny
        assert bool(((made.double() - wanted).abs() <= ulp).all())
        assert record["distance"] == pytest.approx(float((W_E - tuned).norm()), rel=1e-5)
        s, s_ft = torch.linalg.svdvals(before), torch.linalg.svdvals(tuned)
        assert record["spectral_drift"] == pytest.approx(float((s_ft - s).norm() / s.norm()), rel=1e-5)
        assert record["edit_norm"] == pytest.approx(float((wanted - before).norm()), rel=1e-5)
        assert [value for _, value in record["spectrum"]] == pytest.approx(s.tolist(), rel=1e-5)
        assert record["rounding"] == pytest.approx(
            float((made.double() - wanted).norm() / (wanted - before).norm()), rel=1e-2, abs=1e-6
        )
    assert pome.verify(tmp_path / "out", base, ft, full=True).ok


def test_an_override_changes_the_method_of_what_it_matches(tmp_path: Path) -> None:
    """It sets aside the options that have no effect with it, as a method does on the command line."""
    base, ft = llama_pair(tmp_path)
    spec = EditSpec(layers=("ffn",), rank_ratio=0.25, overrides=({"match": "down", "method": "equivalence"},))  # type: ignore[arg-type]
    manifest = pome.edit(base, ft, tmp_path / "out", spec)
    assert all((record.method == "equivalence") == ("down" in record.name) for record in manifest.tensors)
    assert all((record.k is None) == ("down" in record.name) for record in manifest.tensors)
    assert pome.verify(tmp_path / "out", base, ft, full=True).ok
    card = make_card(manifest, None)
    assert "by orthogonal equivalence" in card and "the others equalized by POME" in card


@pytest.mark.slow
def test_method_is_an_option_of_the_command_line_a_config_file_and_a_batch(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    config, jobs = tmp_path / "edit.yaml", tmp_path / "jobs.yaml"
    config.write_text("rank_ratio: 0.25\nscale: unit\nlayers: ffn\n")
    jobs.write_text(
        "defaults: {method: equivalence}\njobs:\n"
        f"  - {{name: one, base: {base}, fine_tuned: {ft}, out: {tmp_path / 'one'}, layers: ffn}}\n"
    )
    out = tmp_path / "two"
    for arguments in (
        ["batch", str(jobs)],
        ["edit", str(base), str(ft), str(out), "--config", str(config), "--method", "equivalence"],
    ):
        done = run_python("-m", "pome", *arguments)
        assert done.returncode == 0, done.stderr
    assert "drift" in done.stderr and "energy" not in done.stderr
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()
    done = run_python("-m", "pome", "verify", str(out), "--base", str(base), "--ft", str(ft), "--full")
    assert done.returncode == 0, done.stderr
    card = make_card(Manifest.from_json((out / MANIFEST).read_bytes(), "here"), None)
    assert "--method equivalence" in card and "--rank" not in card and "| - | - | - | 1 | - |" in card


@pytest.mark.parametrize(
    "options",
    [["--rank-ratio", "0.5"], ["--rank", "4"], ["--scale", "frobenius"], ["--power", "0"], ["--energy", "0.9"]],
)
def test_options_without_effect_are_refused_on_the_command_line(tmp_path: Path, options: list[str]) -> None:
    base, ft = llama_pair(tmp_path)
    done = run_python(
        "-m", "pome", "edit", str(base), str(ft), str(tmp_path / "out"), "--method", "equivalence", *options
    )
    assert done.returncode == 2 and f"{options[0]}: has no effect with --method 'equivalence'" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "mixtral"])
def test_an_adapter_is_the_fine_tuned_weight_that_it_makes(tmp_path: Path, kind: str) -> None:
    lora = {"llama": {"target_modules": LINEAR}, "mixtral": {"target_parameters": FUSED_EXPERTS}}
    pair = make_pair(tmp_path, kind, **lora.get(kind, {"target_modules": "all-linear"}))
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out", SPEC)
    base, merged, out = (
        read_tensors(pair.base), pair.save_merged(tmp_path / "merged"), read_tensors(tmp_path / "out")
    )  # fmt: skip
    whole = [record for record in manifest.tensors if record.part is None]
    assert whole
    for record in whole:
        W_E = define(base[record.name], merged[record.name])
        assert torch.allclose(out[record.name].double(), W_E, rtol=0, atol=1e-5 * float(W_E.abs().max()))
    assert pome.verify(tmp_path / "out", pair.base, pair.adapter, full=True).ok


def test_an_adapter_as_the_output_is_refused() -> None:
    with pytest.raises(pome.SpecError, match="out_format: 'adapter' .* full rank; give out_format full"):
        EditSpec(method="equivalence", out_format="adapter")


def pruned_pair(folder: Path) -> list[Path]:
    """FT has lost whole rows of its up projections, as structured pruning leaves them; BASE has not."""
    base, ft = llama_pair(folder, dtype=torch.float32)
    tensors = read_tensors(ft)
    for name, W in tensors.items():
        if "up_proj" in name:
            W[5:] = 0.0
    return [base, write_checkpoint(folder / "pruned", tensors, config=LLAMA)]


def test_a_weight_that_lost_its_rank_is_warned_of_and_verified_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine may fill the lost directions otherwise: the singular values and the distance decide."""
    base, ft = pruned_pair(tmp_path)
    spec = EditSpec(method="equivalence", allow_other_base=True)
    manifest = pome.edit(base, ft, tmp_path / "out", spec)
    assert all("are not determined" in record.warnings[-1] for record in manifest.tensors)
    (notice,) = group_warnings(manifest.tensors)
    assert notice.text.startswith("The fine-tuned weight has a lower rank") and notice.option.startswith("--exclude")

    def decompose(tall: torch.Tensor) -> equivalence.Decomposition:
        found = equivalence.decompose_fully(tall)
        assert found.U is not None
        rank, U = found.rank, found.U.clone()
        U[:, rank:] = U[:, rank:].flip(1)
        return dataclasses.replace(found, U=U)

    monkeypatch.setattr(equivalence, "RUNGS", (equivalence.RUNGS[0], ("svd-float64", decompose)))
    other = pome.edit(base, ft, tmp_path / "other", spec)
    assert other.tensors[0].edit_norm != manifest.tensors[0].edit_norm
    assert pome.verify(tmp_path / "out", base, ft, full=True).differences == ()
    # One wrong number is found all the same.
    damaged = read_tensors(tmp_path / "out")
    name = manifest.tensors[0].name
    damaged[name][0, 0] += 0.05
    from safetensors.torch import save_file

    save_file(damaged, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    verdict = pome.verify(tmp_path / "out", base, ft, full=True)
    assert any(found.tensor == name for found in verdict.differences)


@pytest.mark.parametrize(
    "field, value",
    [
        ("distance", 1.0),
        ("spectral_drift", 0.5),
        ("distance", None),
        ("k", 3),
        ("method", "equalize"),
        ("edit_norm", 9.0),
    ],
)
def test_other_numbers_in_a_record_are_found(tmp_path: Path, field: str, value: object) -> None:
    base, ft = llama_pair(tmp_path)
    made = pome.edit(base, ft, tmp_path / "out", SPEC)
    changed = dataclasses.replace(made.tensors[0], **{field: value})  # type: ignore[arg-type]
    forged = dataclasses.replace(made, tensors=(changed, *made.tensors[1:])).sealed()
    (tmp_path / "out" / MANIFEST).write_text(forged.to_json())
    assert not pome.verify(tmp_path / "out", base, ft, full=True).ok


def test_a_base_of_zeros_and_an_unchanged_weight(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    tensors = read_tensors(base)
    name = "model.layers.0.mlp.up_proj.weight"
    same = {**read_tensors(ft), name: tensors[name]}
    manifest = pome.edit(base, write_checkpoint(tmp_path / "same", same, config=LLAMA), tmp_path / "out", SPEC)
    assert [(kept.name, kept.reason) for kept in manifest.kept] == [(name, "its delta is zero: FT equals BASE")]
    zero = write_checkpoint(tmp_path / "zero", {**tensors, name: torch.zeros_like(tensors[name])}, config=LLAMA)
    with pytest.raises(pome.NumericalError, match=r"up_proj.*W_base is zero in every entry.*leave it out"):
        pome.edit(zero, ft, tmp_path / "none", dataclasses.replace(SPEC, allow_other_base=True))
    assert not (tmp_path / "none").exists()


def test_reports_of_an_equivalence_show_the_spectral_drift(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    made = pome.edit(base, ft, tmp_path / "out", SPEC)
    with (console := Console(width=120)).capture() as table:
        console.print(make_closing_table(made))
    assert "spectral drift" in table.get() and "energy" not in table.get()
    sheet = make_edit_sheet(made)
    rows = list(csv.DictReader(make_csv(sheet).splitlines()))
    assert all(float(row["spectral_drift"]) > 0 and row["k"] == row["alpha"] == "" for row in rows)
    assert write_plots(sheet, tmp_path / "plots")
    page = tmp_path / "page.html"
    page.write_text(make_page(sheet))
    dom = open_page(page)
    assert read_attribute(dom, "data-errors") is None and read_attribute(dom, "data-drawn") == "6"
    assert "and after the edit" in dom


def test_a_manifest_of_a_release_without_methods_is_read(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    pome.edit(base, ft, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / MANIFEST).read_bytes())
    del raw["spec"]["method"]
    for record in raw["tensors"]:
        for key in ("method", "distance", "spectral_drift"):
            del record[key]
    (tmp_path / "out" / MANIFEST).write_text(Manifest.from_json(json.dumps(raw), "older").sealed().to_json())
    assert pome.verify(tmp_path / "out", base, ft, full=True).ok


def test_the_plan_of_an_equivalence_expects_more_memory(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    needs = []
    for spec in (EditSpec(), EditSpec(method="equivalence")):
        with open_pair(base, ft, spec) as opened:
            needs.append(opened.plan.memory)
    assert needs[1] > needs[0]
