"""Adapters whose LoRAs find their place in BASE in unusual ways, held to what PEFT merges."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import pome
from pome import CheckpointError, EditSpec, PairingError
from support.adapters import (
    FUSED_EXPERTS,
    Pair,
    add_own_experts,
    assert_edit,
    assert_ulps,
    configure,
    make_pair,
    read_delta,
    rewrite,
)
from support.checkpoints import read_tensors

Tensors = dict[str, Tensor]


def rewrite_base(pair: Pair, change: Callable[[Tensors], Tensors]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in change(read_tensors(pair.base)).items()}
    save_file(tensors, pair.base / "model.safetensors", {"format": "pt"})


def rename(tensors: Tensors) -> Tensors:
    """The attention under another name, as other releases have it."""
    return {name.replace(".self_attn.", ".attention."): tensor for name, tensor in tensors.items()}


def split(tensors: Tensors) -> Tensors:
    """The fused rows of q, k and v in tensors of their own: 32, 16 and 16 rows."""
    apart = dict(tensors)
    for name in [name for name in tensors if "qkv_proj" in name]:
        parts = apart.pop(name).split([32, 16, 16])
        apart |= {name.replace("qkv", role): part for role, part in zip("qkv", parts, strict=True)}
    return apart


def assert_merged(pair: Pair, folder: Path, view: Callable[[Tensors], Tensors], role: str) -> None:
    """All but the edited tensors of `role` are what PEFT merges on the model, stored as `view` stores them."""
    merged, out = view(pair.save_merged(folder / "merged")), read_tensors(folder / "out")
    assert out.keys() == merged.keys()
    for name, tensor in out.items():
        if f".{role}_proj." not in name:
            assert_ulps(tensor, merged[name].contiguous(), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_as_large_as_the_matrix_is_merged_as_any_other(dtype: torch.dtype, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", dtype, target_modules=["k_proj", "v_proj"], r=16)  # of 16 rows
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("v",)))
    base, out = read_tensors(pair.base), read_tensors(tmp_path / "out")
    for module in (f"model.layers.{i}.self_attn.v_proj" for i in range(2)):
        assert_edit(out[f"{module}.weight"], base[f"{module}.weight"], read_delta(pair, module, 9 / 16))
    assert_merged(pair, tmp_path, lambda tensors: tensors, "v")


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_the_edit_that_changes_nothing_of_two_experts_is_what_peft_merges(form: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "two experts", target_modules=[], target_parameters=FUSED_EXPERTS)
    spec = EditSpec(layers=("up", "down"), rank_ratio=1.0, power=1.0, scale="unit", out_format=form)
    pome.edit(pair.base, pair.adapter, tmp_path / "out", spec)
    assert pome.verify(tmp_path / "out", pair.base, pair.adapter, full=True).ok
    merged = pair.save_merged(tmp_path / "merged")
    out = tmp_path / "out"
    made = read_tensors(out) if form == "full" else pair.save_merged(tmp_path / "again", out)
    assert made.keys() == merged.keys()
    for name, tensor in made.items():
        assert float((tensor - merged[name]).abs().max()) < 2e-6, name


@pytest.mark.parametrize(("side", "said"), [("A", r"\[6, 32, 1\] and \[40, 6\]"), ("B", r"\[6, 32\] and \[40, 6, 1\]")])
def test_a_factor_of_three_dimensions_is_that_of_a_convolution(side: str, said: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    name = f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight"
    rewrite(pair, lambda t: {**t, name: t[name].unsqueeze(-1)})
    with pytest.raises(CheckpointError, match=f"{said}, the LoRA of a convolution"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")


def test_a_wrong_rank_of_one_matrix_is_said_without_experts(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    configure(pair, r=8)
    with pytest.raises(CheckpointError, match=r"its rank is 6, by adapter_config\.json it is 8; take both files"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")


def test_a_wrong_rank_of_stacked_experts_is_said_for_each_of_them(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "qwen3_moe", target_modules=[], target_parameters=["mlp.experts.down_proj"])
    configure(pair, r=3)
    said = "its rank is 18, by adapter_config.json it is 3 for each of 3 experts; take both files"
    with pytest.raises(CheckpointError, match=said):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")


def test_a_bias_of_lora_goes_to_the_bias_that_base_has_under_another_name(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "qwen2", target_modules=["q_proj", "v_proj"], lora_bias=True, bias="lora_only")
    unchanged = read_tensors(pair.base)
    pome.edit(pair.base, pair.adapter, tmp_path / "plain", EditSpec(layers=("q",)))
    merged = pair.save_merged(tmp_path / "merged")
    biases = [name for name in merged if re.search(r"[qv]_proj\.bias", name)]
    assert len(biases) == 4 and not any(torch.equal(merged[name], unchanged[name]) for name in biases)
    rewrite_base(pair, rename)
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("q",)))
    out = read_tensors(tmp_path / "out")
    for name, tensor in rename(read_tensors(tmp_path / "plain")).items():
        assert torch.equal(out[name], tensor), name
    for name, tensor in rename({name: merged[name] for name in biases}).items():
        assert_ulps(out[name], tensor, name)


@pytest.mark.parametrize("bias", ["none", "lora_only"])  # the latter holds the module's own bias too
@pytest.mark.parametrize("names", [rename, dict], ids=["other names", "same names"])
def test_a_bias_of_lora_that_base_has_no_place_for_is_refused(
    names: Callable[[Tensors], Tensors], bias: str, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path, "qwen2", target_modules=["q_proj", "v_proj"], lora_bias=True, bias=bias)
    rewrite_base(pair, lambda t: names({name: one for name, one in t.items() if not name.endswith("v_proj.bias")}))
    with pytest.raises(PairingError, match=r"v_proj"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("q",)))
    assert not (tmp_path / "out").exists()


def test_a_lora_of_fused_rows_is_merged_into_the_matrices_that_base_has_apart(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "phi3", target_modules=["qkv_proj", "down_proj"])
    merged = pair.save_merged(tmp_path / "merged")
    rewrite_base(pair, split)
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("down",)))
    out = read_tensors(tmp_path / "out")
    for name, tensor in split(merged).items():
        if "down_proj" not in name:
            assert_ulps(out[name], tensor.contiguous(), name)


def test_a_dora_of_fused_rows_is_refused_where_base_has_them_apart(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "phi3", target_modules=["qkv_proj", "down_proj"], use_dora=True)
    rewrite_base(pair, split)
    with pytest.raises(PairingError, match="qkv_proj.*a DoRA of matrices that BASE stores apart"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("down",)))


@pytest.mark.parametrize("dora", [True, False])
def test_a_module_under_another_name_is_merged_as_peft_does(dora: bool, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["v_proj", "up_proj"], use_dora=dora)
    merged = pair.save_merged(tmp_path / "merged")
    # A stack of no known role, as of a convolution, is no place of a matrix.
    rewrite_base(pair, lambda t: {**rename(t), "a.conv.weight": torch.ones(4, 3, 2)})
    pome.edit(pair.base, pair.adapter, tmp_path / "out")
    out = read_tensors(tmp_path / "out")
    for name, tensor in rename(merged).items():
        if "up_proj" not in name:
            assert_ulps(out[name], tensor, name)


def test_a_linear_layer_is_not_transposed_whatever_the_config_says(tmp_path: Path) -> None:
    """PEFT sets fan_in_fan_out to false where the module is a Linear, and warns."""
    pair = make_pair(tmp_path, "llama", target_modules=["k_proj", "up_proj"])
    configure(pair, fan_in_fan_out=True)
    pome.edit(pair.base, pair.adapter, tmp_path / "out")
    assert_merged(pair, tmp_path, lambda tensors: tensors, "up")


@pytest.mark.parametrize("alpha", ["8", True, None, float("nan"), float("inf"), [8]])
@pytest.mark.parametrize("where", ["lora_alpha", "alpha_pattern"])
def test_an_alpha_that_is_no_finite_number_is_refused_with_its_file(alpha: object, where: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    configure(pair, **{where: alpha if where == "lora_alpha" else {"up_proj": alpha}})
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: lora_alpha .* is not a number"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("r", ["4", True, 0, -1, 2.0, [4]])
def test_a_rank_that_is_no_whole_number_is_refused_with_its_file(r: object, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    configure(pair, r=r)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: r .* is not a whole number"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")


def test_single_experts_under_another_name_are_those_of_their_own(tmp_path: Path) -> None:
    """As between releases: block_sparse_moe.experts.0.w1 is mlp.experts.0.gate_proj."""
    pair = make_pair(tmp_path, "mixtral", target_modules=["q_proj"])
    add_own_experts(pair)
    spec = EditSpec(layers=("up",))
    pome.edit(pair.base, pair.adapter, tmp_path / "plain", spec)
    leaves = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

    def renamed(tensors: Tensors) -> Tensors:
        return {re.sub(r"\.(w[123])\.", lambda leaf: f".{leaves[leaf[1]]}.", n): t for n, t in tensors.items()}

    rewrite_base(pair, renamed)
    pome.edit(pair.base, pair.adapter, tmp_path / "out", spec)
    plain, out = renamed(read_tensors(tmp_path / "plain")), read_tensors(tmp_path / "out")
    assert plain.keys() == out.keys() and all(torch.equal(out[name], tensor) for name, tensor in plain.items())


def test_a_stack_of_experts_of_which_base_lacks_one_is_refused(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "mixtral", target_modules=[], target_parameters=FUSED_EXPERTS)
    rewrite_base(pair, lambda t: {name: one for name, one in t.items() if ".experts.1." not in name})
    with pytest.raises(pome.PomeError, match="experts"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
