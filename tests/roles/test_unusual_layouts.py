"""Layouts at the edges of the rules: square matrices, odd sizes, sizes that say nothing, configs inside configs."""

from __future__ import annotations

from typing import Any

import pytest

from pome.roles.families import FAMILIES
from pome.roles.feed_forward import find_refuted
from pome.roles.layout import Block, Layout, Part
from pome.roles.model_config import (
    config_of,
    expert_count_of,
    head_size_of,
    hidden_size_of,
    intermediate_size_of,
    query_heads_of,
    size_of,
)
from pome.roles.names import module_path
from pome.roles.pairing import CROWD, pair_names
from pome.roles.roles import find_layout, find_layouts

H, F = 24, 56  # hidden and intermediate size
OTHER = Layout((Part("other"),))


def blocks(name: str, shape: tuple[int, ...], config: dict[str, Any] | None) -> dict[str, tuple[int, ...]]:
    """Role -> (axis, count, period, start, size) of a fused tensor."""
    found = {}
    for part in find_layout(name, shape, config).parts:
        assert part.block is not None and part.label in (f"qkv={part.role}", f"half={part.role}")
        b = part.block
        found[part.role] = (b.axis, b.count, b.period, b.start, b.size)
    return found


CONV1D = ["clvp_decoder", "decision_transformer", "gpt-sw3", "gpt2", "imagegpt", "openai-gpt"]


@pytest.mark.parametrize("model_type", [*CONV1D, "gpt_neo", "gpt_bigcode", "unheard_of"])
def test_a_square_matrix_of_gpt2s_names_goes_by_the_model_type(model_type: str) -> None:
    config = {"model_type": model_type, "n_embd": H, "n_head": 3, "multi_query": False}
    turned = model_type in CONV1D
    assert find_layout("h.0.mlp.c_fc.weight", (H, H), config) == Layout((Part("up"),), turned)
    assert find_layout("h.0.mlp.c_proj.weight", (H, H), config) == Layout((Part("down"),), turned)
    assert find_layout("h.0.attn.c_proj.weight", (H, H), config) == Layout((Part("o"),), turned)
    assert find_layout("h.0.crossattention.q_attn.weight", (H, H), config) == Layout((Part("q"),), turned)


@pytest.mark.parametrize("hidden", [None, H])
def test_without_a_model_type_the_sizes_tell_and_a_square_is_out_in(hidden: int | None) -> None:
    config = None if hidden is None else {"hidden_size": hidden}
    for rows, columns, turned in ((H, F, True), (F, H, False), (H, H, False)):
        assert find_layout("h.0.mlp.c_fc.weight", (rows, columns), config).transposed is turned
        assert find_layout("h.0.mlp.c_proj.weight", (columns, rows), config).transposed is turned
        assert find_layout("h.0.attn.c_proj.weight", (columns, rows), config).transposed is turned


def test_a_hidden_size_that_neither_side_has_tells_nothing() -> None:
    for config in ({"hidden_size": 7}, {"model_type": "gpt2", "n_embd": 7}):
        known = "model_type" in config
        assert find_layout("h.0.mlp.c_fc.weight", (F, H), config).transposed is known
    wider = {"hidden_size": 40}  # between the two
    assert find_layout("h.0.mlp.c_fc.weight", (F, H), wider) == Layout((Part("up"),))
    assert find_layout("h.0.mlp.c_fc.weight", (H, F), wider) == Layout((Part("up"),), transposed=True)


def test_gpt2s_fused_attention_is_cut_along_its_columns() -> None:
    name, gpt2 = "h.0.attn.c_attn.weight", {"model_type": "gpt2", "n_embd": H, "n_head": 3}
    assert blocks(name, (H, 3 * H), gpt2) == {
        "q": (1, 1, 3 * H, 0, H), "k": (1, 1, 3 * H, H, H), "v": (1, 1, 3 * H, 2 * H, H)
    }  # fmt: skip
    assert blocks(name, (H, 2 * H), gpt2) == {"k": (1, 1, 2 * H, 0, H), "v": (1, 1, 2 * H, H, H)}
    assert find_layout(name, (H, 4 * H), gpt2) == Layout((Part("other"),), transposed=True)


