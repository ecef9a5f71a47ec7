"""Extraction of updates as LoRAs, held to PEFT's merge, transformers' models, and torch.linalg.svd in float64."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import pome
from pome import ExtractSpec
from pome.config.spec import EditSpec, Override
from support.adapters import make_pair, quietly
from support.checkpoints import StopAfter, hash_tree, read_tensors
from support.extraction import ARCHITECTURES, Trained, find_distance, train
from support.quick import sample
from support.reference import reference_edit

FULL = 10**6  # a rank that no matrix has
KINDS = ["llama", "gpt2", "phi3", "gpt_neox", "mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "granitemoe"]


def extract(pair: Trained, out: Path, **options: Any) -> pome.Manifest:
    return pome.extract(pair.base, pair.ft, out, ExtractSpec(**{"rank": FULL, **options}))


def load_weights(pair: Trained, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder by the model's names; tied ones under all of theirs."""
    return dict(pair.load(folder).state_dict())


def read_config(out: Path) -> dict[str, Any]:
    return json.loads((out / "adapter_config.json").read_text())


@pytest.mark.parametrize("architecture", sample(ARCHITECTURES, "llama", "phi3", "gpt2", "mixtral"))
def test_at_full_rank_peft_merges_to_ft_but_for_what_is_named_as_lost(architecture: str, tmp_path: Path) -> None:
    pair = train(tmp_path, architecture)
    manifest = extract(pair, tmp_path / "out")
    base, ft, merged = (load_weights(pair, f) for f in (pair.base, pair.ft)), None, pair.merge(tmp_path / "out")
    base, ft = base
    stored = {id(weight.untyped_storage()): name for name, weight in ft.items()}
    once = {name for name in ft if stored[id(ft[name].untyped_storage())] == name}
    moved, left = (find_distance({n: ft[n] for n in once}, {n: side[n] for n in once}) for side in (base, merged))
    lost = math.sqrt(sum(record.norm**2 for record in manifest.lost))
    assert abs(left - lost) < 1e-5 * moved and lost < 0.99 * moved
    assert {r.role for r in manifest.lost} <= {"embed", "head", "router", "other"}
    assert pome.verify(tmp_path / "out", pair.base, pair.ft, full=True).ok


@pytest.mark.parametrize("architecture", sample(KINDS, "llama", "gpt_oss"))
def test_with_save_modules_the_logits_are_those_of_ft(architecture: str, tmp_path: Path) -> None:
    pair = train(tmp_path, architecture)
    manifest = extract(pair, tmp_path / "out", save_modules=True)
    tokens = torch.tensor([[1, 5, 9, 33, 2, 60]])
    with quietly(), torch.no_grad():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = peft.PeftModel.from_pretrained(pair.load(pair.base), tmp_path / "out").eval()
        logits = [one(tokens).logits for one in (model, pair.load(pair.ft), pair.load(pair.base))]
    assert not [str(w.message) for w in said if "missing" in str(w.message)]
    # gpt_oss: a parameter of a module that holds a LoRA, or of the attention itself, goes nowhere
    lost = architecture == "gpt_oss"
    assert bool(manifest.lost) == lost and manifest.saved
    room = 0.5 if lost else 1e-4
    assert float((logits[0] - logits[1]).norm()) < room * float((logits[2] - logits[1]).norm())


def test_transformers_loads_it_without_peft_by_hand(tmp_path: Path) -> None:
    pair = train(tmp_path, "llama", lambda name: "proj" in name)
    extract(pair, tmp_path / "out")
    with quietly(), torch.no_grad():
        model = pair.load(pair.base)
        model.load_adapter(str(tmp_path / "out"))
        tokens = torch.tensor([[1, 5, 9]])
        difference = model(tokens).logits - pair.load(pair.ft)(tokens).logits
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("architecture", sample(KINDS, "gpt2", "qwen2_moe"))
def test_each_module_gets_the_best_approximation_of_its_rank(architecture: str, tmp_path: Path) -> None:
    pair = train(tmp_path, architecture)
    manifest = extract(pair, tmp_path / "out", rank=3)
    base, ft = (load_weights(pair, folder) for folder in (pair.base, pair.ft))
    merged = pair.merge(tmp_path / "out")
    names = {record.name for record in manifest.tensors}
    assert names
    for name in names:
        D = ft[name].double() - base[name].double()
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        best = (U[..., :3] * S[..., None, :3]) @ Vh[..., :3, :]
        # The merged weight is rounded to float32, to 6e-8 of weights that are some tenths.
        assert float((merged[name].double() - base[name].double() - best).norm()) < 1e-4 * float(best.norm()), name


