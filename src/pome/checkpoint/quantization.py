"""Quantized formats, recognised by the names and dtypes of their tensors, and how to convert each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pome.checkpoint.fp8 import SUFFIX, is_per_tensor
from pome.checkpoint.header import TensorEntry
from pome.errors import printable

BLOCK_FP8, PER_TENSOR_FP8 = "fp8 with block scales", "fp8 with one scale for each tensor"
_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


@dataclass(frozen=True)
class Quantized:
    """One weight that is stored in a quantized format, not as a matrix of floats."""

    weight: str  # the name that the weight has where it is not quantized
    stored: str  # the tensor that holds its codes
    format: str
    shape: tuple[int, ...]  # of the weight, as far as the codes tell it: enough to find its role
    next_step: str


_WITH_TRANSFORMERS = "load it with transformers (from_pretrained with {option}) and save it again in bfloat16"
_DEQUANTIZE = "dequantize it with the tool that quantized it and give the bfloat16 checkpoint"
# Suffix of the codes -> suffix of the plain weight, format, how many weights a code holds, next step.
_SUFFIXES: tuple[tuple[str, str, str, int, str], ...] = (
    ("_blocks", "", "MXFP4", 2, _WITH_TRANSFORMERS.format(option="Mxfp4Config(dequantize=True)")),
    (".qweight", ".weight", "GPTQ or AWQ", 8, _DEQUANTIZE),
    (".weight_packed", ".weight", "compressed-tensors, packed", 8, _DEQUANTIZE),
    (".W_q", ".weight", "HQQ", 1, _DEQUANTIZE),
)
_PARTNERS = {"_blocks": "_scales", ".qweight": ".scales", ".weight_packed": ".weight_scale", ".W_q": ".scale"}


def find_quantized(tensors: Mapping[str, tuple[str, TensorEntry]], config: Mapping[str, Any] | None) -> list[Quantized]:
    """Every weight of a checkpoint that is stored quantized, with its format by name."""
    method = declared_method(config)
    found = []
    for name, (_, entry) in tensors.items():
        for suffix, plain, form, per_code, step in _SUFFIXES:
            if name.endswith(suffix) and name.removesuffix(suffix) + _PARTNERS[suffix] in tensors:
                form = {"gptq": "GPTQ", "awq": "AWQ"}.get(method, form) if suffix == ".qweight" else form
                shape = _guess_shape(entry.shape, per_code)
                found.append(Quantized(name.removesuffix(suffix) + plain, name, form, shape, step))
        if entry.dtype in _FP8 and name + SUFFIX in tensors:
            scales = tensors[name + SUFFIX][1].shape
            form = PER_TENSOR_FP8 if len(scales) < 2 and is_per_tensor(scales, entry.shape) else BLOCK_FP8
            found.append(Quantized(name, name, form, entry.shape, "give --dequantize"))
        elif entry.dtype in _FP8:
            form = f"fp8 ({method})" if method else "fp8"
            found.append(Quantized(name, name, form, entry.shape, _DEQUANTIZE))
        elif entry.dtype in ("U8", "I8") and _is_bitsandbytes(name, tensors):
            step = _WITH_TRANSFORMERS.format(option="the same config, then model.dequantize()")
            found.append(Quantized(name, name, "bitsandbytes", (0, 0), step))
        elif entry.dtype in ("U8", "I8") and name.endswith(".weight") and name + "_scale" in tensors:
            found.append(Quantized(name, name, f"int8 ({method or 'compressed-tensors'})", entry.shape, _DEQUANTIZE))
    return found


def _is_bitsandbytes(name: str, tensors: Mapping[str, object]) -> bool:
    marks = (name + ".absmax", name.removesuffix("weight") + "SCB")
    return any(mark in tensors for mark in marks) or f"{name}.quant_map" in tensors


def _guess_shape(codes: tuple[int, ...], per_code: int) -> tuple[int, ...]:
    """(rows, columns) or (experts, rows, columns) of packed codes; MXFP4 splits the columns into blocks."""
    if len(codes) == 4:
        return codes[0], codes[1], codes[2] * codes[3] * per_code
    return (*codes[:-1], codes[-1] * per_code) if codes else ()


def declared_method(config: Mapping[str, Any] | None) -> str:
    """The name of the quantization that a `config.json` declares, or an empty text."""
    declared = (config or {}).get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    return printable(re.sub(r"\W+", "-", str(method)), 40) if method else ""
