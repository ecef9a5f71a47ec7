"""Adapters whose modules BASE stores otherwise: packed or single experts, other names, another release's layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file
from torch import Tensor

import pome
from pome import CheckpointError, EditSpec, PairingError
from support.adapters import (
    CONFIGS,
    FUSED_EXPERTS,
    Pair,
    add_own_experts,
    configure,
    make_pair,
    quietly,
    read_delta,
    rewrite,
)
from support.checkpoints import read_tensors
from support.quick import sample
from support.reference import reference_edit

STACK = "base_model.model.model.layers.{layer}.mlp.experts.{inner}lora_{side}.weight"
FFN = EditSpec(layers=("ffn",))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize(
    ("patterns", "ranks"),
    [
        ({"alpha_pattern": {"(down_proj|w2)": 32}}, {}),
        ({"alpha_pattern": {r"experts\.1\..*": 5}}, {}),
        ({"rank_pattern": {"(up_proj|w3)": 2}}, {"up_proj": 2, "w3": 2}),
        ({"rank_pattern": {r".*experts\.\d+\.(down_proj|w2)": 3}}, {"down_proj": 3, "w2": 3}),
    ],
    ids=["alpha of a leaf", "alpha of an expert", "rank of a leaf", "rank by the whole name"],
)
def test_patterns_of_single_experts_match_the_modules_name(
    kind: str, patterns: dict[str, Any], ranks: dict[str, int], tmp_path: Path
) -> None:
    pair = make_pair(tmp_path, kind, target_modules=["q_proj"])
    names = add_own_experts(pair, ranks)
    configure(pair, **patterns)
    pome.edit(pair.base, pair.adapter, tmp_path / "out", FFN)
    base, out = read_tensors(pair.base), read_tensors(tmp_path / "out")
    for name in names:
        module, rank, alpha = name.removesuffix(".weight"), 6, 9
        for pattern, value in patterns.get("rank_pattern", {}).items():
            rank = value if re.match(rf"(.*\.)?({pattern})$", module) else rank
        for pattern, value in patterns.get("alpha_pattern", {}).items():
            alpha = value if re.match(rf"(.*\.)?({pattern})$", module) else alpha
        wanted = reference_edit(read_delta(pair, module, alpha / rank), k=max(1, round(rank / 2))).value
        lost = out[name].double() - base[name].double() - wanted
        assert float(lost.norm() / wanted.norm()) < 1e-4, name  # two float32 roundings of W over the edit


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_edited_single_experts_keep_their_rank_and_peft_stacks_them(kind: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, kind, target_modules=["q_proj"])
    names = add_own_experts(pair)
    pome.edit(pair.base, pair.adapter, tmp_path / "full", EditSpec(layers=("up", "q")))
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("up", "q"), out_format="adapter"))
    full, merged = read_tensors(tmp_path / "full"), pair.save_merged(tmp_path / "merged", tmp_path / "out")
    for name, tensor in full.items():
        assert float((tensor - merged[name]).abs().max()) < 2e-6, name
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (pair.adapter, tmp_path / "out"))
    assert {k: t.shape for k, t in before.items()} == {k: t.shape for k, t in after.items()} and names
    assert pome.verify(tmp_path / "out", pair.base, pair.adapter, full=True).ok


@pytest.mark.parametrize("kind", sample(["qwen3_moe", "mixtral", "olmoe", "qwen2_moe"], "mixtral"))
@pytest.mark.parametrize("layers", [("up",), ("ffn",), ("down", "q")])
def test_single_experts_of_an_adapter_find_their_place_in_a_packed_base(
    kind: str, layers: tuple[str, ...], tmp_path: Path
) -> None:
    """The edit on packed experts loads as the same model as the edit on single ones."""
    pair = make_pair(tmp_path, kind, target_modules=["q_proj"])
    add_own_experts(pair)
    with quietly():
        model = transformers.AutoModelForCausalLM.from_pretrained(pair.base)
        model.save_pretrained(tmp_path / "packed", save_original_format=False)
    assert any(tensor.ndim == 3 for tensor in read_tensors(tmp_path / "packed").values())
    models = []
    for base, out in ((pair.base, "single out"), (tmp_path / "packed", "packed out")):
        manifest = pome.edit(base, pair.adapter, tmp_path / out, EditSpec(layers=layers))
        assert manifest.tensors and pome.verify(tmp_path / out, base, pair.adapter, full=True).ok
        with quietly():
            models.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / out).state_dict())
    for name, tensor in models[0].items():
        assert float((tensor - models[1][name]).abs().max()) < 2e-6, name


def test_an_adapter_of_single_experts_is_edited_beside_a_packed_base(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "qwen3_moe", target_modules=["q_proj"])
    add_own_experts(pair)
    with quietly():
        model = transformers.AutoModelForCausalLM.from_pretrained(pair.base)
        model.save_pretrained(tmp_path / "packed", save_original_format=False)
    spec = EditSpec(layers=("up", "down"), out_format="adapter")
    one = pome.edit(pair.base, pair.adapter, tmp_path / "one", spec)
    two = pome.edit(tmp_path / "packed", pair.adapter, tmp_path / "two", spec)
    assert len(one.tensors) == len(two.tensors) == 2 * 3 * 2
    adapters = [load_file(tmp_path / out / "adapter_model.safetensors") for out in ("one", "two")]
    for key, factor in adapters[0].items():
        if key.endswith("lora_A.weight"):
            partner = key.replace("lora_A", "lora_B")
            products = [tensors[partner].double() @ tensors[key].double() for tensors in adapters]
            assert float((products[0] - products[1]).norm()) <= 1e-5 * float(products[0].norm()), key
            assert factor.shape == adapters[1][key].shape
    assert pome.verify(tmp_path / "two", tmp_path / "packed", pair.adapter, full=True).ok


def write_as_peft_018(pair: Pair, experts: int = 3) -> None:
    """The same change of stacked experts in the layout of PEFT 0.18, which took (E, out, in) for (E, in, out)."""

    def turn(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        turned = dict(tensors)
        for key, A in tensors.items():
            if "experts" in key and "lora_A" in key:
                B = tensors[key.replace("lora_A", "lora_B")]
                A3, B3 = A.reshape(experts, -1, A.shape[1]), B.reshape(B.shape[0], -1, experts)
                turned[key] = B3.permute(2, 1, 0).reshape(-1, B.shape[0]).contiguous()
                turned[key.replace("lora_A", "lora_B")] = A3.permute(2, 1, 0).reshape(A.shape[1], -1).contiguous()
        return turned

    rewrite(pair, turn)
    configure(pair, peft_version="0.18.0")


@pytest.mark.parametrize("kind", ["qwen3_moe", "square moe", "granitemoe", "square granite"])
@pytest.mark.parametrize("form", ["full", "adapter"])
def test_experts_in_the_layout_of_peft_018_are_read_as_written(kind: str, form: str, tmp_path: Path) -> None:
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    pair = make_pair(tmp_path, kind, target_modules=[], target_parameters=targets)
    spec = EditSpec(layers=("up", "down"))
    pome.edit(pair.base, pair.adapter, tmp_path / "new", spec)
    write_as_peft_018(pair)
    pome.edit(pair.base, pair.adapter, tmp_path / "old", EditSpec(layers=("up", "down"), out_format=form))
    wanted, out = (read_tensors(tmp_path / name) for name in ("new", "old"))
    if form == "adapter":
        assert pome.verify(tmp_path / "old", pair.base, pair.adapter, full=True).ok
        edited = Pair(pair.base, tmp_path / "old", pair.dtype)
        write_as_peft_018(edited)  # turned once more, it is in the layout of today's PEFT
        configure(edited, peft_version="0.21.2")
        out = edited.save_merged(tmp_path / "merged")
    for name, tensor in wanted.items():
        assert float((tensor - out[name]).abs().max()) < 2e-6, name


@pytest.mark.parametrize("version", [None, "0.18.2.dev0", "0.18.2.dev0@5356277", "unknown"])
def test_square_experts_of_an_unknown_release_are_refused(version: str | None, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "square moe", target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    configure(pair, peft_version=version)
    with pytest.raises(PairingError, match=r"are square, and releases of PEFT \(up to 0.18, from 0.19 on\)"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["0.19.0", "0.21.2", "1.0"])
def test_square_experts_of_a_later_release_are_what_peft_merges(version: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "square moe", target_modules=[], target_parameters=FUSED_EXPERTS)
    configure(pair, peft_version=version)
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(layers=("down",)))
    merged, out = pair.save_merged(tmp_path / "merged"), read_tensors(tmp_path / "out")
    for name in (name for name in out if "down_proj" not in name):
        assert float((out[name] - merged[name]).abs().max()) < 1e-6, name


def test_three_dimensional_factors_are_named_with_the_layout_that_is_read(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "qwen3_moe", target_modules=[], target_parameters=["mlp.experts.down_proj"])
    rewrite(pair, lambda t: {k: v.reshape(3, 6, -1) if "lora_A" in k else v.reshape(3, -1, 6) for k, v in t.items()})
    with pytest.raises(CheckpointError, match=r"factors of 3 experts in three dimensions.*\(experts \* r, in\)"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")


@pytest.mark.parametrize("ending", [".weight", ""], ids=["weight", "bare"])  # MLX's own keys end with the factor
@pytest.mark.parametrize("sides", [("lora_a", "lora_b"), ("lora_down", "lora_up")])
def test_factors_of_other_tools_are_named(sides: tuple[str, str], ending: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    names = dict(zip(("lora_A.weight", "lora_B.weight"), (f"{side}{ending}" for side in sides), strict=True))
    rewrite(pair, lambda t: {re.sub(r"lora_[AB]\.weight", lambda found: names[found[0]], k): v for k, v in t.items()})
    what = "an adapter of MLX, not of PEFT; fuse it" if "lora_a" in sides else "in a form that PEFT does not write"
    with pytest.raises(CheckpointError, match=what):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors"])
def test_a_folder_of_mlx_is_named(name: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["up_proj"])
    (pair.adapter / "adapter_model.safetensors").rename(pair.adapter / name)
    (pair.adapter / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}')
    with pytest.raises(CheckpointError, match="an adapter of MLX, not of PEFT; fuse it"):
        pome.edit(pair.base, pair.adapter, tmp_path / "out")


def test_the_sizes_of_a_square_model_are_square() -> None:
    config = CONFIGS["square moe"]()
    assert 2 * config.moe_intermediate_size == config.hidden_size