def test_gpt_bigcodes_c_attn_is_cut_along_its_rows() -> None:
    config = {"model_type": "gpt_bigcode", "n_embd": H, "n_head": 3}
    name, rows = "h.0.attn.c_attn.weight", H + 2 * 8
    assert blocks(name, (rows, H), config) == {
        "q": (0, 1, rows, 0, H), "k": (0, 1, rows, H, 8), "v": (0, 1, rows, H + 8, 8)
    }  # fmt: skip
    each = config | {"multi_query": False}
    assert blocks(name, (3 * H, H), each) == {"q": (0, 3, 24, 0, 8), "k": (0, 3, 24, 8, 8), "v": (0, 3, 24, 16, 8)}


def test_codegen_has_four_groups_with_values_before_keys() -> None:
    config = {"model_type": "codegen", "n_embd": 32, "n_head": 8}
    assert blocks("h.0.attn.qkv_proj.weight", (96, 32), config) == {
        "q": (0, 4, 24, 0, 8), "v": (0, 4, 24, 8, 8), "k": (0, 4, 24, 16, 8)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "few"),
    [
        ({"model_type": "mpt", "d_model": H, "n_heads": 6}, 6),
        ({"model_type": "mpt", "d_model": H, "n_heads": 6, "attn_config": {"kv_n_heads": 2}}, 2),
        ({"model_type": "dbrx", "d_model": H, "n_heads": 6, "attn_config": {"kv_n_heads": 3}}, 3),
        ({"model_type": "phi3", "hidden_size": H, "num_attention_heads": 6, "num_key_value_heads": 2}, 2),
        ({"model_type": "phi4_multimodal", "hidden_size": H, "num_attention_heads": 6, "num_key_value_heads": 1}, 1),
        ({"model_type": "modernbert", "hidden_size": H, "num_attention_heads": 6}, 6),
        ({"model_type": "modernbert-decoder", "hidden_size": H, "num_attention_heads": 6}, 6),
    ],
)
def test_queries_keys_and_values_in_a_row(config: dict[str, Any], few: int) -> None:
    rows = (6 + 2 * few) * 4
    assert blocks("layers.0.attn.Wqkv.weight", (rows, H), config) == {
        "q": (0, 1, rows, 0, 24), "k": (0, 1, rows, 24, 4 * few), "v": (0, 1, rows, 24 + 4 * few, 4 * few)
    }  # fmt: skip
    assert find_layout("layers.0.attn.Wqkv.weight", (rows + 4, H), config) == OTHER


@pytest.mark.parametrize(
    "model_type",
    ["bloom", "fuyu", "gpt_neox", "gpt_neox_japanese", "persimmon", "minimax", "falcon", "RefinedWebModel"],
)
def test_heads_one_after_the_other(model_type: str) -> None:
    config = {"model_type": model_type, "hidden_size": H, "num_attention_heads": 3, "multi_query": False}
    assert blocks("h.0.self_attention.query_key_value.weight", (72, H), config) == {
        "q": (0, 3, 24, 0, 8), "k": (0, 3, 24, 8, 8), "v": (0, 3, 24, 16, 8)
    }  # fmt: skip