@pytest.mark.parametrize(
    "architecture",
    sample(["llama", "qwen3", "gemma2", "opt", "gptj", "phi", "bloom", "falcon", "t5", "bert"], "llama", "bloom"),
)
def test_the_edit_of_pome_as_an_adapter_merges_to_its_output(architecture: str, tmp_path: Path) -> None:
    pair = train(tmp_path, architecture, lambda name: re.search("norm|embed|head|bias", name) is None)
    layers, options = ("gate", "up", "down", "o"), {"rank": 5, "beta": 1.3}
    pome.edit(pair.base, pair.ft, tmp_path / "edited", EditSpec(layers=layers, **options))
    extract(pair, tmp_path / "out", layers=layers, power=0.0, scale="frobenius", **options)
    merged, edited, base = (
        pair.merge(tmp_path / "out"),
        *(load_weights(pair, folder) for folder in (tmp_path / "edited", pair.base)),
    )
    records = {
        record.name
        for record in pome.extract(
            pair.base, pair.ft, tmp_path / "again", ExtractSpec(layers=layers, power=0.0, scale="frobenius", **options)
        ).tensors
    }
    for name in records:
        change = float((edited[name] - base[name]).norm())
        assert float((merged[name] - edited[name]).norm()) < 1e-5 * change, name


def test_a_half_of_a_fused_matrix_is_edited_as_pome_edits_it(tmp_path: Path) -> None:
    pair = train(tmp_path, "phi3")
    pome.edit(pair.base, pair.ft, tmp_path / "edited", EditSpec(rank=5))
    manifest = extract(pair, tmp_path / "out", layers=("up",), power=0.0, scale="frobenius", rank=5)
    name = "model.layers.1.mlp.gate_up_proj.weight"
    merged, edited, base = (
        pair.merge(tmp_path / "out")[name],
        *(load_weights(pair, folder)[name] for folder in (tmp_path / "edited", pair.base)),
    )
    half = base.shape[0] // 2
    assert torch.equal(merged[:half], base[:half])
    change = float((edited[half:] - base[half:]).norm())
    assert float((merged[half:] - edited[half:]).norm()) < 1e-5 * change
    assert any(record.part == "what is not selected of it" for record in manifest.lost if record.name == name)


def test_overrides_that_part_the_matrices_of_one_lora_are_refused(tmp_path: Path) -> None:
    pair = train(tmp_path, "mixtral")  # whose w1 and w3 of an expert become one LoRA of gate_up_proj
    said = r"w1\.weight and .*w3\.weight become one LoRA of .*gate_up_proj"
    with pytest.raises(pome.SpecError, match=said) as refused:
        extract(pair, tmp_path / "out", rank=2, overrides=(Override(r"layers\.0\..*\.w3\.", rank=1),))
    assert "let an override match both" in str(refused.value) and not (tmp_path / "out").exists()
    both = Override(r"layers\.0\..*\.w[13]\.", rank=1)
    manifest = extract(pair, tmp_path / "out", rank=2, overrides=(both,))
    ranks = {record.k for record in manifest.tensors if "layers.0." in record.name and "gate_up_proj" in record.name}
    assert ranks == {1}


@pytest.mark.parametrize(("power", "scale"), [(0.0, "unit"), (0.5, "mean"), (2.0, "spectral"), (1.0, "rms")])
def test_every_power_and_scale_of_an_edit(power: float, scale: str, tmp_path: Path) -> None:
    pair = train(tmp_path, "llama")
    extract(pair, tmp_path / "out", rank=4, power=power, scale=scale)
    pome.edit(
        pair.base, pair.ft, tmp_path / "edited",
        EditSpec(layers=("ffn", "attention"), rank=4, power=power, scale=scale),  # type: ignore[arg-type]
    )  # fmt: skip
    merged, edited, base = (
        pair.merge(tmp_path / "out"),
        *(load_weights(pair, folder) for folder in (tmp_path / "edited", pair.base)),
    )
    for name in base:
        if "proj" in name:
            change = float((edited[name] - base[name]).norm())
            assert float((merged[name] - edited[name]).norm()) < 1e-4 * change, name


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_ranks_by_energy_have_patterns_that_peft_reads_and_scaling_one(
    architecture: str, uniform: bool, tmp_path: Path
) -> None:
    pair = train(tmp_path, architecture, num_hidden_layers=12)
    options: dict[str, Any] = {"rank_rule": "energy", "energy": 0.3, "rank": None, "uniform_rank": uniform}
    manifest = extract(pair, tmp_path / "out", **options)
    config = read_config(tmp_path / "out")
    assert bool(config["rank_pattern"]) != uniform and config["rank_pattern"] == config["alpha_pattern"]
    # A server that knows no patterns scales by this ratio and makes room for this rank.
    assert config["lora_alpha"] == config["r"] == max(record.k for record in manifest.tensors)
    model = pair.load_adapted(tmp_path / "out")
    scalings = [module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)]
    assert scalings and set(scalings) == {1.0}
    merged, base, ft = pair.merge(tmp_path / "out"), *(load_weights(pair, f) for f in (pair.base, pair.ft))
    for record in manifest.tensors:
        if record.part is None:
            D = ft[record.name].double() - base[record.name].double()
            wanted = reference_edit(D, k=record.k, power=1.0).value
            wanted = wanted * (wanted * D).sum() / wanted.square().sum()
            change = merged[record.name].double() - base[record.name].double()
            assert float((change - wanted).norm()) < 1e-4 * float(wanted.norm()), record.name


