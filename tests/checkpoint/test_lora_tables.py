"""Heads and embeddings of an adapter: a classifier's, another vocabulary's, tied ones, trained tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import pome
from pome import EditSpec, PairingError
from support.adapters import CONFIGS, LORA, TOKENS, Pair, configure, make_pair, quietly, rewrite
from support.checkpoints import read_tensors

AS_ADAPTER = EditSpec(out_format="adapter")
TASKS: dict[str, tuple[Any, str, int, str]] = {
    "a classifier": (transformers.AutoModelForSequenceClassification, "SEQ_CLS", 3, "llama"),
    "a reward model": (transformers.AutoModelForSequenceClassification, "SEQ_CLS", 1, "llama"),
    "a tagger": (transformers.AutoModelForTokenClassification, "TOKEN_CLS", 5, "llama"),
    "a classifier on gpt2": (transformers.AutoModelForSequenceClassification, "SEQ_CLS", 3, "gpt2"),
}


def make_task_pair(folder: Path, task: str, dtype: torch.dtype = torch.float32) -> Pair:
    """A causal base, and an adapter with a head of its own that was trained on it."""
    kind, task_type, labels, model_type = TASKS[task]
    torch.manual_seed(0)
    pair = Pair(folder / "base", folder / "adapter", dtype)
    target = ["c_fc"] if model_type == "gpt2" else ["q_proj", "up_proj"]
    with quietly():
        transformers.AutoModelForCausalLM.from_config(CONFIGS[model_type]()).to(dtype).save_pretrained(pair.base)
        model = kind.from_pretrained(pair.base, num_labels=labels, dtype=dtype)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, "target_modules": target}, task_type=task_type))
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if weight.requires_grad:
                    weight.normal_(std=0.1) if ".lora_" in name else weight.add_(0.1)
        adapted.save_pretrained(pair.adapter)
    return pair


def load_task(task: str, folder: Path, dtype: torch.dtype, adapter: Path | None = None) -> Tensor:
    kind, _, labels, _ = TASKS[task]
    with quietly(), torch.no_grad():
        model = kind.from_pretrained(folder, num_labels=labels, dtype=dtype)
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter)
        model.config.pad_token_id = 0
        logits: Tensor = model.eval()(TOKENS).logits
    return logits


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_a_head_of_the_adapters_own_arrives_in_both_forms(task: str, shards: bool, tmp_path: Path) -> None:
    pair = make_task_pair(tmp_path, task)
    if shards:
        with quietly():
            model = transformers.AutoModelForCausalLM.from_pretrained(pair.base)
            (pair.base / "model.safetensors").unlink()
            model.save_pretrained(pair.base, max_shard_size="10KB")
    full = pome.edit(pair.base, pair.adapter, tmp_path / "full")
    pome.edit(pair.base, pair.adapter, tmp_path / "out", AS_ADAPTER)
    one = load_task(task, tmp_path / "full", pair.dtype)
    other = load_task(task, pair.base, pair.dtype, tmp_path / "out")
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, load_task(task, pair.base, pair.dtype), atol=1e-3)
    added = read_tensors(tmp_path / "full").keys() - read_tensors(pair.base).keys()
    assert added and added <= set(full.merged) and {name.split(".")[0] for name in added} == {"score"}
    assert all(any(name in note and "is added from the adapter" in note for note in full.notices) for name in added)
    for out in ("full", "out"):
        assert pome.verify(tmp_path / out, pair.base, pair.adapter, full=True).ok
    if shards:
        index = json.loads((tmp_path / "full/model.safetensors.index.json").read_text())
        sizes = [t.numel() * t.element_size() for t in read_tensors(tmp_path / "full").values()]
        assert index["weight_map"].keys() == read_tensors(tmp_path / "full").keys()
        assert index["metadata"]["total_size"] == sum(sizes)


def test_an_added_head_has_bases_dtype_and_verify_finds_another_one(tmp_path: Path) -> None:
    pair = make_task_pair(tmp_path, "a classifier", torch.bfloat16)
    out = tmp_path / "out"
    pome.edit(pair.base, pair.adapter, out)
    score = load_file(pair.adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(load_file(out / "model.safetensors")["score.weight"], score.bfloat16())
    tensors = load_file(out / "model.safetensors")
    save_file(tensors | {"score.weight": tensors["score.weight"] * 2}, out / "model.safetensors", {"format": "pt"})
    assert not pome.verify(out, pair.base, pair.adapter).ok


def test_a_whole_tensor_that_modules_to_save_does_not_name_is_no_head(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    rewrite(pair, lambda tensors: {**tensors, "base_model.model.score.weight": torch.ones(3, 32)})
    with pytest.raises(PairingError, match="1 of the adapter's 5 keys match no tensor of .*score.weight"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")


def test_a_known_tensor_under_another_prefix_is_not_added_beside_it(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    configure(pair, modules_to_save=["lm_head"])
    rewrite(pair, lambda tensors: {**tensors, "base_model.model.other.lm_head.weight": torch.ones(5, 32)})
    with pytest.raises(PairingError, match="which BASE lacks or has under another name; write an adapter"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")


def make_resized_pair(folder: Path, rows: int, **lora: Any) -> Pair:
    """An adapter that was trained after the vocabulary got another size."""
    torch.manual_seed(0)
    pair = Pair(folder / "base", folder / "adapter", torch.float32)
    with quietly():
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
        model.save_pretrained(pair.base)
        model.resize_token_embeddings(rows)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **lora}))
        with torch.no_grad():
            for weight in (weight for weight in adapted.parameters() if weight.requires_grad):
                weight.normal_(std=0.1)
        adapted.save_pretrained(pair.adapter)
    return pair


RESIZED: dict[str, dict[str, Any]] = {
    "whole tables": {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRAs of tables": {"target_modules": ["up_proj", "embed_tokens", "lm_head"]},
    "a whole head": {"target_modules": ["up_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", RESIZED)
@pytest.mark.parametrize("rows", [70, 50])
def test_a_resized_vocabulary_goes_through_an_adapter_and_is_refused_by_a_full_output(
    case: str, rows: int, tmp_path: Path
) -> None:
    pair = make_resized_pair(tmp_path, rows, **RESIZED[case])
    with pytest.raises(PairingError, match=r"another vocabulary.*write an adapter \(out_format adapter\)"):
        pome.edit(pair.base, pair.adapter, tmp_path / "full")
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out", AS_ADAPTER)
    assert {record.role for record in manifest.tensors} == {"up"}
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (pair.adapter, tmp_path / "out"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "up_proj" not in name)
    with quietly():
        model = transformers.AutoModelForCausalLM.from_pretrained(pair.base)
        model.resize_token_embeddings(rows)
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    assert any("up_proj.lora_A" in name and w.shape[0] == 3 for name, w in loaded.named_parameters())
    assert pome.verify(tmp_path / "out", pair.base, pair.adapter, full=True).ok


TOKEN_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {"trainable_token_indices": [3, 1, 40]}),
    "tied": ("tied llama", {"trainable_token_indices": [3, 1, 40]}),
    "by name": ("llama", {"trainable_token_indices": {"embed_tokens": [2, 9], "lm_head": [5]}}),
    "tied by name": ("tied llama", {"trainable_token_indices": {"embed_tokens": [63, 0]}}),
    "gpt2": ("gpt2", {"trainable_token_indices": [7], "target_modules": ["c_fc"]}),
}


@pytest.mark.parametrize("case", TOKEN_CASES)
def test_trained_tokens_are_rows_of_the_full_output_and_stay_in_an_adapter(case: str, tmp_path: Path) -> None:
    kind, options = TOKEN_CASES[case]
    pair = make_pair(tmp_path, kind, **{"target_modules": ["up_proj"], **options})
    rewrite(pair, lambda tensors: {k: v + 0.3 if "trainable_tokens" in k else v for k, v in tensors.items()})
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "full")
    pome.edit(pair.base, pair.adapter, tmp_path / "out", AS_ADAPTER)
    base, full = read_tensors(pair.base), read_tensors(tmp_path / "full")
    merged, again = pair.save_merged(tmp_path / "m1"), pair.save_merged(tmp_path / "m2", tmp_path / "out")
    edited = {record.name for record in manifest.tensors}
    tables = [name for name in base if not torch.equal(base[name], merged[name]) and name not in edited]
    assert tables
    for name in base.keys() - edited:
        assert torch.equal(full[name], merged[name]) and torch.equal(again[name], merged[name]), name
    for name in edited:
        assert float((again[name] - full[name]).abs().max()) < 2e-6
    for out in ("full", "out"):
        assert pome.verify(tmp_path / out, pair.base, pair.adapter, full=True).ok


def test_an_embedding_of_trained_tokens_may_be_edited(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"], trainable_token_indices=[1, 2, 3, 4])
    rewrite(pair, lambda t: {k: torch.randn_like(v) if "trainable_tokens" in k else v for k, v in t.items()})
    manifest = pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("embed",)))
    (record,) = manifest.tensors
    assert (record.rank, record.k) == (4, 2)
    assert pome.verify(tmp_path / "out", pair.base, pair.adapter, full=True).ok


TOKENS_REFUSED: dict[str, tuple[Any, str]] = {
    "no numbers": (None, "whose rows trainable_token_indices of adapter_config.json does not number"),
    "too few": ([1], "does not number"),
    "twice the same": ([1, 1, 2], "does not number"),
    "beyond the table": ([1, 2, 64], r"row 64 is trained, and BASE's .* has 64 rows; write an adapter"),
}


@pytest.mark.parametrize("case", TOKENS_REFUSED)
def test_tokens_that_fit_no_row_are_refused(case: str, tmp_path: Path) -> None:
    rows, match = TOKENS_REFUSED[case]
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"], trainable_token_indices=[1, 2, 3])
    configure(pair, trainable_token_indices=rows)
    with pytest.raises(pome.PomeError, match=match):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")


def load_adapted(pair: Pair, adapter: Path) -> Tensor:
    """The logits of the adapter beside the base, not merged."""
    with quietly(), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(pair.base)
        logits: Tensor = peft.PeftModel.from_pretrained(model, adapter).eval()(TOKENS).logits
    return logits


def load_full(folder: Path) -> Tensor:
    with quietly(), torch.no_grad():
        logits: Tensor = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS).logits
    return logits


ENSURED: dict[str, dict[str, Any]] = {
    "a whole embedding": {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]},
    "a whole head": {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
    "a LoRA of the embedding": {"target_modules": ["up_proj", "embed_tokens"]},
    "tokens": {"target_modules": ["up_proj"], "trainable_token_indices": [1, 5, 60]},
}


@pytest.mark.parametrize("case", ENSURED)
def test_tables_that_peft_ties_are_one_tensor_of_a_full_output(case: str, tmp_path: Path) -> None:
    """Held to the model with the adapter beside it: PEFT's merge adds a tied LoRA twice."""
    pair = make_pair(tmp_path, "tied llama", ensure_weight_tying=True, **ENSURED[case])
    tensors = load_file(pair.adapter / "adapter_model.safetensors")
    head, embedding = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
    if f"{head}.weight" in tensors:
        tensors[f"{head}.weight"] = tensors[f"{embedding}.weight"].clone()
    if f"{head}.lora_A.weight" in tensors:
        tensors[f"{head}.lora_A.weight"] = tensors[f"{embedding}.lora_embedding_B"].T.contiguous()
        tensors[f"{head}.lora_B.weight"] = tensors[f"{embedding}.lora_embedding_A"].T.contiguous()
    save_file(tensors, pair.adapter / "adapter_model.safetensors", {"format": "pt"})
    pome.edit(pair.base, pair.adapter, tmp_path / "full")
    pome.edit(pair.base, pair.adapter, tmp_path / "out", AS_ADAPTER)
    assert torch.allclose(load_full(tmp_path / "full"), load_adapted(pair, tmp_path / "out"), atol=2e-5)
    for out in ("full", "out"):
        assert pome.verify(tmp_path / out, pair.base, pair.adapter, full=True).ok


UNTIED: dict[str, dict[str, Any]] = {
    "a whole head": {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
    "a LoRA of the head": {"target_modules": ["up_proj", "lm_head"]},
    "both LoRAs": {"target_modules": ["up_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("case", [*UNTIED, "a LoRA of the head alone"])
def test_a_head_apart_from_a_tied_embedding_needs_an_adapter(case: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "tied llama", **UNTIED[case.removesuffix(" alone")])
    if case.endswith("alone"):  # PEFT saves the tables beside it unless save_embedding_layers is False
        rewrite(pair, lambda tensors: {name: tensor for name, tensor in tensors.items() if ".lora_" in name})
    with pytest.raises(PairingError, match=r"the head and leaves the embedding, .* write an adapter"):
        pome.edit(pair.base, pair.adapter, tmp_path / "full")
    pome.edit(pair.base, pair.adapter, tmp_path / "out", AS_ADAPTER)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (pair.adapter, tmp_path / "out"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "up_proj" not in name)
    load_adapted(pair, tmp_path / "out")
    assert pome.verify(tmp_path / "out", pair.base, pair.adapter, full=True).ok
