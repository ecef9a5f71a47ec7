"""What `config.json` says of one tensor: which part of it applies, its sizes, and what its model type implies.

The facts about single architectures live here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pome.roles.layout import Part, cut_runs

Config = Mapping[str, Any]

# Linear maps written as GPT-2's Conv1D: stored (in, out).
CONV1D = frozenset({"gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder"})

# Stacked experts stored (E, in, out).
EXPERTS_IN_OUT = frozenset({"llama4_text", "gpt_oss", "openai_privacy_filter", "aria_text"})
# Stacked experts stored (E, out, in). Only a tensor with equal sides asks: for any other the hidden size decides,
# as it must for qwen3_vl_moe, whose checkpoints exist both ways.
EXPERTS_OUT_IN = frozenset(
    " ".join(
        (
            "afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1",
            "ernie4_5_moe exaone_moe flex_olmo gemma4_text glm4_moe glm4_moe_lite glm4v_moe_text glm_moe_dsa",
            "granitemoe granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 jamba kimi_linear laguna lfm2_moe",
            "mimo_v2_flash minimax minimax_m2 mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe_text qwen3_moe",
            "qwen3_next qwen3_omni_moe_text solar_open",
        )
    ).split()
)
# Of those stored (E, in, out), the ones of which it is known how gate and up lie: side by side, if not interleaved.
EXPERTS_IN_OUT_HALVES = EXPERTS_IN_OUT | {"qwen3_vl_moe", "qwen3_vl_moe_text"}
# Gate and up alternate column by column instead of lying side by side.
EXPERTS_INTERLEAVED = frozenset({"gpt_oss"})

# One fused matrix under a name that elsewhere is the up projection: `fc1` (only where it has twice the rows of
# the FFN's width, but for moshi, whose config counts both halves) and the order of its halves.
FUSED_FC1 = {
    "moshi": ("gate", "up"),
    "moonshine": ("up", "gate"),
    "moonshine_streaming": ("up", "gate"),
}
FUSED_FC1_COUNTS_BOTH = frozenset({"moshi"})
# Names inside an FFN that mean something else everywhere else.
OWN_FFN_NAMES = {"rwkv": {"key": "up", "value": "down"}, "ctrl": {"0": "up", "2": "down"}}
DBRX_EXPERTS = {"w1": "gate", "v1": "up", "w2": "down"}
# `Wi` holds gate and up.
FUSED_WI = frozenset({"modernbert", "modernbert-decoder"})
# Stacked experts with `fc1` for gate and up, and `fc2` for down.
EXPERTS_FC = frozenset({"aria_text"})

# q, k, v of one head after each other, head by head.
QKV_PER_HEAD = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "fuyu", "minimax"})
# All of q, then all of k, then all of v; fewer key and value heads than query heads are allowed.
QKV_IN_A_ROW = frozenset({"phi3", "phi4_multimodal", "mpt", "dbrx", "modernbert", "modernbert-decoder"})

_TOWERS = (
    (re.compile(r"talker"), ("talker_config",)),
    (re.compile(r"vision|visual|image|(^|_)vit(_|$)|pixel"), ("vision_config", "vit_config")),
    (
        re.compile(r"audio|speech|sound|wav2vec|whisper"),
        ("audio_config", "speech_config", "sound_config", "audio_encoder_config"),
    ),
    (re.compile(r"qformer"), ("qformer_config",)),
)
_TEXT = ("thinker_config", "text_config", "llm_config", "language_config", "llm", "decoder_config")


def config_of(name: str, config: Config | None) -> Config | None:
    """The part of a (possibly multimodal) config about the tower in which `name` lies; None: not known."""
    tokens = name.split(".")
    while config is not None:
        for pattern, keys in _TOWERS:
            if any(pattern.search(token) for token in tokens):
                found = next((config[key] for key in keys if isinstance(config.get(key), Mapping)), None)
                if found is not None:
                    return config_of_text(found)
                if any(isinstance(config.get(key), Mapping) for key in _TEXT):
                    return None  # a tower beside a language model, of which the config says nothing we know
        sides = [token for token in tokens[:2] if token in ("encoder", "decoder")]
        side = next((side for side in sides if isinstance(config.get(side), Mapping)), None)
        if side is None:
            return config_of_text(config)
        config, tokens = config[side], tokens[tokens.index(side) + 1 :]
    return None


def config_of_text(config: Config) -> Config:
    """The language model's own config inside a multimodal one, of the outer model type where it names none."""
    while True:
        inner = next((config[key] for key in _TEXT if isinstance(config.get(key), Mapping)), None)
        if inner is None:
            return config
        config = {"model_type": config.get("model_type"), **inner}