def test_patterns_of_layer_1_do_not_match_layer_11(tmp_path: Path) -> None:
    pair = train(tmp_path, "llama", num_hidden_layers=12)
    tensors = load_file(pair.ft / "model.safetensors")
    base = load_file(pair.base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    u, v = torch.randn(tensors[name].shape[0], 1), torch.randn(1, tensors[name].shape[1])
    tensors[name] = base[name] + 0.01 * u @ v  # of rank one, all others of full rank
    save_file(tensors, pair.ft / "model.safetensors", {"format": "pt"})
    extract(pair, tmp_path / "out", rank=4)
    ranks = {
        module: weights.r["default"]
        for module, weights in pair.load_adapted(tmp_path / "out").named_modules()
        if isinstance(weights, LoraLayer)
    }
    low = [module for module, rank in ranks.items() if rank == 1]
    with warnings.catch_warnings(record=True) as said, quietly():
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(pair.load(pair.base), tmp_path / "out")
    assert not [str(w.message) for w in said if "match" in str(w.message)]
    assert low == ["base_model.model." + name.removesuffix(".weight")] and set(ranks.values()) == {1, 4}


def test_modules_that_did_not_change_are_no_targets_and_nothing_is_missing(tmp_path: Path) -> None:
    pair = train(tmp_path, "llama", lambda name: "layers.1." in name and "v_proj" not in name)
    manifest = extract(pair, tmp_path / "out", rank=2)
    config = read_config(tmp_path / "out")
    assert config["target_modules"] and all(target.startswith("1.") for target in config["target_modules"])
    assert not any("v_proj" in target for target in config["target_modules"])
    assert any(kept.reason.startswith("its delta is zero") for kept in manifest.kept)
    with warnings.catch_warnings(record=True) as said, quietly():
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(pair.load(pair.base), tmp_path / "out")
    assert not [str(w.message) for w in said if "missing" in str(w.message)]


def test_a_tied_head_is_saved_as_the_embedding_is(tmp_path: Path) -> None:
    pair = train(tmp_path, "gpt2")
    manifest = extract(pair, tmp_path / "out", save_modules=True)
    assert {"lm_head", "transformer.wte"} <= set(read_config(tmp_path / "out")["modules_to_save"])
    assert "transformer.wte.weight" in manifest.saved


def test_a_table_that_several_modules_share_is_named_and_not_taken_apart(tmp_path: Path) -> None:
    pair = train(tmp_path, "t5")
    manifest = extract(pair, tmp_path / "out", save_modules=True)
    (lost,) = manifest.lost
    assert lost.name == "shared.weight" and "shares it with other modules" in lost.reason


def test_a_resized_vocabulary_is_named_with_its_norm_or_saved_for_a_resized_model(tmp_path: Path) -> None:
    pair = train(tmp_path, "llama", lambda name: "proj" in name)
    with quietly():
        model = pair.load(pair.ft)
        model.resize_token_embeddings(103)
        model.save_pretrained(pair.ft)
    manifest = extract(pair, tmp_path / "out")
    assert {record.name for record in manifest.lost} == {"model.embed_tokens.weight", "lm_head.weight"}
    rows = load_weights(pair, pair.ft)["lm_head.weight"][97:]
    (head,) = (record for record in manifest.lost if record.role == "head")
    assert head.norm == pytest.approx(float(rows.norm()), rel=1e-4) and "its shape is [103, 48]" in head.reason
    manifest = extract(pair, tmp_path / "saved", save_modules=True)
    assert any("resize_token_embeddings(103)" in notice for notice in manifest.notices)
    with quietly(), torch.no_grad():
        model = pair.load(pair.base)
        model.resize_token_embeddings(103)
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "saved").eval()
        tokens = torch.tensor([[1, 101, 9]])
        difference = adapted(tokens).logits - pair.load(pair.ft)(tokens).logits
    assert float(difference.abs().max()) < 1e-5


