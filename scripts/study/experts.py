"""A small mixture of experts: its model, its experts as single matrices, and which experts its tokens go to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from study.data import Row, State
from train_poet import pad

COUNT, CHOSEN = 8, 2  # experts of a layer, and of a token
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def make_mixture(seed: int, width: int, layers: int, vocabulary: int) -> Any:
    """A Qwen3-MoE with random weights, its experts as wide as the model, its head tied."""
    torch.manual_seed(seed)
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        moe_intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        num_experts=COUNT,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def split_experts(state: State) -> State:
    """Stacked experts (experts x out x in) as one matrix each, named as checkpoints name them; all else as it is."""
    found: State = {}
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".")
        if last in STACKED and tensor.ndim == 3:
            for expert, stacked in enumerate(tensor):
                parts = stacked.chunk(len(STACKED[last]))
                found |= {
                    f"{stem}.{expert}.{part}.weight": matrix.clone()
                    for part, matrix in zip(STACKED[last], parts, strict=True)
                }
        else:
            found[name] = tensor
    return found


def join_experts(state: State) -> State:
    """What `split_experts` took apart, put together again."""
    stems = {name.split(".experts.")[0] + ".experts" for name in state if ".experts.0." in name}
    found = {name: tensor for name, tensor in state.items() if name.split(".experts.")[0] + ".experts" not in stems}
    for stem in stems:
        for last, parts in STACKED.items():
            found[f"{stem}.{last}"] = torch.stack(
                [torch.cat([state[f"{stem}.{e}.{part}.weight"] for part in parts]) for e in range(COUNT)]
            )
    return found


@torch.no_grad()
def find_routes(model: Any, rows: Sequence[Row], batch: int = 25) -> Tensor | None:
    """Whether each expert is chosen, (layers x tokens) x experts, bool; None for a model without a router."""
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    if not routers:
        return None
    seen: list[Tensor] = []
    real = torch.empty(0, dtype=torch.bool)

    def keep(_: nn.Module, __: Any, given: tuple[Tensor, ...]) -> None:
        chosen = torch.zeros(len(given[2]), COUNT, dtype=torch.bool).scatter(1, given[2], True)
        seen.append(chosen[real])

    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        for start in range(0, len(rows), batch):
            inside = pad(list(rows[start : start + batch]), 0)
            real = inside["attention_mask"].bool().flatten()
            with torch.autocast("cpu", torch.bfloat16):
                model.model(input_ids=inside["input_ids"], attention_mask=inside["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(seen)


def share_moved(routes: Tensor, before: Tensor) -> float:
    """Share of the choices of experts that are not those of `before`."""
    return 1.0 - float((routes & before).sum()) / float(before.sum())