def model_type_of(config: Config | None) -> str | None:
    """`model_type` of a config, None where it is absent."""
    value = None if config is None else config.get("model_type")
    return value if isinstance(value, str) else None


def size_of(config: Config | None, *keys: str) -> int | None:
    """The first of `keys` that the config gives as a positive integer."""
    for key in keys if config is not None else ():
        value = config.get(key) if config is not None else None
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def hidden_size_of(config: Config | None) -> int | None:
    """Width of the residual stream."""
    return size_of(config, "hidden_size", "n_embd", "d_model", "dim", "embed_dim")


def intermediate_size_of(config: Config | None) -> int | None:
    """Width inside the dense FFN."""
    return size_of(config, "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "inner_dim")


def query_heads_of(config: Config | None) -> int | None:
    """Number of query heads."""
    return size_of(config, "num_attention_heads", "n_head", "n_heads", "num_heads")


def head_size_of(config: Config | None) -> int | None:
    """Entries of one query head."""
    given = size_of(config, "head_dim")
    hidden, heads = hidden_size_of(config), query_heads_of(config)
    if given is not None or hidden is None or heads is None:
        return given
    return hidden // heads


def expert_count_of(config: Config | None) -> int | None:
    """Number of routed experts of one layer."""
    ffn = config.get("ffn_config") if config is not None else None
    inner = size_of(ffn, "moe_num_experts") if isinstance(ffn, Mapping) else None
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
    return inner or size_of(config, *keys)


def split_qkv(config: Config | None, fused: int, axis: int) -> tuple[Part, ...]:
    """q, k and v of a fused projection with `fused` outputs along the stored `axis`; empty: not known."""
    model_type, heads, size = model_type_of(config), query_heads_of(config), head_size_of(config)
    if config is None or model_type is None or heads is None or size is None:
        return ()
    groups, q_heads, kv_heads, order = 1, heads, heads, ("q", "k", "v")
    if model_type in QKV_PER_HEAD:
        groups, q_heads, kv_heads = heads, 1, 1
    elif model_type in QKV_IN_A_ROW:
        attention = config.get("attn_config")
        inner = size_of(attention, "kv_n_heads") if isinstance(attention, Mapping) else None
        kv_heads = inner or size_of(config, "num_key_value_heads") or heads
    elif model_type == "gpt_bigcode":
        if config.get("multi_query", True):
            kv_heads = 1
        else:
            groups, q_heads, kv_heads = heads, 1, 1
    elif model_type in ("falcon", "RefinedWeb", "RefinedWebModel"):
        if config.get("new_decoder_architecture", model_type == "RefinedWeb"):
            groups = size_of(config, "num_kv_heads", "n_head_kv") or heads
            q_heads, kv_heads = heads // groups, 1
        elif config.get("multi_query", True):
            kv_heads = 1
        else:
            groups, q_heads, kv_heads = heads, 1, 1
    elif model_type == "codegen":
        # Four groups, a trace of the four accelerator cores it was trained on; values come before keys.
        groups, order = 4, ("q", "v", "k")
        q_heads = kv_heads = heads // 4
    else:
        return ()
    entries = {"q": q_heads * size, "k": kv_heads * size, "v": kv_heads * size}
    if groups * sum(entries.values()) != fused:
        return ()
    return cut_runs(axis, groups, {role: entries[role] for role in order}, "qkv")


def is_stored_in_out(role: str, shape: tuple[int, int], config: Config | None) -> bool:
    """Whether a tensor of GPT-2's names is a Conv1D, by the hidden size, the model type or the longer side."""
    rows, columns = shape
    hidden = hidden_size_of(config)
    if hidden is not None and (rows == hidden) != (columns == hidden):
        return (columns if role in ("down", "o") else rows) == hidden
    model_type = model_type_of(config)
    if model_type is not None:
        return model_type in CONV1D
    return rows > columns if role in ("down", "o") else rows < columns
