"""Quantized layouts are refused by name, with the next step, and only where a selected weight is stored so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pome import EditSpec, PairingError
from pome.editing.session import open_pair

NAME = "model.layers.0.mlp.up_proj"
CONFIG = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128}


def codes(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.ones(shape, dtype=torch.float32).to(dtype)


# As the libraries store them: https://huggingface.co/docs/transformers/quantization and the formats' own READMEs.
LAYOUTS: dict[str, tuple[dict[str, Tensor], dict[str, object], str]] = {
    "gptq": (
        {
            f"{NAME}.qweight": codes(8, 128),
            f"{NAME}.qzeros": codes(1, 16),
            f"{NAME}.scales": codes(1, 128, dtype=torch.float16),
            f"{NAME}.g_idx": codes(64),
        },
        {"quant_method": "gptq"},
        "GPTQ,",
    ),
    "awq": (
        {
            f"{NAME}.qweight": codes(64, 16),
            f"{NAME}.qzeros": codes(1, 16),
            f"{NAME}.scales": codes(1, 128, dtype=torch.float16),
        },
        {"quant_method": "awq"},
        "AWQ,",
    ),
    "bitsandbytes 4 bit": (
        {
            f"{NAME}.weight": codes(4096, 1, dtype=torch.uint8),
            f"{NAME}.weight.absmax": codes(128, dtype=torch.uint8),
            f"{NAME}.weight.quant_map": codes(16, dtype=torch.float32),
            f"{NAME}.weight.quant_state.bitsandbytes__nf4": codes(80, dtype=torch.uint8),
        },
        {"quant_method": "bitsandbytes"},
        "bitsandbytes,",
    ),
    "bitsandbytes 8 bit": (
        {f"{NAME}.weight": codes(128, 64, dtype=torch.int8), f"{NAME}.SCB": codes(128, dtype=torch.float32)},
        {"quant_method": "bitsandbytes"},
        "bitsandbytes,",
    ),
    "compressed-tensors packed": (
        {
            f"{NAME}.weight_packed": codes(128, 8),
            f"{NAME}.weight_scale": codes(128, 1, dtype=torch.bfloat16),
            f"{NAME}.weight_shape": codes(2),
        },
        {"quant_method": "compressed-tensors"},
        "compressed-tensors, packed",
    ),
    "compressed-tensors fp8": (
        {
            f"{NAME}.weight": codes(128, 64, dtype=torch.float8_e4m3fn),
            f"{NAME}.weight_scale": codes(128, 1, dtype=torch.bfloat16),
        },
        {"quant_method": "compressed-tensors"},
        "fp8 \\(compressed-tensors\\)",
    ),
    "fp8 with block scales": (
        {
            f"{NAME}.weight": codes(128, 64, dtype=torch.float8_e4m3fn),
            f"{NAME}.weight_scale_inv": codes(1, 1, dtype=torch.float32),
        },
        {"quant_method": "fp8"},
        "fp8 with block scales",
    ),
    "mxfp4": (
        {
            "model.layers.0.mlp.experts.gate_up_proj_blocks": codes(2, 128, 2, 16, dtype=torch.uint8),
            "model.layers.0.mlp.experts.gate_up_proj_scales": codes(2, 128, 2, dtype=torch.uint8),
        },
        {"quant_method": "mxfp4"},
        "MXFP4",
    ),
}


def save(folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> Path:
    folder.mkdir()
    plain = {"model.layers.0.self_attn.q_proj.weight": torch.randn(64, 64)}
    save_file(plain | tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("side", ["FT", "BASE"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantized_weight_is_refused_by_the_name_of_its_format(tmp_path: Path, layout: str, side: str) -> None:
    tensors, declared, said = LAYOUTS[layout]
    model = {"model_type": "gpt_oss", "hidden_size": 64} if layout == "mxfp4" else CONFIG
    quantized = save(tmp_path / "quantized", tensors, model | {"quantization_config": declared})
    plain = save(tmp_path / "plain", {f"{NAME}.weight": torch.randn(128, 64)}, model)
    pair = (plain, quantized) if side == "FT" else (quantized, plain)
    with pytest.raises(PairingError, match=f"quantized as {said}.*exclude") as caught, open_pair(*pair, EditSpec()):
        pass
    assert str(quantized) in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_tensors_of_a_quantized_checkpoint_can_be_edited(tmp_path: Path, layout: str) -> None:
    tensors, declared, _ = LAYOUTS[layout]
    pair = [save(tmp_path / s, tensors, CONFIG | {"quantization_config": declared}) for s in ("base", "ft")]
    with open_pair(*pair, EditSpec(layers=("q",))) as opened:
        assert [unit.name for unit in opened.plan.units] == ["model.layers.0.self_attn.q_proj.weight"]
