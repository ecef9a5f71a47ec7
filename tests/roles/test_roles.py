"""The role rules, family by family, on names and shapes as the checkpoints of those families have them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pome.choices import GROUPS, ROLES
from pome.roles.layout import Block, Layout, Part, matrix_shape
from pome.roles.roles import find_layout, find_layouts

H, F = 24, 56  # hidden and intermediate size


def roles_of(layout: Layout) -> list[str]:
    return [part.role for part in layout.parts]


@pytest.mark.parametrize("suffix", [".weight", ""])
@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "base_model.model."])
@pytest.mark.parametrize(
    ("stem", "shape", "role"),
    [
        ("layers.3.mlp.gate_proj", (F, H), "gate"),
        ("layers.3.mlp.up_proj", (F, H), "up"),
        ("layers.3.mlp.down_proj", (H, F), "down"),
        ("layers.3.self_attn.q_proj", (H, H), "q"),
        ("layers.3.self_attn.k_proj", (8, H), "k"),
        ("layers.3.self_attn.v_proj", (8, H), "v"),
        ("layers.3.self_attn.o_proj", (H, H), "o"),
        ("layers.3.self_attn.gate_proj", (H, H), "other"),  # a gate on the attention's output
        ("layers.3.block_sparse_moe.experts.7.w1", (F, H), "gate"),
        ("layers.3.block_sparse_moe.experts.7.w2", (H, F), "down"),
        ("layers.3.block_sparse_moe.experts.7.w3", (F, H), "up"),
        ("layers.3.block_sparse_moe.gate", (8, H), "router"),
        ("layers.3.feed_forward.w3", (F, H), "up"),
        ("layers.3.mlp.experts.11.gate_proj", (F, H), "gate"),
        ("layers.3.mlp.experts.11.up_proj", (F, H), "up"),
        ("layers.3.mlp.experts.11.down_proj", (H, F), "down"),
        ("layers.3.mlp.shared_expert.up_proj", (F, H), "up"),
        ("layers.3.mlp.shared_experts.down_proj", (H, F), "down"),
        ("layers.3.mlp.shared_expert_gate", (1, H), "router"),
        ("layers.3.mlp.gate", (8, H), "router"),
        ("layers.3.mlp.gate.down_proj", (8, H), "other"),
        ("layers.3.self_attn.rel_logits_proj.proj", (8, H), "other"),
        ("layers.3.mlp.w1", (F, H), "other"),  # the gate in some remote code, the up projection in other
        ("layers.3.mlp.head", (99, H), "other"),
        ("layers.3.self_attn.indexer.wk", (8, H), "other"),
        ("layers.3.linear_attn.out_proj", (H, H), "other"),
        ("layers.3.input_layernorm.mlp.fc1", (8, H), "other"),
        ("layers.3.feed_forward.router", (8, H), "router"),
        ("layers.3.ffn.up_proj", (F, H), "up"),
        ("layers.3.mlp.dense_h_to_4h", (F, H), "up"),
        ("layers.3.mlp.dense_4h_to_h", (H, F), "down"),
        ("layers.3.fc1", (F, H), "up"),
        ("layers.3.fc2", (H, F), "down"),
        ("layers.3.mlp.fc1", (F, H), "up"),
        ("h.3.mlp.fc_in", (F, H), "up"),
        ("h.3.mlp.fc_out", (H, F), "down"),
        ("encoder.block.1.layer.1.DenseReluDense.wi", (F, H), "up"),
        ("encoder.block.1.layer.1.DenseReluDense.wi_0", (F, H), "gate"),
        ("encoder.block.1.layer.1.DenseReluDense.wi_1", (F, H), "up"),
        ("encoder.block.1.layer.1.DenseReluDense.wo", (H, F), "down"),
        ("encoder.block.1.layer.0.SelfAttention.o", (H, H), "o"),
        ("decoder.block.1.layer.1.EncDecAttention.k", (H, H), "k"),
        ("encoder.layer.0.intermediate.dense", (F, H), "up"),
        ("encoder.layer.0.output.dense", (H, F), "down"),
        ("encoder.layer.0.attention.output.dense", (H, H), "o"),
        ("encoder.layer.0.crossattention.output.dense", (H, H), "o"),
        ("encoder.layer.0.attention.self.query", (H, H), "q"),
        ("encoder.layer.0.bottleneck.attention.dense", (8, H), "other"),  # MobileBERT's way into its attention
        ("transformer.layer.0.ffn.lin1", (F, H), "up"),
        ("transformer.layer.0.ffn.lin2", (H, F), "down"),
        ("transformer.layer.0.attention.out_lin", (H, H), "o"),
        ("encoder.layers.0.positionwise_feedforward.fc_1", (F, H), "up"),
        ("embed_tokens", (99, H), "embed"),
        ("wpe", (99, H), "embed"),
        ("embeddings.word_embeddings", (99, H), "embed"),
        ("lm_head", (99, H), "head"),
        ("cls.predictions.decoder", (99, H), "head"),
        ("pooler.dense", (H, H), "other"),
        ("layers.3.input_layernorm", (H,), "other"),
        ("layers.3.mlp.up_proj", (F,), "other"),
        ("layers.3.mamba.in_proj", (F, H), "other"),
        ("layers.3.mlp.up_proj.lora_A", (4, H), "other"),
        ("layers.3.mlp.up_proj.base_layer", (F, H), "up"),
        ("conv1", (F, H, 3), "other"),
    ],
)
def test_the_names_of_a_family_tell_its_roles(stem, shape, role, prefix, suffix):
    assert find_layout(prefix + stem + suffix, shape) == Layout((Part(role),))


def test_every_answer_is_a_known_role():
    grouped = [role for group in GROUPS.values() for role in group]
    assert set(grouped) < set(ROLES) and len(set(grouped)) == len(grouped)


def take_part(stored: np.ndarray, layout: Layout, part: Part) -> np.ndarray:
    """The matrix of a part by plain index arithmetic, written from the words of `Block`."""
    if part.block is not None:
        b = part.block
        taken = [group * b.period + b.start + i for group in range(b.count) for i in range(b.size)]
        stored = np.take(stored, taken, axis=b.axis)
    return stored.T if layout.transposed else stored


def split(name: str, stored: np.ndarray, config: dict) -> dict[str, np.ndarray]:
    layout = find_layout(name, stored.shape, config)
    matrices = {part.role: take_part(stored, layout, part) for part in layout.parts}
    for part in layout.parts:
        assert matrix_shape(layout, part, stored.shape) == matrices[part.role].shape
        assert part.label in (None, f"half={part.role}", f"qkv={part.role}")
    return matrices


def marked(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape)


def test_phi3_fuses_gate_above_up():
    stored = marked((2 * F, H))
    parts = split("model.layers.0.mlp.gate_up_proj.weight", stored, {"model_type": "phi3", "hidden_size": H})
    assert (parts["gate"] == stored[:F]).all() and (parts["up"] == stored[F:]).all()


def test_phi3_fuses_queries_above_fewer_keys_and_values():
    config = {"model_type": "phi3", "hidden_size": H, "num_attention_heads": 6, "num_key_value_heads": 2}
    stored = marked(((6 + 2 + 2) * 4, H))
    parts = split("model.layers.0.self_attn.qkv_proj.weight", stored, config)
    assert (
        (parts["q"] == stored[:24]).all() and (parts["k"] == stored[24:32]).all() and (parts["v"] == stored[32:]).all()
    )


@pytest.mark.parametrize("config", [{"model_type": "gpt2", "n_embd": H, "n_head": 4}, {"model_type": "gpt2"}, None])
def test_gpt2_stores_its_weights_the_other_way_round(config: dict | None):
    assert find_layout("h.0.mlp.c_fc.weight", (H, F), config) == Layout((Part("up"),), transposed=True)
    assert find_layout("transformer.h.0.mlp.c_proj.weight", (F, H), config) == Layout((Part("down"),), transposed=True)
    stored = marked((H, 3 * H))
    parts = split("h.0.attn.c_attn.weight", stored, config)
    assert (parts["k"] == stored[:, H : 2 * H].T).all()
    assert list(parts) == ["q", "k", "v"]
    assert roles_of(find_layout("h.0.crossattention.c_attn.weight", (H, 2 * H), config)) == ["k", "v"]


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "starcoder2", "gpt_neo"])
def test_gpt2_names_of_linear_layers_are_not_transposed(model_type: str):
    config = {"model_type": model_type, "hidden_size": H}
    assert find_layout("h.0.mlp.c_fc.weight", (F, H), config) == Layout((Part("up"),))
    assert find_layout("h.0.mlp.c_proj.weight", (H, F), config) == Layout((Part("down"),))
    assert find_layout("h.0.mlp.c_proj.weight", (H, F)) == Layout((Part("down"),))


@pytest.mark.parametrize("name", ["h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight", "h.0.attn.c_proj.weight"])
def test_a_square_weight_of_two_orientations_has_two_layouts(name: str):
    base = find_layout(name, (H, H), {"model_type": "gpt2", "n_embd": H})
    fine_tuned = find_layout(name, (H, H), {"model_type": "gpt_neo", "hidden_size": H})
    assert base != fine_tuned and (base.transposed, fine_tuned.transposed) == (True, False)


def test_an_expansion_smaller_than_the_hidden_size_goes_by_the_hidden_size():
    config = {"model_type": "gpt2", "n_embd": F, "n_inner": H}
    assert find_layout("h.0.mlp.c_fc.weight", (F, H), config).transposed
    assert find_layout("h.0.mlp.c_proj.weight", (H, F), config).transposed


def test_gpt_neox_fuses_head_by_head():
    stored = marked((3 * H, H))
    config = {"model_type": "gpt_neox", "hidden_size": H, "num_attention_heads": 3}
    parts = split("gpt_neox.layers.0.attention.query_key_value.weight", stored, config)
    heads = stored.reshape(3, 3, 8, H)
    assert all((parts[role] == heads[:, i].reshape(H, H)).all() for i, role in enumerate("qkv"))


def test_a_fused_projection_is_whole_and_unknown_without_its_head_counts():
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    for config in (None, {"model_type": "gpt_neox", "hidden_size": H}, {"model_type": "unheard_of", "n_head": 3}):
        assert find_layout(name, (3 * H, H), config) == Layout((Part("other"),))
    wrong_heads = {"model_type": "gpt_bigcode", "multi_query": True, "n_embd": H, "n_head": 3}
    assert find_layout("h.0.attn.c_attn.weight", (3 * H, H), wrong_heads) == Layout((Part("other"),))


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, [(2, 40, 0, 24), (2, 40, 24, 8), (2, 40, 32, 8)]),
        ({"multi_query": True}, [(1, 64, 0, 48), (1, 64, 48, 8), (1, 64, 56, 8)]),
        ({"multi_query": False}, [(6, 24, 0, 8), (6, 24, 8, 8), (6, 24, 16, 8)]),
    ],
)
def test_falcon_has_three_ways_to_fuse(flags: dict, counts: list[tuple[int, ...]]):
    config = {"model_type": "falcon", "hidden_size": 48, "num_attention_heads": 6, **flags}
    rows = sum(count * size for count, _, _, size in counts)
    layout = find_layout("transformer.h.0.self_attention.query_key_value.weight", (rows, 48), config)
    assert [part.block for part in layout.parts] == [Block(0, *count) for count in counts]


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.experts.gate_up_proj", "layers.0.block_sparse_moe.input_linear.weight"]
)
def test_stacked_experts_stored_out_in(name: str):
    layout = find_layout(name, (4, 2 * F, H), {"model_type": "qwen3_moe", "hidden_size": H})
    halves = (Part("gate", "half=gate", Block(0, 1, 2 * F, 0, F)), Part("up", "half=up", Block(0, 1, 2 * F, F, F)))
    assert layout == Layout(halves, stacked=True)
    assert [matrix_shape(layout, part, (4, 2 * F, H)) for part in layout.parts] == [(F, H), (F, H)]


def test_stacked_experts_stored_in_out():
    config = {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "hidden_size": H}}
    layout = find_layout("language_model.model.layers.0.feed_forward.experts.gate_up_proj", (4, H, 2 * F), config)
    halves = (Part("gate", "half=gate", Block(1, 1, 2 * F, 0, F)), Part("up", "half=up", Block(1, 1, 2 * F, F, F)))
    assert layout == Layout(halves, transposed=True, stacked=True)
    assert [matrix_shape(layout, part, (4, H, 2 * F)) for part in layout.parts] == [(F, H), (F, H)]
    down = find_layout("language_model.model.layers.0.feed_forward.experts.down_proj", (4, F, H), config)
    assert down == Layout((Part("down"),), transposed=True, stacked=True)
    assert matrix_shape(down, down.parts[0], (4, F, H)) == (H, F)


def test_gpt_oss_interleaves_gate_and_up_and_is_square():
    config = {"model_type": "gpt_oss", "hidden_size": H, "intermediate_size": H}
    layout = find_layout("model.layers.0.mlp.experts.gate_up_proj", (4, H, 2 * H), config)
    evens, odds = Block(1, H, 2, 0, 1), Block(1, H, 2, 1, 1)
    assert layout == Layout((Part("gate", "half=gate", evens), Part("up", "half=up", odds)), True, True)
    assert find_layout("model.layers.0.mlp.experts.down_proj", (4, H, H), config).transposed
    assert roles_of(find_layout("model.layers.0.mlp.experts.gate_up_proj_blocks", (4, H, 2 * H), config)) == ["other"]


def test_square_stacked_experts_of_an_unheard_of_model_are_left_alone():
    for model_type in ("unheard_of", "qwen3_vl_moe_text"):
        config = {"model_type": model_type, "hidden_size": H}
        assert roles_of(find_layout("model.layers.0.mlp.experts.gate_up_proj", (4, H, H), config)) == ["other"]
    assert roles_of(find_layout("model.layers.0.mlp.experts.gate_up_proj", (4, 2 * F, H), None)) == ["other"]
    olmoe = {"model_type": "olmoe", "hidden_size": H}
    assert roles_of(find_layout("model.layers.0.mlp.experts.gate_up_proj", (4, H, H), olmoe)) == ["gate", "up"]


def test_in_out_experts_of_an_unheard_of_model_are_left_alone():
    # Side by side as in Llama 4 or interleaved as in gpt-oss: nothing tells.
    config = {"model_type": "unheard_of", "hidden_size": H}
    assert roles_of(find_layout("model.layers.0.mlp.experts.gate_up_proj", (4, H, 2 * F), config)) == ["other"]
    assert roles_of(find_layout("model.layers.0.mlp.experts.down_proj", (4, F, H), config)) == ["down"]


def test_one_name_for_two_halves_is_split_only_where_the_order_is_known():
    name = "model.decoder.layers.0.mlp.fc1.weight"
    for model_type, roles in (("moonshine", ["up", "gate"]), ("unheard_of", ["other"])):
        config = {"model_type": model_type, "hidden_size": H, "intermediate_size": F}
        assert roles_of(find_layout(name, (2 * F, H), config)) == roles
        assert roles_of(find_layout(name, (F, H), config)) == ["up"]
    moshi = {"model_type": "moshi", "hidden_size": H, "ffn_dim": 2 * F}
    assert roles_of(find_layout(name, (2 * F, H), moshi)) == ["gate", "up"]


@pytest.mark.parametrize("config", [None, {"model_type": "unheard_of", "hidden_size": H}, {"model_type": "unheard_of"}])
def test_an_fc1_that_leads_back_to_the_stream_is_no_up_projection(config):
    # Some vision towers number from zero: fc0 leads out and fc1 back.
    name = "vision_tower.encoder.blocks.0.mlp.fc1.weight"
    assert roles_of(find_layout(name, (H, F), config)) == ["other"]
    assert roles_of(find_layout(name, (F, H), config)) == ["up"]


def test_dbrx_keeps_its_experts_below_each_other():
    config = {"model_type": "dbrx", "d_model": H, "ffn_config": {"moe_num_experts": 2}}
    layout = find_layout("transformer.blocks.0.ffn.experts.mlp.w2", (2 * F, H), config)
    blocks = (Block(0, 1, 2 * F, 0, F), Block(0, 1, 2 * F, F, F))
    assert layout.parts == (Part("down", "expert=0", blocks[0]), Part("down", "expert=1", blocks[1]))
    assert [matrix_shape(layout, part, (2 * F, H)) for part in layout.parts] == [(H, F)] * 2


def test_metas_short_names_mean_nothing_in_a_vision_tower():
    config = {"model_type": "unheard_of", "hidden_size": H}
    name = "vision_model.transformer.resblocks.0.feed_forward.w1.weight"
    assert roles_of(find_layout(name, (F, H), config)) == ["other"]


def test_a_vision_tower_is_read_by_its_own_config():
    config = {
        "model_type": "phi3_v",
        "text_config": {"model_type": "phi3", "hidden_size": H, "num_attention_heads": 3},
        "vision_config": {"model_type": "gpt2", "n_embd": F},
    }
    assert find_layout("vision_tower.h.0.mlp.c_fc.weight", (F, F), config).transposed
    assert not find_layout("language_model.h.0.mlp.c_fc.weight", (H, H), config).transposed


@given(
    heads=st.integers(1, 5),
    groups=st.integers(1, 3),
    size=st.integers(1, 4),
    columns=st.integers(1, 4),
    flavour=st.sampled_from(["per head", "in a row", "grouped"]),
)
def test_the_parts_of_a_fused_projection_cover_it_once(heads, groups, size, columns, flavour):
    config = {"hidden_size": 7, "num_attention_heads": heads * groups, "num_key_value_heads": heads, "head_dim": size}
    config |= {"per head": {"model_type": "bloom"}, "in a row": {"model_type": "phi3"}}.get(
        flavour, {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": heads}
    )
    rows = size * (3 * heads * groups if flavour == "per head" else heads * (groups + 2))
    stored = marked((rows, columns))
    name = "h.0.self_attention." + ("qkv_proj" if flavour == "in a row" else "query_key_value")
    parts = split(name, stored, config)
    assert sorted(entry for part in parts.values() for entry in part.flat) == list(stored.flat)
    assert parts["k"].shape == parts["v"].shape


UP, DOWN, FUSED = (F, H), (H, F), (2 * F, H)
SIZES = {"hidden_size": H, "intermediate_size": F}


@pytest.mark.parametrize(
    ("module", "shapes", "config", "roles"),
    [
        ("mlp", {"gate_proj": UP, "up_proj": UP, "down_proj": DOWN}, None, "gate up down"),
        ("mlp", {"gate_up_proj": FUSED, "down_proj": DOWN}, None, "gate+up down"),
        ("mlp.experts", {"gate_up_proj": (4, *FUSED), "down_proj": (4, *DOWN)}, SIZES, "gate+up down"),
        ("feed_forward", {"w1": UP, "w2": DOWN, "w3": UP}, None, "gate down up"),
        ("layers.0", {"fc1": UP, "fc2": DOWN}, None, "up down"),
        ("layers.0", {"intermediate.dense": UP, "output.dense": DOWN}, None, "up down"),
        ("mlp", {"c_fc": DOWN, "c_proj": UP}, {"model_type": "gpt2", "n_embd": H}, "up down"),
        ("self_mlp", {"fc1": (2 * H, 2 * H), "fc2": (H, 2 * H)}, None, "up down"),  # LightGlue reads two streams
        # Phi-3-small interleaves gate and up; others fuse them in an order that only their code tells.
        ("mlp", {"up_proj": FUSED, "down_proj": DOWN}, {**SIZES, "model_type": "phi3small"}, "other down"),
        ("mlp", {"dense_h_to_4h": FUSED, "dense_4h_to_h": DOWN}, None, "other down"),
        ("mlp", {"linear_fc1": FUSED}, SIZES, "other"),
        ("mlp", {"fc1": FUSED, "fc2": DOWN}, None, "other down"),
        ("experts.0", {"linear_v": UP, "linear_1": DOWN}, SIZES, "other other"),  # Grok-1
        ("mlp", {"fc_1": UP, "fc_2": UP, "proj": DOWN}, None, "other other other"),  # LitGPT: gate, up, down
        ("ff", {"fc1": UP, "fc2": UP, "fc3": DOWN}, None, "other other other"),
        ("ff", {"fc1": (H, H), "fc2": (H, H), "fc3": (H, H)}, None, "other other other"),
        ("feed_forward", {"linear_1": UP, "linear_2": DOWN, "linear_3": UP}, None, "other other other"),  # Lumina
        ("ffn", {"w12": FUSED, "w3": DOWN}, None, "gate+up other"),  # NeoBERT
        # What says by its name what it is, is believed: pruned and widened models have sizes of their own.
        ("mlp", {"gate_proj": UP, "up_proj": FUSED, "down_proj": DOWN}, None, "gate up down"),
        ("mlp", {"gate_proj": UP, "up_proj": UP, "down_proj": UP}, None, "gate up down"),
        ("mlp", {"up_proj": (2 * H, H), "down_proj": (2 * H, H)}, None, "up down"),
    ],
)
def test_the_matrices_of_one_ffn_must_fit_each_other(module: str, shapes: dict, config: dict | None, roles: str):
    named = {f"model.layers.3.{module}.{leaf}.weight": shape for leaf, shape in shapes.items()}
    layouts = find_layouts(named, config).values()
    assert " ".join("+".join(roles_of(layout)) for layout in layouts) == roles


def test_a_refuted_role_leaves_the_orientation():
    layouts = find_layouts({"h.0.mlp.c_fc.weight": (H, 2 * F), "h.0.mlp.c_proj.weight": (F, H)})
    assert list(layouts.values()) == [
        Layout((Part("other"),), transposed=True),
        Layout((Part("down"),), transposed=True),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "x.encoder", "encoder.decoder", "layers.0.mlp.up_proj.weight"])
def test_a_config_may_have_any_depth_and_a_tensor_the_name_of_a_part(name: str):
    deep: dict = {}
    for _ in range(5000):
        deep = {"text_config": deep, "encoder": deep, "decoder": deep}
    assert len(find_layout(name, (F, H), deep).parts) == 1
    assert find_layout("encoder." * 5000 + "mlp.up_proj", (F, H), deep) == Layout((Part("up"),))
