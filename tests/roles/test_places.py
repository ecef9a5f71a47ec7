"""Where a matrix belongs in the model: equal for all spellings and packings of one matrix, and for no other matrix."""

from __future__ import annotations

import itertools

import pytest

from pome.roles.places import find_places
from pome.roles.roles import find_layout

H, F, E = 24, 56, 3
UP, DOWN, SQUARE = (F, H), (H, F), (H, H)
CONFIG = {"model_type": "mixtral", "hidden_size": H, "num_local_experts": E, "num_attention_heads": 3}

# Each row: spellings of one matrix (or of tensors that hold it), by names and shapes.
SAME = [
    [("mlp.up_proj", UP), ("ffn.up_proj", UP), ("feed_forward.w3", UP), ("mlp.gate_up_proj", (2 * F, H)), ("fc1", UP)],
    [("mlp.experts.1.up_proj", UP), ("block_sparse_moe.experts.1.w3", UP), ("mlp.experts.gate_up_proj", (E, 2 * F, H)),
     ("block_sparse_moe.input_linear", (E, 2 * F, H)), ("feed_forward.experts.expert_1.up_proj", UP)],
    [("mlp.shared_expert.up_proj", UP), ("mlp.shared_experts.up_proj", UP), ("shared_mlp.input_linear", (2 * F, H))],
    [("mlp.experts.1.down_proj", DOWN), ("mlp.experts.down_proj", (E, H, F))],
    [("self_attn.q_proj", SQUARE), ("attention.attention.query", SQUARE), ("attn.to_q", SQUARE),
     ("_fsdp_wrapped_module.self_attn._orig_mod.q_proj", SQUARE)],
    [("encoder_attn.q_proj", SQUARE), ("crossattention.self.query", SQUARE), ("cross_attn.q_proj", SQUARE)],
    [("vision_mlp.up_proj", UP)],
    [("mlp.experts.2.up_proj", UP)],
    [("block_sparse_moe.gate", (E, H)), ("mlp.gate", (E, H)), ("mlp.router", (E, H)),
     ("block_sparse_moe.router.layer", (E, H))],
    [("self_attn.q_a_proj", (8, H)), ("attn.wq_a", (8, H))],
    [("self_attn.kv_a_proj_with_mqa", (8, H))],
]  # fmt: skip


def places_of(name: str, shape: tuple[int, ...]) -> set[tuple[str, int | None]]:
    full = f"model.layers.3.{name}.weight"
    return {(place.key, place.expert) for place in find_places(full, find_layout(full, shape, CONFIG), shape)}


@pytest.mark.parametrize("row", SAME, ids=lambda row: row[0][0])
def test_all_spellings_of_a_matrix_have_one_place(row: list[tuple[str, tuple[int, ...]]]) -> None:
    common = set.intersection(*(places_of(*spelling) for spelling in row))
    assert len(common) >= 1
    if len(places_of(*row[0])) == 1:
        assert common == places_of(*row[0])


def test_different_matrices_have_different_places() -> None:
    for one, other in itertools.combinations(SAME, 2):
        assert places_of(*one[0]).isdisjoint(places_of(*other[0])), (one[0], other[0])


@pytest.mark.parametrize("layer", ["model.layers.3.", "vision_tower.blocks.3.", "model.layers.13."])
def test_stack_and_layer_are_part_of_the_place(layer: str) -> None:
    name = f"{layer}mlp.up_proj.weight"
    ((key, expert),) = {(p.key, p.expert) for p in find_places(name, find_layout(name, UP), UP)}
    assert key == f"{layer}ffn.up" and expert is None


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (["model.embed_tokens.weight", "transformer.wte.weight", "tok_embeddings.weight"], "embed.tokens"),
        (["lm_head.weight", "embed_out.weight"], "head.lm"),
    ],
)
def test_tables_outside_of_layers_have_one_place_under_every_name(names: list[str], key: str) -> None:
    shape = (97, H)
    assert {place.key for name in names for place in find_places(name, find_layout(name, shape), shape)} == {key}