def test_tensors_that_base_lacks_are_named(tmp_path: Path) -> None:
    pair = train(tmp_path, "llama")
    tensors = load_file(pair.ft / "model.safetensors")
    tensors["model.value_head.weight"] = torch.ones(1, 48)
    save_file(tensors, pair.ft / "model.safetensors", {"format": "pt"})
    manifest = extract(pair, tmp_path / "out", rank=2)
    (lost,) = (record for record in manifest.lost if record.name == "model.value_head.weight")
    assert (lost.reason, lost.share) == ("BASE has no such tensor", 1.0)
    assert lost.norm == pytest.approx(math.sqrt(48))


@pytest.mark.parametrize(
    ("dtypes", "stored"),
    [
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float16),
    ],
)
def test_factors_have_the_dtype_of_ft_or_float32(
    dtypes: tuple[torch.dtype, torch.dtype], stored: torch.dtype, tmp_path: Path
) -> None:
    pair = train(tmp_path, "llama", dtypes=dtypes)
    manifest = extract(pair, tmp_path / "out", rank=8)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {stored}
    # the limit of an extraction: of roundings and, in float32, of the sums that the factors come from
    assert max(record.rounding for record in manifest.tensors) < 4 * torch.finfo(stored).eps
    name = "model.layers.0.mlp.up_proj"
    B, A = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "BA")
    base, ft = (read_tensors(folder)[f"{name}.weight"].double() for folder in (pair.base, pair.ft))
    U, S, Vh = torch.linalg.svd(ft - base, full_matrices=False)
    best = (U[:, :8] * S[:8]) @ Vh[:8]
    assert float((B @ A - best).norm()) < 3 * (torch.finfo(stored).eps + 1e-5) * float(best.norm())
    if stored == torch.bfloat16:  # added in float32 and rounded once, the merge is FT to a unit in the last place
        extract(pair, tmp_path / "whole")
        merged = pair.merge(tmp_path / "whole", torch.bfloat16)[f"{name}.weight"].double()
        assert float((merged - ft).abs().max()) <= float(2**-8 * ft.abs().max())


def test_a_prefix_that_old_checkpoints_leave_out_is_the_models(tmp_path: Path) -> None:
    pair = train(tmp_path, "gpt2", lambda name: ".h." in name)
    for folder in (pair.base, pair.ft):
        tensors = load_file(folder / "model.safetensors")
        short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        save_file(short, folder / "model.safetensors", {"format": "pt"})
    extract(pair, tmp_path / "out", save_modules=True)
    merged, ft, base = pair.merge(tmp_path / "out"), *(load_weights(pair, f) for f in (pair.ft, pair.base))
    assert find_distance(merged, ft) < 1e-5 * find_distance(base, ft)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_an_interrupted_extraction_goes_on_to_the_same_bytes(architecture: str, tmp_path: Path) -> None:
    pair = train(tmp_path, architecture)
    inputs = [hash_tree(folder) for folder in (pair.base, pair.ft)]
    spec = ExtractSpec(rank_rule="energy", energy=0.5, save_modules=True)
    pome.extract(pair.base, pair.ft, tmp_path / "whole", spec)
    for after in (3, 5):
        with pytest.raises(KeyboardInterrupt, match="run the same command again to go on"):
            pome.extract(pair.base, pair.ft, tmp_path / "out", spec, StopAfter(after))
        assert not (tmp_path / "out").exists()
    journal = (tmp_path / "out.pome-staging" / "journal").read_text().splitlines()
    assert len(journal) >= 5
    pome.extract(pair.base, pair.ft, tmp_path / "out", spec)
    made, wanted = hash_tree(tmp_path / "out"), hash_tree(tmp_path / "whole")
    del made["pome_manifest.json"], wanted["pome_manifest.json"]
    assert made == wanted and [hash_tree(folder) for folder in (pair.base, pair.ft)] == inputs
    assert not list(tmp_path.glob("*.pome-staging"))


