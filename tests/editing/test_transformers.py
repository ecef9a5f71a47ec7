"""Models of transformers: saved, perturbed, edited, loaded from OUT; their logits are those of an edit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import pome
from support.checkpoints import INDEX, assert_only_edited
from support.reference import reference_edit

# A matrix of a model: the name of its parameter, and a view of the rows or columns that are it, (fan_out, fan_in).
Matrix = tuple[str, Callable[[Tensor], Tensor]]

LAYERS, HIDDEN, INNER, HEADS, HEAD = 2, 32, 72, 4, 8
SIZES = {
    "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS,
    "vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"n_layer": LAYERS, "n_embd": HIDDEN, "n_inner": INNER, "n_head": HEADS, "vocab_size": 60, "n_positions": 64}
OPT = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {
    "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN
}  # fmt: skip


def whole(t: Tensor) -> Tensor:
    return t


def transposed(t: Tensor) -> Tensor:
    return t.T


def rows(start: int, end: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t[start:end]


def columns(start: int, end: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t[:, start:end].T


def every_layer(pattern: str, *views: Callable[[Tensor], Tensor]) -> list[Matrix]:
    return [(pattern.format(i), view) for i in range(LAYERS) for view in views]


@dataclass(frozen=True)
class Case:
    model: str
    config: str
    sizes: dict[str, Any]
    matrices: dict[str, list[Matrix]]  # --layers -> the matrices that it must edit, found by reading the model's code


GATED = {
    "up": every_layer("model.layers.{}.mlp.up_proj.weight", whole),
    "ffn": [
        (f"model.layers.{i}.mlp.{role}_proj.weight", whole) for i in range(LAYERS) for role in ("gate", "up", "down")
    ],
}


def neox_heads(which: int) -> Callable[[Tensor], Tensor]:
    """Queries (0), keys (1) or values (2) of GPT-NeoX: its fused rows go head by head, q, k and v within each."""
    picked = [(head * 3 + which) * HEAD + i for head in range(HEADS) for i in range(HEAD)]
    return lambda t: t[picked]


CASES = {
    "llama": Case("LlamaForCausalLM", "LlamaConfig", GROUPED, GATED),
    "qwen2": Case("Qwen2ForCausalLM", "Qwen2Config", GROUPED, GATED),
    "mistral": Case("MistralForCausalLM", "MistralConfig", GROUPED | {"head_dim": HEAD}, GATED),
    "gemma2": Case("Gemma2ForCausalLM", "Gemma2Config", GROUPED | {"head_dim": HEAD}, GATED),
    "phi3": Case(
        "Phi3ForCausalLM", "Phi3Config", GROUPED,
        {
            "up": every_layer("model.layers.{}.mlp.gate_up_proj.weight", rows(INNER, 2 * INNER)),
            "ffn": every_layer("model.layers.{}.mlp.gate_up_proj.weight", rows(0, INNER), rows(INNER, 2 * INNER))
            + every_layer("model.layers.{}.mlp.down_proj.weight", whole),
            "attention": every_layer(
                "model.layers.{}.self_attn.qkv_proj.weight", rows(0, 32), rows(32, 48), rows(48, 64)
            ) + every_layer("model.layers.{}.self_attn.o_proj.weight", whole),
        },
    ),
    "gpt2": Case(
        "GPT2LMHeadModel", "GPT2Config", GPT2,
        {
            "up": every_layer("transformer.h.{}.mlp.c_fc.weight", transposed),
            "ffn": every_layer("transformer.h.{}.mlp.c_fc.weight", transposed)
            + every_layer("transformer.h.{}.mlp.c_proj.weight", transposed),
            "attention": every_layer(
                "transformer.h.{}.attn.c_attn.weight", columns(0, 32), columns(32, 64), columns(64, 96)
            ) + every_layer("transformer.h.{}.attn.c_proj.weight", transposed),
        },
    ),
    "gpt_neox": Case(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES,
        {
            "up": every_layer("gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", whole),
            "ffn": every_layer("gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", whole)
            + every_layer("gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", whole),
            "attention": every_layer(
                "gpt_neox.layers.{}.attention.query_key_value.weight", neox_heads(0), neox_heads(1), neox_heads(2)
            ) + every_layer("gpt_neox.layers.{}.attention.dense.weight", whole),
        },
    ),
    "opt": Case(
        "OPTForCausalLM", "OPTConfig", OPT,
        {
            "up": every_layer("model.decoder.layers.{}.fc1.weight", whole),
            "ffn": every_layer("model.decoder.layers.{}.fc1.weight", whole)
            + every_layer("model.decoder.layers.{}.fc2.weight", whole),
        },
    ),
    "bert": Case(
        "BertForMaskedLM", "BertConfig", SIZES,
        {
            "up": every_layer("bert.encoder.layer.{}.intermediate.dense.weight", whole),
            "ffn": every_layer("bert.encoder.layer.{}.intermediate.dense.weight", whole)
            + every_layer("bert.encoder.layer.{}.output.dense.weight", whole),
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A model with random weights and the same after a step of noise, both saved by transformers."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = getattr(transformers, case.config)(**case.sizes)
    model = getattr(transformers, case.model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)  # large enough for logits that a small edit moves visibly
        model.save_pretrained(folder / "base")
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
        # Several shards, so that the index is in play as well.
        model.save_pretrained(folder / "ft", max_shard_size="30KB")
    assert (folder / "ft" / INDEX).is_file()
    yield request.param, folder


def load(folder: Path, case: Case) -> torch.nn.Module:
    return getattr(transformers, case.model).from_pretrained(folder, dtype=torch.float32).eval()


def edit_in_memory(case: Case, folder: Path, layers: str, scale: Callable[[Tensor, int], float]) -> torch.nn.Module:
    """The fine-tuned model with the matrices of `layers` edited by definition, on the parameters of the module."""
    base, model = (dict(load(folder / side, case).named_parameters()) for side in ("base", "ft"))
    edited = load(folder / "ft", case)
    parameters = dict(edited.named_parameters())
    for name, view in case.matrices[layers]:
        D = view(model[name].detach()) - view(base[name].detach())
        found = reference_edit(D)
        P = found.value * math.sqrt(found.k) / found.value.norm()
        W = view(base[name].detach()).double() + scale(D.double(), found.k) * P
        numbers = view(torch.arange(parameters[name].numel()).reshape(parameters[name].shape))
        with torch.no_grad():
            parameters[name].view(-1)[numbers.reshape(-1)] = W.float().reshape(-1)
    return edited


SCALES: dict[str, Callable[[Tensor, int], float]] = {
    "frobenius": lambda D, k: float(D.norm()) / math.sqrt(k),
    "rms": lambda D, k: math.sqrt(D.shape[0] / D.shape[1]),  # which tells fan_out from fan_in
}


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_the_output_loads_and_its_logits_are_those_of_the_same_edit_in_memory(
    saved: tuple[str, Path], tmp_path: Path, scale: str
) -> None:
    name, folder = saved
    case = CASES[name]
    tokens = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(3))
    for layers, matrices in case.matrices.items():
        out = tmp_path / layers
        manifest = pome.edit(folder / "base", folder / "ft", out, pome.EditSpec(layers=(layers,), scale=scale))
        assert len(manifest.tensors) == len(matrices)
        assert_only_edited(folder / "ft", out, {tensor for tensor, _ in matrices})
        wanted, made = edit_in_memory(case, folder, layers, SCALES[scale]), load(out, case)
        with torch.no_grad():
            logits, expected, before = (m(tokens).logits for m in (made, wanted, load(folder / "ft", case)))
        reach = float(expected.abs().max())
        # Float32 throughout two layers: some 1e-6 of the largest logit; 1e-4 is what the edit itself may be off.
        assert float((logits - expected).abs().max()) <= 1e-4 * reach
        assert float((before - expected).abs().max()) >= 1e-2 * reach  # what is tested is seen by the logits
