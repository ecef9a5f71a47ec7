"""--out-format adapter: PEFT loads what is written, and merges it to the full output."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import pome
from pome import EditSpec, NumericalError, PairingError
from pome.manifest import Manifest
from support.adapters import FUSED_EXPERTS, LINEAR, Pair, configure, make_pair, rewrite
from support.checkpoints import StopAfter, hash_tree, read_tensors
from support.hub_server import HubServer
from support.quick import sample

CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "plain": ("llama", ("up",), {"target_modules": LINEAR}),
    "rslora": ("llama", ("up", "down"), {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        "llama",
        ("up",),
        {"target_modules": LINEAR, "rank_pattern": {"up_proj": 3, "q_proj": 2}, "alpha_pattern": {"up_proj": 5}},
    ),
    "modules to save": ("llama", ("up", "head"), {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}),
    "conv1d": ("gpt2", ("up", "o"), {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "one half": ("phi3", ("up", "q"), {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    "both halves": ("phi3", ("ffn",), {"target_modules": ["gate_up_proj", "down_proj"]}),
    "mixtral": ("mixtral", ("up",), {"target_modules": ["q_proj"], "target_parameters": FUSED_EXPERTS}),
    "gpt-oss": ("gpt_oss", ("up", "down"), {"target_modules": ["o_proj"], "target_parameters": FUSED_EXPERTS}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", sample(CASES, "plain", "patterns", "one half", "mixtral"))
def test_peft_merges_an_edited_adapter_to_the_full_output(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, layers, lora = CASES[case]
    pair = make_pair(tmp_path, kind, dtype, **lora)
    full = pome.edit(pair.base, pair.adapter, tmp_path / "full", EditSpec(layers=layers, exclude=("lm_head",)))
    made = pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=layers, out_format="adapter"))
    directions = [{(r.name, r.part, r.rank, r.k) for r in manifest.tensors} for manifest in (made, full)]
    assert directions[0] == directions[1] and directions[0]
    merged, out = pair.save_merged(tmp_path / "merged", tmp_path / "out"), read_tensors(tmp_path / "full")
    base = read_tensors(pair.base)
    for name, tensor in out.items():
        change = (tensor.double() - base[name].double()).abs().max()
        # Two roundings of the sum to its dtype, and float32 products (the adapter's factors are float32).
        room = 2 * torch.finfo(tensor.dtype).eps * tensor.double().abs().max() + 1e-5 * change
        assert float((merged[name].double() - tensor.double()).abs().max()) <= float(room), name
    assert pome.verify(tmp_path / "out", pair.base, pair.adapter, full=True).ok


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_an_edited_lora_has_as_many_directions_as_are_kept_and_the_others_their_bytes(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR)
    (pair.adapter / "README.md").write_text("its card")
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(out_format="adapter", rank=2, dtype="bfloat16"))
    before, after = read_adapter(pair.adapter), read_adapter(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if "up_proj" in name:
            assert tensor.dtype == torch.bfloat16
            assert tensor.shape == ((2, 32) if "lora_A" in name else (40, 2))
        else:
            assert torch.equal(tensor, before[name])
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == 6 and sorted(config["rank_pattern"].values()) == [2, 2]
    assert (tmp_path / "out/README.md").is_file()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in pair.adapter.iterdir()} | {
        "pome_manifest.json"
    }


def test_an_orthogonal_initialisation_does_not_stop_peft_at_an_odd_rank(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR, init_lora_weights="orthogonal")
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(out_format="adapter", rank=3))
    pair.load_merged(tmp_path / "out")  # PEFT refuses an orthogonal one of odd rank


def test_an_untrained_adapter_keeps_its_bytes(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR)
    rewrite(pair, lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()})
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(out_format="adapter"))
    assert not manifest.tensors and len(manifest.kept) == 2
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (pair.adapter / weights).read_bytes()


def refuse(pair: Pair, error: type[Exception], match: str, **options: Any) -> None:
    before = hash_tree(pair.base.parent)
    with pytest.raises(error, match=match) as caught:
        pome.edit(pair.base, pair.adapter, pair.base.parent / "out", EditSpec(out_format="adapter", **options))
    assert "\n" not in str(caught.value)
    assert hash_tree(pair.base.parent) == before


def test_the_edit_of_a_dora_is_refused_as_an_adapter(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"], use_dora=True)
    refuse(pair, PairingError, "the edit of a DoRA is no DoRA; .*exclude")


def test_a_full_checkpoint_is_refused_as_an_adapter(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    full = Pair(pair.base, shutil.copytree(pair.base, tmp_path / "full"), pair.dtype)
    refuse(full, PairingError, "a full checkpoint, of which no adapter is made")


def test_nan_in_a_factor_is_refused_by_its_name(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    rewrite(pair, lambda t: {k: v * float("nan") if "1.mlp.up_proj.lora_B" in k else v for k, v in t.items()})
    refuse(pair, NumericalError, "1.mlp.up_proj.lora_B.weight: holds NaN")


def test_factors_of_another_rank_than_the_config_says_are_refused(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    configure(pair, r=7)
    refuse(pair, pome.CheckpointError, "its rank is 6, by adapter_config.json it is 7")


FACTOR = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
TAMPERINGS: dict[str, tuple[str, str, Callable[[Path], None]]] = {  # form of the output, file, what was done to it
    "a factor": ("adapter", "adapter_model.safetensors", lambda out: rewrite_tensor(out, FACTOR)),
    "its config": ("adapter", "adapter_config.json", lambda out: edit_json(out / "adapter_config.json", lora_alpha=99)),
    "a tokenizer": ("adapter", "tokenizer.json", lambda out: edit_json(out / "tokenizer.json", a=2)),
    "the merged tokenizer": ("full", "tokenizer.json", lambda out: edit_json(out / "tokenizer.json", a=2)),
    "the merged config": ("full", "config.json", lambda out: edit_json(out / "config.json", hidden_act="relu")),
    "a file more": ("full", "evil.py", lambda out: edit_json(out / "evil.py")),
}


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_bytes()) if file.exists() else {}), **values}))


def rewrite_tensor(out: Path, name: str) -> None:
    tensors = load_file(out / "adapter_model.safetensors")
    save_file(tensors | {name: tensors[name] * 1.1}, out / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("what", TAMPERINGS)
def test_verify_finds_a_changed_file_of_an_edited_adapter_under_a_resealed_manifest(what: str, tmp_path: Path) -> None:
    form, name, tamper = TAMPERINGS[what]
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR)
    edit_json(pair.adapter / "tokenizer.json", a=1)
    out = tmp_path / "out"
    pome.edit(pair.base, pair.adapter, out, EditSpec(out_format=form))
    assert pome.verify(out, pair.base, pair.adapter, full=True).ok
    tamper(out)
    raw = json.loads((out / "pome_manifest.json").read_bytes())
    for file in out.iterdir():
        if file.name != "pome_manifest.json":
            content = file.read_bytes()
            raw["files"][file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (out / "pome_manifest.json").write_text(Manifest.from_json(json.dumps(raw), "test").sealed().to_json())
    assert pome.verify(out).ok
    found = pome.verify(out, pair.base, pair.adapter, full=True).differences
    assert {item.file for item in found} == {name}


def test_the_card_of_an_edited_adapter_names_its_base_and_form(hub: HubServer, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR)
    (pair.adapter / "README.md").write_text("---\nlibrary_name: peft\nbase_model: org/other\n---\nits card\n")
    hub.add("org/base", pair.base)
    cards = {}
    for form in ("adapter", "full"):
        pome.edit("org/base", pair.adapter, tmp_path / f"{form}-out", EditSpec(out_format=form), card=True)
        cards[form] = ModelCard((tmp_path / f"{form}-out" / "README.md").read_text())
        assert cards[form].data.base_model == ["org/base"]
    assert cards["adapter"].data["base_model_relation"] == "adapter"
    assert cards["adapter"].data.library_name == "peft"
    assert "It is an adapter as before" in cards["adapter"].text
    assert cards["full"].data["base_model_relation"] == "finetune"
    assert cards["full"].data.library_name is None
    assert "The adapter is merged" in cards["full"].text


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_an_interrupted_run_on_an_adapter_goes_on_to_the_same_bytes(form: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR)
    spec = EditSpec(out_format=form)
    inputs = [hash_tree(folder) for folder in (pair.base, pair.adapter)]
    pome.edit(pair.base, pair.adapter, tmp_path / "whole", spec)
    for after in (1, 2):
        with pytest.raises(KeyboardInterrupt, match="run the same command again to go on"):
            pome.edit(pair.base, pair.adapter, tmp_path / "out", spec, StopAfter(after))
        assert not (tmp_path / "out").exists()
    pome.edit(pair.base, pair.adapter, tmp_path / "out", spec)
    made, wanted = hash_tree(tmp_path / "out"), hash_tree(tmp_path / "whole")
    del made["pome_manifest.json"], wanted["pome_manifest.json"]
    assert made == wanted
    assert [hash_tree(folder) for folder in (pair.base, pair.adapter)] == inputs
    assert not list(tmp_path.glob("*.pome-staging"))
