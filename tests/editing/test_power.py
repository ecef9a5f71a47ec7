"""--power from the command line to the bytes: outputs, overrides, adapters, verification and older manifests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import pome
from pome import EditSpec
from pome.manifest import Manifest
from support.adapters import LINEAR, make_pair
from support.checkpoints import llama_pair, read_tensors, run_python
from support.reference import reference_edit

MANIFEST = "pome_manifest.json"


def edits(out: Path, base: Path) -> dict[str, torch.Tensor]:
    W, W_base = read_tensors(out), read_tensors(base)
    return {name: W[name].double() - W_base[name].double() for name in W}


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_an_output_holds_the_edit_of_its_power(tmp_path: Path, power: float) -> None:
    base, ft = llama_pair(tmp_path, dtype=torch.float32)
    manifest = pome.edit(base, ft, tmp_path / "out", EditSpec(layers=("ffn",), power=power, rank_ratio=0.25))
    assert manifest.spec["power"] == power and manifest.tensors
    found, deltas = edits(tmp_path / "out", base), edits(ft, base)
    for record in manifest.tensors:
        wanted = reference_edit(deltas[record.name], rank_ratio=0.25, power=power)
        assert record.k == wanted.k and record.power_residual is not None and record.power_residual <= 1e-5
        # What float32 storage of the sum loses is some 1e-5 of an edit of this size.
        assert float((found[record.name] - wanted.value).norm() / wanted.value.norm()) <= 1e-4
    assert pome.verify(tmp_path / "out", base, ft, full=True).ok


def test_power_one_with_scale_unit_at_full_rank_gives_the_fine_tuned_model_back(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path, dtype=torch.bfloat16)
    pome.edit(base, ft, tmp_path / "out", EditSpec(layers=("ffn",), power=1.0, scale="unit", rank_ratio=1.0))
    W, W_ft = read_tensors(tmp_path / "out"), read_tensors(ft)
    assert all(torch.equal(W[name], W_ft[name]) for name in W)


def test_an_override_changes_the_power_of_what_it_matches(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    spec = EditSpec(layers=("ffn",), overrides=({"match": "down_proj", "power": 1.0, "scale": "unit"},))  # type: ignore[arg-type]
    manifest = pome.edit(base, ft, tmp_path / "out", spec)
    alphas = {record.name: record.alpha for record in manifest.tensors}
    assert all((alpha == pytest.approx(1.0)) == ("down_proj" in name) for name, alpha in alphas.items())
    assert pome.verify(tmp_path / "out", base, ft, full=True).ok


@pytest.mark.slow
def test_power_is_an_option_of_the_command_line_and_a_config_file(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    config = tmp_path / "edit.yaml"
    config.write_text("power: 0.5\nscale: unit\n")
    for options, power in (
        (["--power", "1"], 1.0),
        (["--config", config], 0.5),
        (["--config", config, "--power", "2"], 2.0),
    ):
        out = tmp_path / f"out-{power}"
        done = run_python("-m", "pome", "edit", str(base), str(ft), str(out), *options)
        assert done.returncode == 0, done.stderr
        assert json.loads((out / MANIFEST).read_bytes())["spec"]["power"] == power
    done = run_python("-m", "pome", "edit", str(base), str(ft), str(tmp_path / "no"), "--power", "-1")
    assert done.returncode == 2 and "power" in done.stderr and "from 0 to 8" in done.stderr


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_an_edited_adapter_has_the_singular_values_of_the_full_output(tmp_path: Path, power: float) -> None:
    pair = make_pair(tmp_path, "llama", torch.float32, target_modules=LINEAR)
    spec = EditSpec(layers=("up",), power=power)
    pome.edit(pair.base, pair.adapter, tmp_path / "full", spec)
    pome.edit(pair.base, pair.adapter, tmp_path / "out", dataclasses.replace(spec, out_format="adapter"))
    merged, out = pair.save_merged(tmp_path / "merged", tmp_path / "out"), read_tensors(tmp_path / "full")
    for name, tensor in out.items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()))
    assert pome.verify(tmp_path / "out", pair.base, pair.adapter, full=True).ok


def test_a_manifest_of_a_release_that_did_not_measure_the_residual_is_read(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    pome.edit(base, ft, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / MANIFEST).read_bytes())
    del raw["spec"]["power"]
    for record in raw["tensors"]:
        del record["power_residual"]
    older = Manifest.from_json(json.dumps(raw), "older")
    assert older.tensors[0].power_residual is None
    (tmp_path / "out" / MANIFEST).write_text(older.sealed().to_json())
    assert pome.verify(tmp_path / "out", base, ft, full=True).ok