def test_falcons_defaults_are_those_of_its_releases() -> None:
    """7B (multi-query) says nothing or `multi_query`; RefinedWeb is the name of 40B before transformers had Falcon."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6}
    name = "transformer.h.0.self_attention.query_key_value.weight"
    one = {"q": (0, 1, 64, 0, 48), "k": (0, 1, 64, 48, 8), "v": (0, 1, 64, 56, 8)}
    for model_type in ("falcon", "RefinedWebModel"):
        assert blocks(name, (64, 48), {"model_type": model_type, **sizes}) == one
    grouped = {"q": (0, 2, 40, 0, 24), "k": (0, 2, 40, 24, 8), "v": (0, 2, 40, 32, 8)}
    assert blocks(name, (80, 48), {"model_type": "RefinedWeb", "n_head_kv": 2, **sizes}) == grouped
    each = {"q": (0, 6, 24, 0, 8), "k": (0, 6, 24, 8, 8), "v": (0, 6, 24, 16, 8)}
    assert blocks(name, (144, 48), {"model_type": "RefinedWeb", **sizes}) == each  # a key head for each query head


def test_queries_with_a_gate_beside_them_are_left_alone() -> None:
    config = {"hidden_size": 12, "num_attention_heads": 3, "head_dim": 5}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert find_layout(name, (30, 12), config) == OTHER
    assert find_layout(name, (15, 12), config) == Layout((Part("q"),))
    assert find_layout(name, (60, 12), config) == Layout((Part("q"),))
    assert find_layout(name.replace("q_proj", "k_proj"), (30, 12), config) == Layout((Part("k"),))
    assert find_layout(name, (30, 12), {"hidden_size": 12}) == Layout((Part("q"),))


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("self_attn.dense", "o"), ("attention.self.key", "k"), ("attn.to_out", "o"), ("attn.Wo", "o"),
        ("decoder.dense", "other"), ("x.query", "other"), ("query", "other"), ("mlp.attention.proj", "o"),
        ("attn.attention.out_proj", "o"), ("attention.mlp.out_proj", "other"), ("cross_attn.v", "v"),
    ],
)  # fmt: skip
def test_short_names_mean_something_right_inside_an_attention_only(path: str, role: str) -> None:
    assert find_layout(f"layers.1.{path}.weight", (H, H)) == Layout((Part(role),))


def test_stacked_experts_by_name_and_module() -> None:
    config = {"model_type": "mixtral", "hidden_size": H}
    up, fused, down = (4, F, H), (4, 2 * F, H), (4, H, F)
    halves = {"gate": (0, 1, 2 * F, 0, F), "up": (0, 1, 2 * F, F, F)}
    for module in ("mlp.experts", "moe", "block_sparse_moe.experts", "x.local_experts"):
        assert find_layout(f"layers.0.{module}.up_proj", up, config) == Layout((Part("up"),), stacked=True)
        assert find_layout(f"layers.0.{module}.gate_proj", up, config) == Layout((Part("gate"),), stacked=True)
        assert find_layout(f"layers.0.{module}.down_proj", down, config) == Layout((Part("down"),), stacked=True)
        assert find_layout(f"layers.0.{module}.w2_weight", down, config) == Layout((Part("down"),), stacked=True)
        assert blocks(f"layers.0.{module}.gate_up_proj", fused, config) == halves
    for module in ("block_sparse_moe", "mlp"):
        assert blocks(f"layers.0.{module}.input_linear.weight", fused, config) == halves
        assert find_layout(f"layers.0.{module}.output_linear.weight", down, config) == Layout(
            (Part("down"),), stacked=True
        )
    for name in ("layers.0.mlp.up_proj", "layers.0.experts.input_linear", "layers.0.experts.bias", "up_proj", "moe"):
        assert find_layout(name, up, config) == OTHER
    assert find_layout("layers.0.self_attn.experts.up_proj", up, config) == OTHER


def test_vllms_w13_interleaves_its_halves() -> None:
    layout = find_layout("layers.0.moe.w13_weight", (4, 2 * F, H), {"hidden_size": H})
    assert blocks("layers.0.moe.w13_weight", (4, 2 * F, H), {"hidden_size": H}) == {
        "gate": (0, F, 2, 0, 1), "up": (0, F, 2, 1, 1)
    }  # fmt: skip
    assert (layout.transposed, layout.stacked) == (False, True)


def test_an_odd_number_of_rows_has_no_halves() -> None:
    config = {"model_type": "mixtral", "hidden_size": H}
    assert find_layout("layers.0.mlp.experts.gate_up_proj", (4, 2 * F + 1, H), config) == OTHER
    assert find_layout("layers.0.mlp.gate_up_proj.weight", (2 * F + 1, H), config) == OTHER
    llama4 = {"model_type": "llama4_text", "hidden_size": H}
    assert find_layout("layers.0.mlp.experts.gate_up_proj", (4, H, 2 * F + 1), llama4) == OTHER


def test_arias_experts_have_names_of_their_own() -> None:
    config = {"model_type": "aria_text", "hidden_size": H}
    assert blocks("layers.0.mlp.experts.fc1.weight", (4, H, 2 * F), config) == {
        "gate": (1, 1, 2 * F, 0, F), "up": (1, 1, 2 * F, F, F)
    }  # fmt: skip
    down = find_layout("layers.0.mlp.experts.fc2.weight", (4, F, H), config)
    assert down == Layout((Part("down"),), transposed=True, stacked=True)
    assert find_layout("layers.0.mlp.experts.fc1.weight", (4, H, 2 * F), {"hidden_size": H}) == OTHER


@pytest.mark.parametrize(
    ("leaf", "order"),
    [("gate_up_proj", "gate up"), ("up_gate_proj", "up gate"), ("w12", "gate up"), ("weights_in", "gate up")],
)
def test_fused_names_say_their_order(leaf: str, order: str) -> None:
    halves = blocks(f"layers.0.mlp.{leaf}.weight", (2 * F, H), None)
    assert list(halves) == order.split()
    assert list(halves.values()) == [(0, 1, 2 * F, 0, F), (0, 1, 2 * F, F, F)]


def test_modernbert_fuses_under_a_name_that_others_use_for_the_up_projection() -> None:
    config = {"model_type": "modernbert", "hidden_size": H}
    assert list(blocks("layers.0.mlp.Wi.weight", (2 * F, H), config)) == ["gate", "up"]
    assert find_layout("layers.0.mlp.Wo.weight", (H, F), config) == Layout((Part("down"),))
    assert find_layout("layers.0.mlp.Wi.weight", (2 * F, H)) == OTHER


def test_names_of_single_families_mean_nothing_elsewhere() -> None:
    ctrl, rwkv = {"model_type": "ctrl", "n_embd": H}, {"model_type": "rwkv", "hidden_size": H}
    assert find_layout("h.0.ffn.0.weight", (F, H), ctrl) == Layout((Part("up"),))
    assert find_layout("h.0.ffn.2.weight", (H, F), ctrl) == Layout((Part("down"),))
    assert find_layout("blocks.0.feed_forward.key.weight", (F, H), rwkv) == Layout((Part("up"),))
    assert find_layout("blocks.0.feed_forward.value.weight", (H, F), rwkv) == Layout((Part("down"),))
    for name in ("h.0.ffn.0.weight", "blocks.0.feed_forward.key.weight"):
        assert find_layout(name, (F, H)) == OTHER


def test_experts_below_each_other_need_a_count_that_divides_the_rows() -> None:
    name = "transformer.blocks.0.ffn.experts.mlp.v1"
    three = {"model_type": "dbrx", "d_model": H, "ffn_config": {"moe_num_experts": 3}}
    layout = find_layout(name, (3 * F, H), three)
    assert layout == Layout(
        tuple(Part("up", f"expert={i}", Block(0, 1, 3 * F, i * F, F)) for i in range(3)), transposed=False
    )
    assert find_layout(name, (3 * F + 1, H), three) == OTHER
    assert find_layout(name, (3 * F, H), {"model_type": "dbrx", "d_model": H}) == OTHER


@pytest.mark.parametrize(
    ("shape", "config", "role"),
    [
        ((8, H), {"num_experts": 8}, "router"),
        ((9, H), {"num_experts": 8}, "router"),  # in an MoE nothing else is called a gate
        ((8, H), None, "router"),
        ((H, H), None, "other"),
        ((1024, 1025), None, "router"),
        ((1025, 1026), None, "other"),
        ((H, 8), None, "other"),
    ],
)
def test_a_gate_chooses_experts_where_it_has_few_rows(shape: tuple[int, int], config: Any, role: str) -> None:
    assert find_layout("layers.0.mlp.gate.weight", shape, config) == Layout((Part(role),))


@pytest.mark.parametrize(
    ("leaf", "shape", "role"),
    [("w1", (F, H), "gate"), ("w1", (F, H + 1), "other"), ("w2", (H, F), "down"), ("w2", (H + 1, F), "other"),
     ("w3", (F, H), "up"), ("w3", (H, F), "other")],
)  # fmt: skip
def test_metas_names_must_lead_out_of_the_stream_and_back(leaf: str, shape: tuple[int, int], role: str) -> None:
    assert find_layout(f"layers.0.feed_forward.{leaf}.weight", shape, {"hidden_size": H}) == Layout((Part(role),))


@pytest.mark.parametrize(
    ("shape", "hidden", "role"),
    [((F, H), None, "up"), ((H, F), None, "other"), ((H, H), None, "up"), ((H, H), H, "up"), ((F, H), H, "up"),
     ((H, F), H, "other"), ((H, F), F, "up"), ((F, H), F, "other"), ((F, H), 7, "up"), ((H, F), 7, "other")],
)  # fmt: skip
def test_an_up_projection_of_a_number_leads_out(shape: tuple[int, int], hidden: int | None, role: str) -> None:
    assert find_layout("layers.0.mlp.fc1.weight", shape, {"hidden_size": hidden}) == Layout((Part(role),))


def test_bare_names_count_inside_a_layer() -> None:
    for name, role in {
        "layers.0.fc1": "up", "fc1": "other", "model.fc1": "other", "up_proj": "up", "model.up_proj": "other",
        "layers.0.up_proj": "up", "layers.0.intermediate.dense": "up", "intermediate.dense": "other",
        "expert_3.up_proj": "up", "layer_3.fc1": "up", "block_3.lin1": "up", "layers.0.ffn": "up",
        "layers.0.wi": "other",
    }.items():  # fmt: skip
        assert find_layout(f"{name}.weight", (F, H)) == Layout((Part(role),)), name


def test_embeddings_and_heads_lie_outside_of_layers() -> None:
    for name, role in {
        "shared": "embed", "a.wte": "embed", "layers.0.wte": "other", "score": "head", "x.classifier": "head",
        "layers.0.score": "other", "cls.predictions.decoder": "head", "bert.cls.predictions.decoder": "head",
        "xcls.predictions.decoder": "other", "predictions.decoder": "other", "lm_head.decoder": "head",
        "lm_head.dense": "other", "decoder": "other",
    }.items():  # fmt: skip
        assert find_layout(f"{name}.weight", (99, H)) == Layout((Part(role),)), name


def test_the_last_module_around_a_matrix_decides() -> None:
    assert find_layout("layers.0.mlp.attention.q_proj.weight", (H, H)) == Layout((Part("q"),))
    assert find_layout("layers.0.attention.mlp.up_proj.weight", (F, H)) == Layout((Part("up"),))
    assert find_layout("layers.0.attention.norm.up_proj.weight", (F, H)) == OTHER
    assert find_layout("layers.0.qkv.up_proj.weight", (F, H)) == OTHER  # an adapter on a fused projection
    assert find_layout("weight", (F, H)) == OTHER
    assert find_layout("layers.0.mlp.up_proj", (2, 2, F, H)) == OTHER


def test_wrappers_of_a_linear_layer_are_no_part_of_its_path() -> None:
    assert module_path("a.b.weight") == module_path("a.b") == module_path("a.b.linear.weight") == ("a", "b")
    assert module_path("a.b.base_layer.weight") == ("a", "b")
    assert module_path("linear.weight") == ("linear",) and module_path("weight") == ()
    assert module_path("a.linear.base_layer") == ("a",)


@pytest.mark.parametrize("value", [None, 0, -1, True, "8", 8.0, [8]])
def test_a_size_is_a_positive_integer_or_none(value: Any) -> None:
    assert size_of({"a": value, "b": 7}, "a", "b") == 7
    assert size_of({"a": value}, "a") is None
    assert size_of({"a": 1}, "a", "b") == 1 and size_of(None, "a") is None and size_of({"a": 1}) is None


def test_sizes_go_by_many_names_the_first_of_which_counts() -> None:
    assert [hidden_size_of({key: 5}) for key in ("hidden_size", "n_embd", "d_model", "dim", "embed_dim")] == [5] * 5
    widths = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "inner_dim")
    assert [intermediate_size_of({key: 5}) for key in widths] == [5] * 6
    assert [query_heads_of({k: 5}) for k in ("num_attention_heads", "n_head", "n_heads", "num_heads")] == [5] * 4
    counts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
    assert [expert_count_of({key: 5}) for key in counts] == [5] * 5
    assert expert_count_of({"num_experts": 5, "ffn_config": {"moe_num_experts": 4}}) == 4
    assert (
        expert_count_of({"num_experts": 5, "ffn_config": {}})
        == expert_count_of({"num_experts": 5, "ffn_config": 1})
        == 5
    )
    assert expert_count_of(None) is None
    assert hidden_size_of({"n_embd": 5, "hidden_size": 6}) == 6


def test_a_head_is_as_wide_as_is_said_or_as_the_stream_has_for_each() -> None:
    assert head_size_of({"hidden_size": 24, "n_head": 5}) == 4
    assert head_size_of({"hidden_size": 24, "n_head": 5, "head_dim": 7}) == 7
    assert head_size_of({"head_dim": 7}) == 7
    assert head_size_of({"hidden_size": 24}) is head_size_of({"n_head": 3}) is head_size_of(None) is None


def test_the_config_of_a_tower() -> None:
    text, vision, audio, talker = ({"model_type": kind} for kind in ("text", "vision", "audio", "talker"))
    whole = {"model_type": "whole", "text_config": text, "vision_config": vision, "audio_config": audio}
    assert config_of("model.layers.0.x", whole) == text
    assert config_of("model.visual.blocks.0.x", whole) == vision
    assert config_of("pixel_embed.x", whole) == vision and config_of("vit.x", whole) == vision
    assert config_of("vitamin.x", whole) == text
    assert config_of("whisper.x", whole) == audio
    assert config_of("talker.x", whole) is None  # a tower of which nothing is said
    assert config_of("talker.model.x", whole | {"talker_config": {"text_config": talker}}) == talker
    assert config_of("vision.x", {"model_type": "clip"}) == {"model_type": "clip"}  # a vision model by itself
    assert config_of("x", None) is None
    assert config_of("x", {"model_type": "m", "text_config": {"hidden_size": 4}}) == {
        "model_type": "m",
        "hidden_size": 4,
    }


def test_the_config_of_a_side() -> None:
    sides = {"encoder": {"hidden_size": 1}, "decoder": {"hidden_size": 2, "encoder": {"hidden_size": 3}}}
    assert config_of("encoder.layers.0.x", sides) == {"hidden_size": 1}
    assert config_of("model.decoder.layers.0.x", sides) == sides["decoder"]
    assert config_of("decoder.encoder.layers.0.x", sides) == {"hidden_size": 3}
    assert config_of("model.bert.encoder.x", sides) == sides  # too deep in the name to be a side of this config
    assert config_of("encoder.x", {"encoder": 3}) == {"encoder": 3}


def test_an_up_projection_of_twice_the_width_holds_the_gate_too() -> None:
    up, down = Layout((Part("up"),)), Layout((Part("down"),))
    names = ("a.up_proj.weight", "a.down_proj.weight")
    assert find_refuted(dict(zip(names, (up, down), strict=True)), {names[0]: (2 * F, H), names[1]: (H, F)}) == [
        names[0]
    ]
    assert find_refuted(dict(zip(names, (up, down), strict=True)), {names[0]: (F, H), names[1]: (H, F)}) == []
    assert find_refuted(dict(zip(names, (up, down), strict=True)), {names[0]: (3 * F, H), names[1]: (H, F)}) == []


def test_an_ending_that_a_crowd_shares_pairs_with_nothing() -> None:
    """One more than the crowd's limit of names that end alike, beside as many as the limit."""
    for count, paired in ((CROWD, 1), (CROWD + 1, 0)):
        base = {f"{'a.' * at}b.0.w": (4, 4) if at == 3 else (5, 5) for at in range(count)}
        assert len(pair_names(base, {"z.b.0.w": (4, 4)})) == paired


