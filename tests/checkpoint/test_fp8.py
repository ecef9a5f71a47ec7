"""fp8 weights with block scales: seen and written as bfloat16, only when the user says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import pome
from pome.checkpoint.files import read_range
from pome.checkpoint.source import open_checkpoint
from pome.errors import CheckpointError

BLOCK = (64, 48)  # no divisor of any side below: the last blocks are cut
UP, DOWN = (f"model.layers.0.mlp.{role}_proj.weight" for role in ("up", "down"))
EXPERTS = "model.layers.1.mlp.experts.down_proj"
CONFIG = {"model_type": "qwen3_moe", "hidden_size": 72, "intermediate_size": 200, "moe_intermediate_size": 40}


def quantize(W: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Codes and inverse scales, block by block: the definition, in loops."""
    m, n = W.shape[-2:]
    stack = W.reshape(-1, m, n).float()
    rows, columns = -(-m // BLOCK[0]), -(-n // BLOCK[1])
    S = torch.empty(len(stack), rows, columns)
    Q = torch.empty_like(stack)
    for e in range(len(stack)):
        for i in range(rows):
            for j in range(columns):
                tile = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
                S[e, i, j] = stack[e][tile].abs().max() / 448
                Q[e][tile] = stack[e][tile] / S[e, i, j]
    return Q.reshape(W.shape).to(dtype), S.reshape(*W.shape[:-2], rows, columns)


def dequantize(Q: Tensor, S: Tensor) -> Tensor:
    """The same definition backwards, one entry's block at a time."""
    m, n = Q.shape[-2:]
    i, j = torch.arange(m) // BLOCK[0], torch.arange(n) // BLOCK[1]
    return (Q.float() * S.float()[..., i[:, None], j[None, :]]).bfloat16()


def make_weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    shapes = {UP: (200, 72), DOWN: (72, 200), EXPERTS: (3, 72, 40), "model.norm.weight": (72,)}
    return {name: (torch.randn(shape) * 0.05).bfloat16() for name, shape in shapes.items()}


def perturb(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (W.float() + 0.01 * torch.randn(W.shape)).bfloat16() for name, W in weights.items()}


def save(folder: Path, weights: dict[str, Tensor], *, fp8: bool, shards: bool = False) -> dict[str, Tensor]:
    """Save a checkpoint; returns its weights as they read in bfloat16."""
    stored, seen = {}, {}
    for name, W in weights.items():
        if fp8 and W.ndim > 1:
            stored[name], stored[name + "_scale_inv"] = quantize(W)
            seen[name] = dequantize(stored[name], stored[name + "_scale_inv"])
        else:
            stored[name] = seen[name] = W
    folder.mkdir()
    declared = {"quantization_config": {"quant_method": "fp8", "weight_block_size": BLOCK}} if fp8 else {}
    (folder / "config.json").write_text(json.dumps(CONFIG | declared))
    if not shards:
        save_file(stored, folder / "model.safetensors")
        return seen
    # Every scale in another shard than its weight.
    parts = [{n: t for n, t in stored.items() if n.endswith("_inv") == odd} for odd in (False, True)]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    index = {n: names[n.endswith("_inv")] for n in stored}
    size = sum(t.nbytes for t in stored.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return seen


def load(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(("base_fp8", "ft_fp8"), [(True, False), (False, True), (True, True)])
def test_edit_of_fp8_is_the_edit_of_its_bfloat16(tmp_path: Path, base_fp8: bool, ft_fp8: bool, shards: bool) -> None:
    weights = make_weights(0)
    base = save(tmp_path / "base", weights, fp8=base_fp8, shards=shards)
    ft = save(tmp_path / "ft", perturb(weights), fp8=ft_fp8, shards=shards)
    spec = pome.EditSpec(layers=("ffn",), exclude=("mlp.up_proj",), dequantize=True)
    manifest = pome.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", spec)
    out = load(tmp_path / "out")
    assert out.keys() == ft.keys()
    assert sorted((r.name, r.part) for r in manifest.tensors) == [
        (DOWN, None),
        *((EXPERTS, f"expert={e}") for e in range(3)),
    ]
    for name in ("model.norm.weight", UP):
        assert out[name].dtype == ft[name].dtype
        assert torch.equal(out[name], ft[name]), name
    edited = [(base[DOWN], ft[DOWN], out[DOWN])]
    edited += list(zip(base[EXPERTS], ft[EXPERTS], out[EXPERTS], strict=True))
    for W_base, W_ft, W_out in edited:
        D = W_ft.double() - W_base.double()
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        k = round(0.5 * len(S))
        exact = W_base.double() + D.norm() / k**0.5 * U[:, :k] @ Vh[:k]
        # Rounded once to bfloat16: half a unit in the last place, at most 2^-8 of the entry.
        assert ((W_out.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-12).all()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    if shards:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == out.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in out.values())
    verdict = pome.verify(tmp_path / "out", tmp_path / "base", tmp_path / "ft", full=True)
    assert verdict.ok, verdict.differences
    assert verdict.edits == 4


def test_without_the_option_fp8_is_refused_and_the_option_named(tmp_path: Path) -> None:
    weights = make_weights(0)
    save(tmp_path / "base", weights, fp8=False)
    save(tmp_path / "ft", perturb(weights), fp8=True)
    with pytest.raises(pome.PairingError, match="fp8 with block scales.*dequantize"):
        pome.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [((), ()), ((1,), (3,)), ((1, 1), (3, 1, 1))], ids=str)
def test_one_scale_for_a_tensor_or_an_expert_is_one_multiplication(
    tmp_path: Path, scale_dtype: torch.dtype, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """As transformers writes without a block size; the scales of activations are of no use to a bfloat16 weight."""
    weights = make_weights(0)
    base = make(tmp_path / "base", weights, shapes, scale_dtype)
    ft = make(tmp_path / "ft", perturb(weights), shapes, scale_dtype)
    spec = pome.EditSpec(layers=("up",), dequantize=True)
    pome.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", spec)
    out = load(tmp_path / "out")
    assert out.keys() == ft.keys()
    for name in (DOWN, EXPERTS, "model.norm.weight"):
        assert torch.equal(out[name], ft[name]), name
    D = ft[UP].double() - base[UP].double()
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    k = round(0.5 * len(S))
    exact = base[UP].double() + D.norm() / k**0.5 * U[:, :k] @ Vh[:k]
    assert ((out[UP].double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-12).all()
    assert pome.verify(tmp_path / "out", tmp_path / "base", tmp_path / "ft", full=True).ok


def make(
    folder: Path, weights: dict[str, Tensor], shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Save a checkpoint with a scale for each tensor (for each expert, where the shape has room); its weights."""
    stored, seen = {}, {}
    for name, W in weights.items():
        if W.ndim == 1:
            stored[name] = seen[name] = W
            continue
        shape = shapes[W.ndim - 2]
        amax = W.float().abs().amax((1, 2)) if shape and shape[0] > 1 else W.float().abs().max()
        S = (amax / 448).to(dtype)
        spread = S.float().reshape(-1, 1, 1) if S.numel() > 1 else S.float()
        stored[name] = (W.float() / spread).to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = S.reshape(shape)
        module = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
        stored[module + "activation_scale"] = torch.ones((), dtype=dtype)
        seen[name] = (stored[name].float() * spread).bfloat16()
    folder.mkdir()
    declared = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    (folder / "config.json").write_text(json.dumps(CONFIG | declared))
    save_file(stored, folder / "model.safetensors")
    return seen


def test_one_scale_is_named_as_such_without_the_option(tmp_path: Path) -> None:
    weights = make_weights(0)
    save(tmp_path / "base", weights, fp8=False)
    make(tmp_path / "ft", perturb(weights), ((), ()), torch.float32)
    with pytest.raises(pome.PairingError, match="fp8 with one scale for each tensor.*dequantize"):
        pome.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out")


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    weights = make_weights(0)
    save(tmp_path / "ft", weights, fp8=True)
    config = json.loads((tmp_path / "ft" / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [128, 128]
    (tmp_path / "ft" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="are not the scales of .* weight_block_size"):
        open_checkpoint(tmp_path / "ft", dequantize=True)


@given(st.data())
def test_any_range_of_a_dequantized_file_is_that_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "ranges"
    if not folder.exists():
        save(folder, make_weights(1), fp8=True)
        seen = save(folder.with_name("again"), make_weights(1), fp8=True)
        save_file(seen, folder.with_name("seen.safetensors"))
    expected = load_file(folder.with_name("seen.safetensors"))
    checkpoint = open_checkpoint(folder, dequantize=True)
    try:
        (weights,) = checkpoint.files.values()
        whole = bytes(read_range(weights.file, 0, weights.file.size, "all"))
        for name, (_, entry) in checkpoint.tensors.items():
            assert whole[entry.start : entry.end] == bytes(expected[name].contiguous().view(torch.uint8).numpy().data)
        start = data.draw(st.integers(0, weights.file.size))
        count = data.draw(st.integers(0, weights.file.size - start))
        assert bytes(read_range(weights.file, start, count, "a part")) == whole[start : start + count]
    finally:
        checkpoint.close()
