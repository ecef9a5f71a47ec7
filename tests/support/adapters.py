"""Tiny models and random adapters on them, made and merged by PEFT and transformers themselves."""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.checkpoints import read_tensors
from support.reference import reference_edit

LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
SIZES |= {"num_hidden_layers": 2, "intermediate_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS: dict[str, Any] = {**SIZES, "num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 24, "head_dim": 8}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "tied llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_head=4, n_layer=2, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**EXPERTS),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "two experts": lambda: transformers.Qwen3MoeConfig(**{**EXPERTS, "num_experts": 2, "num_local_experts": 2}),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**EXPERTS),
    "square moe": lambda: transformers.Qwen3MoeConfig(**{**EXPERTS, "moe_intermediate_size": 16}),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=14),
    "olmoe": lambda: transformers.OlmoeConfig(**{k: v for k, v in EXPERTS.items() if k != "head_dim"}),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**{k: v for k, v in EXPERTS.items() if k != "head_dim"}),
    "square granite": lambda: transformers.GraniteMoeConfig(
        **{**{k: v for k, v in EXPERTS.items() if k != "head_dim"}, "intermediate_size": 32}
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**EXPERTS),
}
FUSED_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LORA: dict[str, Any] = {"r": 6, "lora_alpha": 9, "init_lora_weights": False}
TOKENS = torch.tensor([[1, 5, 9, 33, 2, 60]])


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings, logs and bars of the libraries that the package is held to."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@dataclass
class Pair:
    """A base and an adapter on disk."""

    base: Path
    adapter: Path
    dtype: torch.dtype

    def load_merged(self, adapter: Path | None = None) -> Any:
        """The model that PEFT makes of BASE and an adapter."""
        with quietly():
            model = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=self.dtype)
            return peft.PeftModel.from_pretrained(model, adapter or self.adapter).merge_and_unload().eval()

    def save_merged(self, folder: Path, adapter: Path | None = None) -> dict[str, Tensor]:
        """The tensors of that model as transformers saves them."""
        with quietly():
            self.load_merged(adapter).save_pretrained(folder)
        return read_tensors(folder)


def make_pair(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **lora: Any) -> Pair:
    """A tiny model with random weights, and a random adapter on it that PEFT made and saved."""
    torch.manual_seed(0)
    pair = Pair(folder / "base", folder / "adapter", dtype)
    with quietly():
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(dtype)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    weight.normal_(std=0.1)
        model.save_pretrained(pair.base)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **lora}))
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_magnitude" in name or "modules_to_save" in name:
                    weight.mul_(1 + 0.1 * torch.randn(weight.shape).to(weight.dtype))
                elif ".lora_" in name:
                    weight.normal_(std=0.1)
                elif weight.requires_grad:  # a bias that was trained along
                    weight.add_(0.1)
        adapted.save_pretrained(pair.adapter)
    return pair


def load_logits(folder: Path) -> Tensor:
    with quietly(), torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS).logits


def read_delta(pair: Pair, module: str, scaling: float = 9 / 6) -> Tensor:
    """scaling * B A of one module in float64, straight from the adapter's file."""
    tensors = load_file(pair.adapter / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{module}.lora_{one}.weight"].double() for one in "AB")
    return scaling * B @ A


def assert_ulps(a: Tensor, b: Tensor, name: str) -> None:
    """Equal bit for bit, or neighbours: one unit in the last place of the larger value."""
    assert a.dtype == b.dtype and a.shape == b.shape, name
    unit = torch.finfo(a.dtype).eps * torch.maximum(a.double().abs(), b.double().abs())
    assert bool(((a.double() - b.double()).abs() <= unit).all()), name


def assert_edit(out: Tensor, base: Tensor, delta: Tensor, **options: Any) -> None:
    """`out` is base + the edit of delta by definition, to the rounding of its dtype and of float32 arithmetic."""
    wanted = base.double() + reference_edit(delta, **options).value
    # One rounding to the stored dtype, and 1e-5 for a float32 product of up to 40 terms.
    tolerance = torch.finfo(out.dtype).eps * wanted.abs() + 1e-5 * wanted.abs().max()
    assert bool(((out.double() - wanted).abs() <= tolerance).all())


def rewrite(pair: Pair, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = pair.adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def configure(pair: Pair, **values: Any) -> None:
    file = pair.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def add_own_experts(pair: Pair, ranks: dict[str, int] | None = None) -> list[str]:
    """LoRAs of the single experts of a base in its original format, as PEFT wrote them on Linear modules."""
    torch.manual_seed(4)
    shapes = {n: t.shape for n, t in read_tensors(pair.base).items() if re.search(r"experts\.\d+\.[^.]+\.weight$", n)}
    added: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        rank = (ranks or {}).get(name.split(".")[-2], 6)
        lora = f"base_model.model.{name.removesuffix('.weight')}.lora"
        added[f"{lora}_A.weight"] = torch.randn(rank, shape[1]) * 0.1
        added[f"{lora}_B.weight"] = torch.randn(shape[0], rank) * 0.1
    rewrite(pair, lambda tensors: {**tensors, **added})
    configure(pair, target_modules=["q_proj", *sorted({name.split(".")[-2] for name in shapes})])
    return list(shapes)
