"""What the plan of an adapter says of its inputs: another base, other trained weights, a quantized base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pome
from pome import EditSpec, PairingError
from pome.checkpoint.source import open_checkpoint
from pome.planning.plan import make_plan
from support.adapters import LINEAR, Pair, configure, make_pair
from support.checkpoints import hash_tree, read_tensors, run_python

BLOCK = 16


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    yield make_pair(tmp_path, "llama", target_modules=LINEAR)


def find_notes(pair: Pair, **options: str) -> tuple[str, ...]:
    return make_plan(open_checkpoint(pair.base), open_checkpoint(pair.adapter), EditSpec(**options)).notes


@pytest.mark.slow
@pytest.mark.parametrize("named", ["mistralai/Mistral-7B-v0.1", "/data/models/other", "other"])
def test_another_base_in_the_adapters_config_is_said_and_recorded(pair: Pair, named: str, tmp_path: Path) -> None:
    configure(pair, base_model_name_or_path=named)
    done = run_python("-m", "pome", "edit", str(pair.base), str(pair.adapter), str(tmp_path / "out"))
    assert done.returncode == 0 and f"the adapter was trained on {named} by its adapter_config.json" in done.stderr
    manifest = json.loads((tmp_path / "out/pome_manifest.json").read_text())
    assert any(named in note for note in manifest["notices"])
    assert pome.verify(tmp_path / "out", pair.base, pair.adapter, full=True).ok


@pytest.mark.parametrize("named", [None, "", "org/base", "/elsewhere/Base/", "BASE", 7])
def test_the_same_base_under_another_path_needs_no_note(pair: Pair, named: object) -> None:
    configure(pair, base_model_name_or_path=named)
    assert find_notes(pair) == ()


def test_a_snapshot_in_the_hubs_cache_is_the_model_of_its_name(pair: Pair, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--model/snapshots/0123abc"
    snapshot.parent.mkdir(parents=True)
    pair.base.rename(snapshot)
    pair.base = snapshot
    configure(pair, base_model_name_or_path="org/model")
    assert find_notes(pair) == ()
    configure(pair, base_model_name_or_path="org/other")
    assert len(find_notes(pair)) == 1


def test_the_name_that_bases_own_config_has_counts(pair: Pair) -> None:
    config = json.loads((pair.base / "config.json").read_text())
    (pair.base / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/model"}))
    configure(pair, base_model_name_or_path="org/model")
    assert find_notes(pair) == ()


@pytest.mark.parametrize("form", ["full", "adapter"])
@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "mm_projector.bin", "value_head.safetensors", "extra.pt"])
def test_trained_weights_beside_an_adapter_are_copied_and_said(
    pair: Pair, name: str, form: str, tmp_path: Path
) -> None:
    (pair.adapter / name).write_bytes(b"x")
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(out_format=form))
    (notice,) = manifest.notices
    assert f"{name}: was trained beside the adapter; it is copied as it is" in notice
    assert (tmp_path / "out" / name).read_bytes() == b"x"


def test_states_of_a_training_beside_an_adapter_are_left_out_and_named(pair: Pair, tmp_path: Path) -> None:
    states = {"optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth", "adapter_model.bin"}
    for name in states:
        (pair.adapter / name).write_bytes(b"x")
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out")
    assert manifest.notices == ()
    assert states <= manifest.not_copied.keys()


def quantize(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales of blocks, and the weight that they stand for."""
    m, n = W.shape
    i, j = torch.arange(m) // BLOCK, torch.arange(n) // BLOCK
    S = torch.zeros(-(-m // BLOCK), -(-n // BLOCK))
    S.index_put_((i[:, None].expand(m, n), j.expand(m, n)), torch.tensor(0.0), accumulate=True)
    for row in range(S.shape[0]):
        for column in range(S.shape[1]):
            tile = W[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
            S[row, column] = tile.float().abs().max() / 448
    spread = S[i[:, None], j]
    Q = (W.float() / spread).to(torch.float8_e4m3fn)
    return Q, S, (Q.float() * spread).bfloat16()


def write_fp8(source: Path, fp8: Path, plain: Path) -> None:
    """A base with fp8 linear layers and block scales, and the same in bfloat16."""
    stored: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for name, W in load_file(source / "model.safetensors").items():
        stored[name] = seen[name] = W
        if name.endswith("_proj.weight"):
            stored[name], stored[f"{name}_scale_inv"], seen[name] = quantize(W)
    config = json.loads((source / "config.json").read_text())
    declared = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}}
    for folder, tensors, said in ((fp8, stored, config | declared), (plain, seen, config)):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(said))


@pytest.mark.parametrize("layers", [("up",), ("ffn", "attention"), ("q",)])
@pytest.mark.parametrize("form", ["full", "adapter"])
def test_an_adapter_on_fp8_with_block_scales_is_that_on_its_bfloat16(
    layers: tuple[str, ...], form: str, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path, "llama", torch.bfloat16, target_modules=LINEAR)
    write_fp8(pair.base, tmp_path / "fp8", tmp_path / "plain")
    spec = EditSpec(layers=layers, out_format=form, dequantize=True)
    pome.edit(tmp_path / "fp8", pair.adapter, tmp_path / "out", spec)
    pome.edit(tmp_path / "plain", pair.adapter, tmp_path / "wanted", spec)
    out, wanted = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "wanted")
    assert out.keys() == wanted.keys()
    assert all(torch.equal(out[name], wanted[name]) for name in out)
    if form == "full":
        assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
        merged = Pair(tmp_path / "plain", pair.adapter, torch.bfloat16).save_merged(tmp_path / "merged")
        names = {record.name for record in pome.manifest.read_manifest(tmp_path / "out/pome_manifest.json").tensors}
        assert all(torch.equal(out[name], merged[name]) for name in out.keys() - names)
    assert pome.verify(tmp_path / "out", tmp_path / "fp8", pair.adapter, full=True).ok


def test_an_fp8_base_without_dequantize_names_the_option(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", torch.bfloat16, target_modules=LINEAR)
    write_fp8(pair.base, tmp_path / "fp8", tmp_path / "plain")
    before = hash_tree(tmp_path)
    with pytest.raises(PairingError, match=r"quantized \(fp8\), and an adapter cannot be merged into that; give deq"):
        pome.edit(tmp_path / "fp8", pair.adapter, tmp_path / "out")
    assert hash_tree(tmp_path) == before


@pytest.mark.slow
def test_the_closing_line_of_a_merged_adapter_speaks_of_base(pair: Pair, tmp_path: Path) -> None:
    """Also where every target of the adapter is edited, and none is merely merged."""
    for layers, said in ((("q", "v", "up", "down"), "edited, every"), (("up",), "merged, every")):
        options = [word for layer in layers for word in ("--layers", layer)]
        done = run_python("-m", "pome", "edit", str(pair.base), str(pair.adapter), str(tmp_path / layers[0]), *options)
        assert f"{said} other byte as in BASE" in done.stderr and "as in FT" not in done.stderr
