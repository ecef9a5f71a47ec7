"""Pairs of tiny models and what PEFT makes of an extraction from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from support.adapters import quietly
from support.lora_survey import ARCHITECTURES as SURVEYED
from support.tiny_models import tiny_config, tiny_model

# The classes of the architectures that an extraction is held to: dense, fused, Conv1D, encoders, packed experts.
ARCHITECTURES = {
    **{name: kind for name, kind in SURVEYED.items() if name not in ("starcoder2", "vit")},
    "qwen2": "Qwen2ForCausalLM",
    "gptj": "GPTJForCausalLM",
    "mpt": "MptForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "modernbert": "ModernBertForMaskedLM",
}


@dataclass
class Trained:
    """A base and a full fine-tune of it on disk, and the class that loads them."""

    base: Path
    ft: Path
    kind: Any

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        with quietly():
            plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
            return self.kind.from_pretrained(folder, dtype=dtype, **plain).eval()

    def load_adapted(self, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
        with quietly():
            return peft.PeftModel.from_pretrained(self.load(self.base, dtype), adapter).eval()

    def merge(self, adapter: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The weights of BASE with the adapter merged by PEFT, by the model's names; tied ones under all of theirs."""
        with quietly():
            return dict(self.load_adapted(adapter, dtype).merge_and_unload().state_dict())


def train(
    folder: Path,
    architecture: str,
    changes: Callable[[str], bool] = lambda _: True,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    **config: Any,
) -> Trained:
    """A tiny model, and the same with a random step of every parameter whose name `changes` finds."""
    name = ARCHITECTURES[architecture]
    pair = Trained(folder / "base", folder / "ft", getattr(transformers, name))
    with quietly():
        model = tiny_model(name, tiny_config(architecture, **config))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
            model.to(dtypes[0]).save_pretrained(pair.base)
            for parameter, weight in model.to(torch.float32).named_parameters():
                if changes(parameter):
                    weight.add_(torch.randn(weight.shape, generator=generator) * 0.01)
            model.to(dtypes[1]).save_pretrained(pair.ft)
    return pair


def find_distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The Frobenius norm of the difference of all parameters."""
    assert one.keys() == other.keys()
    return math.sqrt(sum(float((one[name].double() - other[name].double()).square().sum()) for name in one))
