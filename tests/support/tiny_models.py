"""Tiny random models of the architectures that transformers knows, with sizes that differ pairwise.

A default config is shrunk key by key, so that a matrix shows by its shape what it connects: hidden size, FFN width,
heads times head size, vocabulary and number of experts are all different.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

# First match wins; the value replaces any positive integer under that key, at any depth of the config.
SIZES: tuple[tuple[str, int], ...] = (
    (r"moe_.*intermediate_size|expert_ffn_hidden_size|.*expert_dim|moe_ffn_dim|intermediate_size_expert", 10),
    (r".*shared.*intermediate_size|shared_expert_.*size", 14),
    (
        r".*intermediate_size\w*|.*ffn_dim\w*|n_inner|d_ff|dff|dim_ff|d_inner|.*ffn_hidden_size|.*feedforward\w*|mlp_dim|ffn_size",
        56,
    ),
    (r"num_.*key_value_heads|num_kv_heads|n_head_kv|kv_n_heads|.*num_key_value_heads", 2),
    (r"(.*_)?(num_attention_heads|attention_heads|n_heads?|num_heads|heads)", 4),
    (r"q_lora_rank", 12),
    (r"kv_lora_rank", 14),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|.*head_dim|d_kv|attention_head_size", 16),
    (r"(hidden_size|n_embd|d_model|dim|embed_dim|hidden_dim|embedding_size|word_embed_proj_dim|d_embed|emb_dim)", 48),
    (r"(.*_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|num_decoder_layers|depth)", 4),
    (r"vocab_size\w*|.*_vocab_size", 97),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|max_source_positions", 64),
    (r"num_experts_per_tok|moe_topk|moe_top_k|num_selected_experts|top_k_experts|moe_k", 2),
    (r"num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_routed_experts|.*num_experts", 3),
    (r"n_group|topk_group|n_shared_experts|moe_num_shared_experts|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
)
# What the config derives from the sizes when it is not given.
DERIVED = frozenset(["layer_types", "mlp_layer_types", "layers_block_type", "per_layer_config", "id2label", "label2id"])
# What some configs leave open although their models need it.
WANTED = {"head_dim": 16, "n_routed_experts": 3, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_inner": 22}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_n_groups": 1, "mamba_d_ssm": 96}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "output_gate_type": "sigmoid",
    "ple_embed_dim": 8,
}
# What one architecture asks for beyond its sizes; a key is set wherever the config has it.
ASKED: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "blt": {"encoder_hash_byte_group_vocab": 31, "encoder_hash_byte_group_size": [2, 3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cpmant": {"prompt_types": 2, "segment_types": 4, "prompt_length": 4},
    "dots1": {"n_group": 1, "topk_group": 1},
    "falcon_h1": _MAMBA,
    "gemma3n": {"num_kv_shared_layers": 0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _MAMBA,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 24, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 32]},
    "xlnet": {"d_head": 12},
    "dbrx": {"kv_n_heads": 2, "clip_qkv": 8.0},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note": {"num_key_value_heads": 4},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba"], **_MAMBA},
    "zaya": {"num_experts_per_tok": 1},
}


def ask(values: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """`values` with what is asked, in the config itself and in those inside it that have the key."""
    inner = {key: ask(value, asked) for key, value in values.items() if isinstance(value, dict)}
    return {**values, **inner, **{key: value for key, value in asked.items() if key in values}}


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """A config as a dict, with small sizes; lists that follow from the number of layers are left to be derived."""
    small: dict[str, Any] = {}
    layers = next((value for key, value in values.items() if re.fullmatch(r"num_(hidden_)?layers|n_layer", key)), None)
    for key, value in values.items():
        size = next((size for pattern, size in SIZES if re.fullmatch(pattern, str(key))), None)
        if key in DERIVED or not isinstance(key, str):
            continue
        if isinstance(value, dict):
            small[key] = shrink(value)
        elif value is None and key in WANTED:
            small[key] = WANTED[key]
        elif isinstance(value, list) and len(value) == layers and layers > 4:
            if size is not None:
                small[key] = size
        elif not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            small[key] = value
        elif "token" in key and re.search(r"_(id|index)$", key):
            small[key] = min(value, 1)
        else:
            small[key] = value if size is None else min(size, value) if key.endswith("layers") else size
    return small


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The default config of a model type, shrunk."""
    kind = CONFIG_MAPPING[model_type]
    values = kind().to_dict()
    small = ask(shrink(values), ASKED.get(model_type, {}))
    derived = {key: value for key, value in ASKED.get(model_type, {}).items() if key in DERIVED}
    for key in ("transformers_version", "model_type"):
        small.pop(key, None)
    config = kind(**{**small, **derived, **overrides})
    if model_type == "dbrx":
        config.attn_config.rope_theta = 10000.0  # its attention reads it, its config does not define it
    return config


def tiny_model(class_name: str, config: PretrainedConfig) -> PreTrainedModel:
    """A model with random weights; of a composite config the part that the class asks for."""
    torch.manual_seed(0)
    kind = getattr(transformers, class_name)
    inner = [getattr(config, name, None) for name in ("text_config", "decoder")]
    fitting = [one for one in (config, *inner) if type(one) is kind.config_class]
    config = fitting[0] if fitting else config
    return kind._from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