def test_a_shared_mlp_of_granite_is_fused_under_its_own_names() -> None:
    assert list(blocks("layers.0.shared_mlp.input_linear.weight", (2 * F, H), None)) == ["gate", "up"]
    assert find_layout("layers.0.shared_mlp.output_linear.weight", (H, F)) == Layout((Part("down"),))
    assert find_layout("layers.0.mlp.input_linear.weight", (2 * F, H)) == OTHER
    assert find_layout("layers.0.mlp.output_linear.weight", (H, F)) == OTHER
    assert find_layout("layers.0.shared_mlp.experts.input_linear.weight", (2 * F, H)) == OTHER


def test_phi4s_audio_tower_fuses_up_above_gate() -> None:
    name = "layers.0.mlp.gate_up_proj.weight"
    assert list(blocks(f"model.audio_embed.encoder.{name}", (2 * F, H), None)) == ["up", "gate"]
    assert list(blocks(f"model.image_embed.encoder.{name}", (2 * F, H), None)) == ["gate", "up"]
    assert list(blocks("audio_embed.layers.0.mlp.w12.weight", (2 * F, H), None)) == ["gate", "up"]


def test_a_checkpoint_may_be_one_ffn() -> None:
    for name, role in {"mlp.fc1": "up", "mlp.fc2": "down", "ffn.w_in.w_0": "gate", "mlp.gate": "other"}.items():
        assert find_layout(f"{name}.weight", (H, H)) == Layout((Part(role),)), name


