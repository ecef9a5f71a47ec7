"""A PEFT adapter as FT: what is merged held to PEFT to the bit, what is edited to a float64 SVD of its delta."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pome
from pome import CheckpointError, EditSpec, NumericalError, PairingError, PomeError, SelectionError
from support.adapters import (
    FUSED_EXPERTS,
    LINEAR,
    Pair,
    assert_edit,
    assert_ulps,
    configure,
    load_logits,
    make_pair,
    read_delta,
    rewrite,
)
from support.checkpoints import hash_tree, read_tensors
from support.hub_server import HubServer
from support.quick import sample
from support.reference import reference_edit

CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "plain": ("llama", ("up",), {"target_modules": LINEAR}),
    "rslora": ("llama", ("up",), {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        "llama",
        ("up",),
        {
            "target_modules": LINEAR,
            "rank_pattern": {"layers.1.mlp.up_proj": 3, "q_proj": 2},
            "alpha_pattern": {r".*\.0\.mlp\.up_proj": 5, "v_proj": 1},
        },
    ),
    "modules to save": ("llama", ("up",), {"target_modules": LINEAR, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "dora": ("llama", ("ffn",), {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "biases": ("gpt2", ("up",), {"target_modules": ["c_fc", "attn.c_proj"], "bias": "all", "lora_bias": True}),
    "conv1d": ("gpt2", ("up", "o"), {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", ("up",), {"target_modules": ["c_fc", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "embedding": ("gpt2", ("up",), {"target_modules": ["wte", "wpe", "c_fc"], "fan_in_fan_out": True}),
    "tied embedding": ("tied llama", ("up",), {"target_modules": ["up_proj", "embed_tokens"]}),
    "positions to save": ("gpt2", ("up",), {"target_modules": ["c_fc"], "modules_to_save": ["wpe"]}),
    "fused": ("phi3", ("up", "q"), {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    "mixtral": ("mixtral", ("up",), {"target_modules": ["q_proj"], "target_parameters": FUSED_EXPERTS}),
    "qwen3 moe": ("qwen3_moe", ("up", "gate"), {"target_modules": [], "target_parameters": FUSED_EXPERTS}),
    "gpt-oss": ("gpt_oss", ("up",), {"target_modules": ["o_proj"], "target_parameters": FUSED_EXPERTS}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", sample(CASES, "plain", "patterns", "conv1d dora", "fused", "mixtral"))
def test_unselected_tensors_are_merged_as_peft_merges_them_and_transformers_loads_the_output(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    kind, layers, lora = CASES[case]
    pair = make_pair(tmp_path, kind, dtype, **lora)
    inputs = hash_tree(tmp_path)
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=layers))
    assert {k: v for k, v in hash_tree(tmp_path).items() if not k.startswith("out")} == inputs
    merged, base, out = pair.save_merged(tmp_path / "merged"), read_tensors(pair.base), read_tensors(tmp_path / "out")
    assert out.keys() == base.keys() == merged.keys()
    edited: dict[str, list[Any]] = {}
    for record in manifest.tensors:
        edited.setdefault(record.name, []).append(record)
    touched = {name for name in base if not torch.equal(merged[name], base[name])}
    assert touched == {*manifest.merged, *edited}
    for name, tensor in out.items():
        if name not in edited:
            assert_ulps(tensor, merged[name], name)
        else:
            for record in edited[name]:
                # The edit keeps the update's length: alpha by its default rule, with k = K * rank.
                assert record.k == max(1, round(0.5 * record.rank))
                assert math.isclose(record.edit_norm, record.delta_norm, rel_tol=1e-5)
            if name in manifest.merged:
                same = out[name] == merged[name]
                assert 0 < int(same.sum()) < same.numel()
    assert pome.verify(tmp_path / "out", pair.base, pair.adapter, full=True).ok
    if dtype == torch.float32:
        # transformers, given the edited tensors in the merged model, computes the same.
        save_file({**merged, **{name: out[name] for name in edited}}, tmp_path / "merged/model.safetensors")
        assert torch.equal(load_logits(tmp_path / "out"), load_logits(tmp_path / "merged"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_edited_matrix_is_the_edit_of_the_adapters_own_delta(dtype: torch.dtype, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", dtype, target_modules=["up_proj", "down_proj"])
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("up", "down"), beta=1.5))
    base, out = read_tensors(pair.base), read_tensors(tmp_path / "out")
    assert len(manifest.tensors) == 4
    for record in manifest.tensors:
        delta = read_delta(pair, record.name.removesuffix(".weight"))
        assert_edit(out[record.name], base[record.name], delta, beta=1.5)
        assert (record.rank, record.k, record.noise_floor, record.solver) == (6, 3, 0.0, "factors")
        assert math.isclose(record.sigma_max, float(torch.linalg.matrix_norm(delta, 2)), rel_tol=1e-6)


def test_the_edit_scales_a_delta_by_rslora_and_by_the_patterns(tmp_path: Path) -> None:
    pattern = {"layers.1.mlp.up_proj": 3}
    pair = make_pair(
        tmp_path, "llama", target_modules=["up_proj"], use_rslora=True, rank_pattern=pattern, alpha_pattern=pattern
    )
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(rank=2))
    base, out = read_tensors(pair.base), read_tensors(tmp_path / "out")
    for i, scaling in enumerate((9 / math.sqrt(6), 3 / math.sqrt(3))):
        name = f"model.layers.{i}.mlp.up_proj"
        assert_edit(out[f"{name}.weight"], base[f"{name}.weight"], read_delta(pair, name, scaling), k=2)


def test_the_edit_of_a_conv1d_is_transposed_as_its_weight_is_stored(tmp_path: Path) -> None:
    # attn.c_proj is square: only the architecture tells which way round it is stored.
    pair = make_pair(tmp_path, "gpt2", target_modules=["c_fc", "attn.c_proj"], fan_in_fan_out=True)
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("up", "o")))
    base, out = read_tensors(pair.base), read_tensors(tmp_path / "out")
    for name in ("transformer.h.1.mlp.c_fc", "transformer.h.0.attn.c_proj"):
        assert_edit(out[f"{name}.weight"], base[f"{name}.weight"], read_delta(pair, name).T)


def test_half_of_a_fused_tensor_is_the_edit_of_its_rows_of_b(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "phi3", target_modules=["gate_up_proj"])
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out")
    name = "model.layers.0.mlp.gate_up_proj"
    base, out = (read_tensors(folder)[f"{name}.weight"] for folder in (pair.base, tmp_path / "out"))
    delta = read_delta(pair, name)
    assert_edit(out[40:], base[40:], delta[40:])
    assert manifest.tensors[0].part == "half=up" and manifest.tensors[0].rank == 6
    assert_ulps(out[:40], pair.save_merged(tmp_path / "merged")[f"{name}.weight"][:40], name)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_each_expert_is_the_edit_of_its_own_factors(kind: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, kind, target_modules=[], target_parameters=FUSED_EXPERTS)
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("up", "down")))
    assert len(manifest.tensors) == 2 * 3 * 2
    tensors = load_file(pair.adapter / "adapter_model.safetensors")
    base, out = read_tensors(pair.base), read_tensors(tmp_path / "out")
    for inner, role in (("base_layer.", "up"), ("", "down")):
        A, B = (tensors[f"base_model.model.model.layers.0.mlp.experts.{inner}lora_{one}.weight"] for one in "AB")
        # The experts follow each other in A and take turns in B.
        deltas = 1.5 * torch.einsum("ore,eri->eoi", B.double().reshape(-1, 6, 3), A.double().reshape(3, 6, -1))
        for expert, delta in enumerate(deltas):
            if kind == "mixtral":
                name = f"model.layers.0.block_sparse_moe.experts.{expert}.{'w3' if role == 'up' else 'w2'}.weight"
                delta = delta[40:] if role == "up" else delta
                assert_edit(out[name], base[name], delta)
            else:
                name = f"model.layers.0.mlp.experts.{'gate_up' if role == 'up' else 'down'}_proj"
                odd = slice(1, None, 2) if role == "up" else slice(None)
                assert_edit(out[name][expert][:, odd], base[name][expert][:, odd], delta.T[:, odd])


def test_stacked_experts_pair_under_another_prefix_by_their_count(tmp_path: Path) -> None:
    """The shape (E, out, in) of a parameter follows from its factors: lora_A has E * rank rows."""
    pair = make_pair(tmp_path, "gpt_oss", target_modules=[], target_parameters=["mlp.experts.down_proj"])
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("down",)))
    strip_prefix(pair)
    pome.edit(pair.base, pair.adapter, tmp_path / "stripped", EditSpec(layers=("down",)))
    out, stripped = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "stripped")
    assert all(torch.equal(out[name], stripped[name.removeprefix("model.")]) for name in out)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_adapters_of_single_experts_are_merged_into_the_stack_as_peft_does(kind: str, tmp_path: Path) -> None:
    """As older transformers named the modules; PEFT stacks them when it loads them."""
    pair = make_pair(tmp_path, kind, torch.bfloat16, target_modules=["q_proj"])
    experts = [name for name in read_tensors(pair.base) if re.search(r"experts\.\d", name)]
    shapes = {name: tensor.shape for name, tensor in read_tensors(pair.base).items()}
    added: dict[str, torch.Tensor] = {}
    for name in experts:
        lora = f"base_model.model.{name.removesuffix('.weight')}.lora"
        added[f"{lora}_A.weight"] = torch.randn(6, shapes[name][1]) * 0.1
        added[f"{lora}_B.weight"] = torch.randn(shapes[name][0], 6) * 0.1
    rewrite(pair, lambda t: {**t, **added})
    configure(pair, target_modules=["q_proj", *{name.split(".")[-2] for name in experts}])
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out")
    merged, out = pair.save_merged(tmp_path / "merged"), read_tensors(tmp_path / "out")
    edited = {record.name for record in manifest.tensors}
    assert len(edited) == 6 and len(manifest.merged) == 14
    for name in out.keys() - edited:
        assert_ulps(out[name], merged[name], name)


def test_dora_and_replaced_modules_are_edited_by_their_whole_delta(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"], use_dora=True, modules_to_save=["lm_head"])
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("up", "head"), rank=4))
    merged, base, out = pair.save_merged(tmp_path / "merged"), read_tensors(pair.base), read_tensors(tmp_path / "out")
    assert len(manifest.tensors) == 3
    for record in manifest.tensors:
        delta = merged[record.name].double() - base[record.name].double()
        # The delta of two float32 tensors of norm 1 is known to 1e-7 of that; its edit, to that over a gap of 1e-2.
        wanted = base[record.name].double() + reference_edit(delta, k=4).value
        assert float((out[record.name].double() - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_dtype_changes_the_edited_tensors_alone(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "phi3", torch.bfloat16, target_modules=["gate_up_proj", "down_proj"])
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(dtype="float32"))
    merged, out = pair.save_merged(tmp_path / "merged"), read_tensors(tmp_path / "out")
    for name, tensor in out.items():
        assert tensor.dtype == (torch.float32 if "gate_up" in name else torch.bfloat16)
        if "gate_up" in name:
            assert torch.equal(tensor[:40], merged[name][:40].float())
    assert pome.verify(tmp_path / "out", pair.base, pair.adapter, full=True).ok


def strip_prefix(pair: Pair) -> None:
    tensors = load_file(pair.base / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, pair.base / "model.safetensors", {"format": "pt"})


def test_a_base_without_prefix_and_keys_with_an_adapter_name_give_the_same_bytes(tmp_path: Path) -> None:
    """A base saved without `model.`, an adapter with its name in the keys: the same bytes come out."""
    pairs = [make_pair(tmp_path / str(i), "llama", target_modules=LINEAR) for i in range(3)]
    strip_prefix(pairs[1])
    rewrite(pairs[2], lambda t: {re.sub(r"(lora_[AB])", r"\1.default", key): v for key, v in t.items()})
    outs = []
    for pair in pairs:
        pome.edit(pair.base, pair.adapter, pair.base.parent / "out")
        outs.append({n.removeprefix("model."): t for n, t in read_tensors(pair.base.parent / "out").items()})
    for out in outs[1:]:
        assert out.keys() == outs[0].keys()
        assert all(torch.equal(out[name], outs[0][name]) for name in out)


def test_an_untrained_adapter_leaves_every_byte_of_base(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR)
    rewrite(pair, lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()})
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out")
    assert not manifest.tensors
    assert {item.reason for item in manifest.kept} == {"its delta is zero: the adapter leaves it as it is in BASE"}
    assert (tmp_path / "out/model.safetensors").read_bytes() == (pair.base / "model.safetensors").read_bytes()


def test_side_files_are_bases_but_for_the_adapters_tokenizer(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR)
    (pair.base / "tokenizer.json").write_text("BASE's")
    (pair.base / "generation_config.json").write_text("{}")
    (pair.adapter / "tokenizer.json").write_text("the adapter's")
    (pair.adapter / "README.md").write_text("the adapter's card")
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out")
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {p.name for p in pair.base.iterdir()} | {"pome_manifest.json"}
    assert (tmp_path / "out/tokenizer.json").read_text() == "the adapter's"
    assert (tmp_path / "out/config.json").read_bytes() == (pair.base / "config.json").read_bytes()
    assert {"README.md", "adapter_config.json"} <= manifest.not_copied.keys()
    assert {"adapter_model.safetensors", "tokenizer.json"} <= manifest.fine_tuned.files.keys()
    assert {"model.safetensors", "config.json"} <= manifest.base.files.keys()


def test_base_and_adapter_may_come_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR)
    (pair.adapter / "README.md").write_text("the adapter's card")
    commits = [hub.add("org/base", pair.base), hub.add("org/adapter", pair.adapter)]
    pome.edit(pair.base, pair.adapter, tmp_path / "local")
    manifest = pome.edit("org/base", "org/adapter", tmp_path / "out")
    assert [manifest.base.revision, manifest.fine_tuned.revision] == commits
    made = {name: text for name, text in hash_tree(tmp_path / "out").items() if name != "pome_manifest.json"}
    assert made.items() <= hash_tree(tmp_path / "local").items() and "config.json" in made


def test_verify_finds_a_merged_weight_that_was_changed(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["q_proj", "up_proj"])
    out = tmp_path / "out"
    manifest = pome.edit(pair.base, pair.adapter, out)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert name in manifest.merged
    tensors = load_file(out / "model.safetensors")
    tensors[name][3, 3] += 0.01
    with open(out / "model.safetensors", "r+b") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        start = json.loads(file.read(size))[name]["data_offsets"][0]
        file.seek(8 + size + start)
        file.write(tensors[name].numpy().tobytes())
    record = json.loads((out / "pome_manifest.json").read_text())
    sha256 = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    record["files"]["model.safetensors"]["sha256"] = sha256
    forged = pome.manifest.Manifest.from_json(json.dumps(record), "forged").sealed()
    (out / "pome_manifest.json").write_text(forged.to_json())
    verdict = pome.verify(out, pair.base, pair.adapter, full=True)
    assert [item.tensor for item in verdict.differences] == [name]


def add_stray_keys(pair: Pair) -> None:
    module = "base_model.model.model.layers.9.mlp.up_proj.lora"
    rewrite(pair, lambda t: {**t, f"{module}_A.weight": torch.zeros(6, 32), f"{module}_B.weight": torch.zeros(40, 6)})


def widen(pair: Pair) -> None:
    wide = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    rewrite(pair, lambda t: {**t, wide: torch.cat([t[wide], t[wide]])})


def poison(pair: Pair) -> None:
    ill = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    rewrite(pair, lambda t: {**t, ill: t[ill] * math.nan})


def pickle(pair: Pair) -> None:
    (pair.adapter / "adapter_model.safetensors").rename(pair.adapter / "adapter_model.bin")


def drop_b(pair: Pair) -> None:
    rewrite(pair, lambda t: {k: v for k, v in t.items() if not k.endswith("0.mlp.up_proj.lora_B.weight")})


def quantize(pair: Pair) -> None:
    config = json.loads((pair.base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (pair.base / "config.json").write_text(json.dumps(config))


REFUSED: dict[str, tuple[Callable[[Pair], None], type[PomeError], str]] = {
    "unused keys": (add_stray_keys, PairingError, "2 of the adapter's 18 keys match no tensor.*layers.9"),
    "wrong shape": (widen, PairingError, r"up_proj.*\[80, 6\] do not fit"),
    "NaN": (poison, NumericalError, "NaN or infinity in .*1.self_attn.q_proj.lora_B"),
    "other rank": (lambda pair: configure(pair, r=8), CheckpointError, "its rank is 6, by adapter_config.json it is 8"),
    "pickled": (pickle, CheckpointError, "pickled weights are never unpickled; convert"),
    "half a pair": (drop_b, CheckpointError, "not a pair of lora_A and lora_B"),
    "quantized base": (quantize, PairingError, r"quantized \(bitsandbytes\)"),
    "LoHa": (lambda pair: configure(pair, peft_type="LOHA"), CheckpointError, "peft_type LOHA"),
    "PiSSA": (lambda pair: configure(pair, init_lora_weights="pissa"), CheckpointError, "init_lora_weights pissa"),
    "QALoRA": (lambda pair: configure(pair, use_qalora=True), CheckpointError, "use_qalora is set"),
    "aLoRA": (lambda pair: configure(pair, alora_invocation_tokens=[1]), CheckpointError, "alora_invocation_tokens"),
    "a later kind": (lambda pair: configure(pair, use_warp=True), CheckpointError, "use_warp is set"),
    "a later option": (lambda pair: configure(pair, lora_foo={"a": 1}), CheckpointError, "lora_foo is set"),
    "a later start": (
        lambda pair: configure(pair, init_lora_weights="milora"),
        CheckpointError,
        "init_lora_weights milora, a LoRA of",
    ),
    "no truth": (lambda pair: configure(pair, use_rslora="false"), CheckpointError, "use_rslora is 'false', neither"),
    "bad pattern": (lambda pair: configure(pair, rank_pattern={"(": 3}), CheckpointError, "not a regular expression"),
    "no DoRA": (lambda pair: configure(pair, use_dora=True), CheckpointError, "lora_magnitude_vector is absent"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_be_merged_is_refused_in_one_line_and_nothing_is_written(
    case: str, tmp_path: Path
) -> None:
    change, error, pattern = REFUSED[case]
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR)
    change(pair)
    before = hash_tree(tmp_path)
    with pytest.raises(error, match=pattern) as caught:
        pome.edit(pair.base, pair.adapter, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert hash_tree(tmp_path) == before


@pytest.mark.parametrize(("kind", "saved", "up"), [("tied llama", "embed_tokens", "up_proj"), ("gpt2", "wte", "c_fc")])
def test_a_full_output_refuses_an_embedding_that_would_untie_the_head(
    kind: str, saved: str, up: str, tmp_path: Path
) -> None:
    """PEFT leaves the head as BASE has it; in one tensor for both it would follow."""
    pair = make_pair(tmp_path, kind, target_modules=[up], modules_to_save=[saved])
    with pytest.raises(PairingError, match=f"{saved}.weight: the adapter replaces the emb.*out_format adapter"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(out_format="adapter"))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (pair.adapter, tmp_path / "out"))
    (name,) = (name for name in before if saved in name)
    assert torch.equal(before[name], after[name])


def test_an_adapter_inside_bases_folder_does_not_go_along(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR)
    (pair.base / "extra").mkdir()
    (pair.base / "extra/notes.txt").write_text("BASE's")
    pome.edit(pair.base, pair.adapter, tmp_path / "out")
    files = {name: text for name, text in hash_tree(tmp_path / "out").items() if name != "pome_manifest.json"}
    inside = pair.adapter.rename(pair.base / "extra/adapter")
    manifest = pome.edit(pair.base, inside, tmp_path / "inside")
    assert manifest.not_copied["extra/adapter/"] == "the folder of an input"
    # And beside BASE's own files, where transformers would find and apply it.
    for file in inside.iterdir():
        file.rename(pair.base / file.name)
    inside.rmdir()
    pome.edit(pair.base, pair.base / "adapter_model.safetensors", tmp_path / "beside")
    for out in ("inside", "beside"):
        made = {name: text for name, text in hash_tree(tmp_path / out).items() if name != "pome_manifest.json"}
        assert made == files | ({"README.md": made["README.md"]} if out == "beside" else {})


def test_an_adapter_that_changes_none_of_the_selected_says_what_it_changes(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["q_proj", "v_proj"])
    with pytest.raises(SelectionError, match="it changes 2 x q, 2 x v"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")
    with pytest.raises(PairingError, match="an adapter; give as BASE the model"):
        pome.edit(pair.adapter, pair.base, tmp_path / "out")
