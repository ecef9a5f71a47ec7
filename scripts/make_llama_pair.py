#!/usr/bin/env python3
"""Make a pair of checkpoints with the shapes of TinyLlama-1.1B, 2.2 GB each in bf16, for timing.

    scripts/make_llama_pair.py FOLDER [--shards N] [--layers N] [--seed N]

makes FOLDER/base and FOLDER/ft. The weights are random; the delta has what a fine-tuning delta has: some strong
directions, their singular values falling by a factor of 100, over dense noise of 1e-4. Written a tensor at a time, in
under 1 GB of memory. The same arguments give the same bytes on the same machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from pome.checkpoint.header import build_header

HIDDEN, FFN, VOCABULARY, HEADS, KV_HEADS = 2048, 5632, 32000, 32, 4
WEIGHT_SCALE, NOISE_SCALE = 0.02, 1e-4
DIRECTIONS, STRONGEST = 64, 0.5


def list_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, in the order in which they are written."""
    heads = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        shapes |= {
            stem + "input_layernorm.weight": (HIDDEN,),
            stem + "mlp.down_proj.weight": (HIDDEN, FFN),
            stem + "mlp.gate_proj.weight": (FFN, HIDDEN),
            stem + "mlp.up_proj.weight": (FFN, HIDDEN),
            stem + "post_attention_layernorm.weight": (HIDDEN,),
            stem + "self_attn.k_proj.weight": (heads, HIDDEN),
            stem + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            stem + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            stem + "self_attn.v_proj.weight": (heads, HIDDEN),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_tensor(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The base's and the fine-tuned tensor, both bf16."""
    base = torch.randn(shape, generator=generator).mul_(WEIGHT_SCALE).bfloat16()
    fine_tuned = base.float().add_(torch.randn(shape, generator=generator), alpha=NOISE_SCALE)
    if len(shape) == 2:
        rows, columns = shape
        left = torch.randn(rows, DIRECTIONS, generator=generator).div_(rows**0.5)
        right = torch.randn(columns, DIRECTIONS, generator=generator).div_(columns**0.5)
        strengths = STRONGEST * torch.logspace(0, -2, DIRECTIONS)
        fine_tuned.addmm_(left * strengths, right.T)
    return base, fine_tuned.bfloat16()


def split_shards(shapes: dict[str, tuple[int, ...]], count: int) -> list[list[str]]:
    """The names, in order, in `count` shards of about the same size."""
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    shards: list[list[str]] = [[] for _ in range(count)]
    passed = 0
    for name, shape in shapes.items():
        shards[min(count - 1, passed * count // total)].append(name)
        passed += torch.Size(shape).numel()
    return [shard for shard in shards if shard]


def write_pair(folder: Path, layers: int = 22, shards: int = 1, seed: int = 0) -> tuple[Path, Path]:
    """Write FOLDER/base and FOLDER/ft; returns both."""
    shapes = list_shapes(layers)
    generator = torch.Generator().manual_seed(seed)
    sides = (folder / "base", folder / "ft")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    }
    for side in sides:
        side.mkdir(parents=True, exist_ok=True)
        (side / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    parts = split_shards(shapes, shards)
    weight_map = {}
    for number, names in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header = build_header([(name, "BF16", shapes[name]) for name in names], {"format": "pt"})
        with (sides[0] / file).open("wb") as base, (sides[1] / file).open("wb") as fine_tuned:
            base.write(header)
            fine_tuned.write(header)
            for name in names:
                for tensor, target in zip(make_tensor(shapes[name], generator), (base, fine_tuned), strict=True):
                    target.write(memoryview(tensor.view(torch.uint8).reshape(-1).numpy()))
    if len(parts) > 1:
        size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        for side in sides:
            (side / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a pair of checkpoints with the shapes of TinyLlama-1.1B.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(*write_pair(given.folder, given.layers, given.shards, given.seed), sep="\n")


if __name__ == "__main__":
    main()