def test_progress_without_its_scratch_file_counts_for_nothing(tmp_path: Path) -> None:
    pair = train(tmp_path, "llama")
    spec = ExtractSpec(rank=3)
    with pytest.raises(KeyboardInterrupt):
        pome.extract(pair.base, pair.ft, tmp_path / "out", spec, StopAfter(4))
    (tmp_path / "out.pome-staging" / "factors").unlink()
    pome.extract(pair.base, pair.ft, tmp_path / "out", spec)
    assert pome.verify(tmp_path / "out", pair.base, pair.ft, full=True).ok


def reseal(out: Path) -> None:
    """A manifest whose hashes fit the files as they are."""
    import hashlib

    from pome.manifest import FileRecord, read_manifest

    manifest = read_manifest(out / "pome_manifest.json")
    files = {
        name: FileRecord((out / name).stat().st_size, hashlib.sha256((out / name).read_bytes()).hexdigest())
        for name in manifest.files
    }
    (out / "pome_manifest.json").write_text(dataclasses.replace(manifest, files=files).sealed().to_json())


@pytest.mark.parametrize("what", ["byte", "factor", "saved", "config"])
def test_verify_finds_what_was_changed_also_under_a_resealed_manifest(what: str, tmp_path: Path) -> None:
    pair, out = train(tmp_path, "mixtral"), tmp_path / "out"
    extract(pair, out, rank=3, save_modules=True)
    assert pome.verify(out, pair.base, pair.ft).ok
    weights = out / "adapter_model.safetensors"
    if what == "byte":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
        assert not pome.verify(out).ok
        return
    if what == "config":
        (out / "adapter_config.json").write_text(json.dumps({**read_config(out), "lora_alpha": 4}))
    else:
        tensors = load_file(weights)
        name = next(n for n in tensors if ("lora_B" if what == "factor" else "norm") in n)
        tensors[name] = tensors[name] + 0.01
        save_file(tensors, weights, {"format": "pt"})
    reseal(out)
    verdict = pome.verify(out, pair.base, pair.ft, full=True)
    wanted = "adapter_config.json" if what == "config" else "adapter_model.safetensors"
    assert {item.file for item in verdict.differences} == {wanted}


def test_an_adapter_as_ft_or_base_is_refused(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    with pytest.raises(pome.PairingError, match="an adapter already"):
        pome.extract(pair.base, pair.adapter, tmp_path / "out", ExtractSpec(rank=2))


def test_nan_in_a_matrix_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    pair = train(tmp_path, "llama")
    tensors = load_file(pair.ft / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, pair.ft / "model.safetensors", {"format": "pt"})
    with pytest.raises(pome.NumericalError, match=r"up_proj.weight: FT holds NaN"):
        extract(pair, tmp_path / "out", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ft"]


def test_pome_reads_an_extracted_adapter(tmp_path: Path) -> None:
    pair = train(tmp_path, "mixtral")
    extract(pair, tmp_path / "out", rank=3)
    spec = EditSpec(layers=("ffn", "attention"), rank_ratio=1.0, power=1.0, scale="unit")
    pome.edit(pair.base, tmp_path / "out", tmp_path / "full", spec)
    merged, full = pair.merge(tmp_path / "out"), load_weights(pair, tmp_path / "full")
    assert find_distance(merged, full) < 1e-5 * find_distance(merged, load_weights(pair, pair.base))


def test_base_is_named_in_the_config(tmp_path: Path) -> None:
    pair = train(tmp_path, "llama")
    extract(pair, tmp_path / "out", rank=1)
    config = read_config(tmp_path / "out")
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(pair.base), "CAUSAL_LM")
    with quietly():
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.get_base_model(), transformers.LlamaForCausalLM)


@pytest.mark.parametrize("model_type", ["llava", "vit"])
def test_a_model_whose_modules_are_renamed_on_load_is_refused(model_type: str, tmp_path: Path) -> None:
    """transformers 5 loads `vit.encoder.layer.0` as `vit.layers.0`, and a LLaVA's language model under another name."""
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    file = pair.base / "config.json"
    config = json.loads(file.read_text())
    if model_type == "vit":
        config |= {"model_type": "vit", "image_size": 32, "patch_size": 8}
    else:
        config = {"model_type": "llava", "text_config": config, "vision_config": {"model_type": "clip_vision_model"}}
    file.write_text(json.dumps(config))
    ft = shutil.copytree(pair.base, tmp_path / "ft")
    with pytest.raises(pome.PairingError, match=f"base: a {model_type}, whose modules have other names"):
        pome.extract(pair.base, ft, tmp_path / "out", ExtractSpec(rank=2))
    assert not list(tmp_path.glob("out*"))