def test_gpt_bigcodes_attention_stored_in_out_is_cut_along_its_columns() -> None:
    config = {"model_type": "gpt_bigcode", "n_embd": H, "n_head": 3}
    columns = H + 2 * 8
    assert blocks("h.0.attn.c_attn.weight", (H, columns), config) == {
        "q": (1, 1, columns, 0, H), "k": (1, 1, columns, H, 8), "v": (1, 1, columns, H + 8, 8)
    }  # fmt: skip


def test_a_plain_matrix_is_neither_turned_nor_stacked() -> None:
    layout = find_layout("layers.0.mlp.up_proj.weight", (F, H))
    assert (layout.transposed, layout.stacked) == (False, False)
    assert (OTHER.transposed, OTHER.stacked) == (False, False)


def test_matrices_are_compared_within_their_own_ffn() -> None:
    """The second one's sizes would refute the first one's roles, and the first one's the second's."""
    layer = "layers.0."
    shapes = {"mlp.fc1": (F, H), "mlp.fc2": (H, F), "ffn.fc1": (H, H), "ffn.fc2": (F, H)}
    found = find_layouts({f"{layer}{name}.weight": shape for name, shape in shapes.items()})
    assert [layout.parts[0].role for layout in found.values()] == ["up", "down", "up", "down"]


def test_berts_intermediate_and_output_are_one_ffn() -> None:
    layer = "encoder.layer.0."
    for rows, role in ((F, "up"), (2 * F, "other")):
        shapes = {f"{layer}intermediate.dense.weight": (rows, H), f"{layer}output.dense.weight": (H, F)}
        assert [layout.parts[0].role for layout in find_layouts(shapes).values()] == [role, "down"]


def test_experts_that_their_code_marks_as_in_out() -> None:
    """transformers sets `is_transposed` on these, and PEFT reads it."""
    marked = {model_type for model_type, family in FAMILIES.items() if family.marked_in_out}
    assert marked == {"aria_text", "gpt_oss", "openai_privacy_filter"}
