"""Checkpoints saved with a training wrapper still on: refused by name, and edited once it is off."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn.utils import parametrizations

import pome
from pome.poet import Merger, PoetConfig, parameter_groups, poet_layers, unwrap, wrap

CONFIG = transformers.LlamaConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
)
IDS = torch.arange(48).view(2, 24) * 7 % 61


def save_base(folder: Path) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG)
    model.save_pretrained(folder)
    return model


def save_as_it_is(model: torch.nn.Module, folder: Path) -> None:
    """What `save_file(model.state_dict())` of a training script leaves."""
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    CONFIG.save_pretrained(folder)


def wrap_in_poet(model: transformers.PreTrainedModel) -> torch.nn.Module:
    wrap(model, PoetConfig(block_size=8))
    return model


def wrap_in_lora(model: transformers.PreTrainedModel) -> torch.nn.Module:
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up_proj"], r=2), model)


def wrap_in_oft(model: transformers.PreTrainedModel) -> torch.nn.Module:
    return peft.inject_adapter_in_model(peft.OFTConfig(target_modules=["up_proj"], oft_block_size=4), model)


def parametrize(model: transformers.PreTrainedModel) -> torch.nn.Module:
    for layer in model.model.layers:
        parametrizations.weight_norm(layer.mlp.up_proj)
    return model


WRAPPERS = {
    "poet": (wrap_in_poet, "up", "POET's rotations .*call pome.poet.unwrap"),
    "lora": (wrap_in_lora, "up", "an adapter that is not merged .*merge_and_unload"),
    "oft": (wrap_in_oft, "up", "an adapter that is not merged .*merge_and_unload"),
    "torch": (parametrize, "re:up_proj", "a parametrization of torch .*remove_parametrizations"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("side", ["base", "ft"])
def test_a_weight_that_a_wrapper_changes_is_refused(tmp_path: Path, kind: str, side: str) -> None:
    wrapper, layers, said = WRAPPERS[kind]
    save_as_it_is(wrapper(save_base(tmp_path / "plain")), tmp_path / "wrapped")
    pair = [tmp_path / "plain", tmp_path / "wrapped"]
    if side == "base":
        pair.reverse()
    with pytest.raises(pome.PairingError, match=f"wrapped/model.safetensors: tensor .*up_proj.*{said}"):
        pome.edit(*pair, tmp_path / "out", pome.EditSpec(layers=(layers,)))
    assert not list(tmp_path.glob("out*"))


def test_other_weights_than_the_wrapped_ones_are_edited(tmp_path: Path) -> None:
    model = wrap_in_lora(save_base(tmp_path / "base"))
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.mul_(1.0 + 0.1 * torch.randn(24, 40))
    save_as_it_is(model, tmp_path / "ft")
    manifest = pome.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", pome.EditSpec(layers=("down",)))
    assert len(manifest.tensors) == 2


def test_a_model_trained_by_poet_and_unwrapped_is_edited_and_loads(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base").train()
    wrap(model, PoetConfig(block_size=8))
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, poet_lr=1e-2))
    merger = Merger(model, optimizer, every=2)
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        merger.step()
    assert poet_layers(model)
    unwrap(model)
    model.save_pretrained(tmp_path / "ft")
    manifest = pome.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    assert [record.role for record in manifest.tensors] == ["up", "up"]
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.isfinite(loaded(IDS).logits).all()
