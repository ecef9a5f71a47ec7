"""Architectures with a storage layout of their own: one row for each that no general rule describes.

A row's key is `model_type` in `config.json`. No other module names an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pome.roles.layout import Part, split_runs
from pome.roles.model_config import Config, head_size_of, hidden_size_of, model_type_of, query_heads_of, size_of
from pome.roles.names import words


@dataclass(frozen=True, slots=True)
class FusedQkv:
    """How a fused projection holds q, k and v: `groups` times the heads of each, in this order, after each other."""

    groups: int
    heads: dict[str, int]  # role -> heads in one group


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of one architecture. A field left at its default says that the general rules hold."""

    conv1d: bool = False  # its linear maps are GPT-2's Conv1D, stored (in, out)
    # Stacked experts: how each is stored where its two sides are equal (for any other the hidden size decides), how
    # gate and up lie in experts stored (in, out), and whether the implementation marks them as (in, out).
    experts: Literal["out_in", "in_out"] | None = None
    in_out_halves: Literal["side by side", "interleaved"] | None = None
    marked_in_out: bool = False
    # Stored (E, in, out), and turned to (E, out, in) by transformers 5 while it loads them.
    turned_on_load: bool = False
    # Names in checkpoints -> names in the model of transformers 5, in this order: regular expressions, as for `re.sub`.
    renames: tuple[tuple[str, str], ...] = ()
    # What the names of a headed model begin with, where old checkpoints of the base model leave it out.
    prefix: str = ""
    expert_names: Mapping[str, str] = field(default_factory=dict)  # leaves of stacked experts: "gate_up" or "down"
    # All experts of a layer below each other in one matrix: leaf -> role.
    experts_below_each_other: Mapping[str, str] = field(default_factory=dict)
    ffn_names: Mapping[str, str] = field(default_factory=dict)  # leaves in an FFN that mean something else elsewhere
    # One matrix that holds gate and up, in this order, under the name of an up projection (such as `fc1`): where it
    # has twice the rows of the FFN's width, or always where the config's width counts both halves.
    fused_up: tuple[str, str] | None = None
    width_counts_both: bool = False
    fused_names: Mapping[str, str] = field(default_factory=dict)  # leaves of its own: "gate_up" or "down"
    qkv: Callable[[Config, int], FusedQkv] | None = None  # of the config and the number of query heads


def _per_head(config: Config, heads: int) -> FusedQkv:
    """q, k, v of one head after each other, head by head."""
    return FusedQkv(heads, {"q": 1, "k": 1, "v": 1})


def _in_a_row(config: Config, heads: int) -> FusedQkv:
    """All of q, then all of k, then all of v; fewer key and value heads than query heads are allowed."""
    attention = config.get("attn_config")
    inner = size_of(attention, "kv_n_heads") if isinstance(attention, Mapping) else None
    few = inner or size_of(config, "num_key_value_heads") or heads
    return FusedQkv(1, {"q": heads, "k": few, "v": few})


def _multi_query_or_per_head(config: Config, heads: int) -> FusedQkv:
    """One key and value head for all queries, unless the config says otherwise."""
    return FusedQkv(1, {"q": heads, "k": 1, "v": 1}) if config.get("multi_query", True) else _per_head(config, heads)


def _falcon(config: Config, heads: int, new: bool = False) -> FusedQkv:
    """Groups of query heads with their key and value head (the newer decoder), or one of the older two ways."""
    if not config.get("new_decoder_architecture", new):
        return _multi_query_or_per_head(config, heads)
    groups = size_of(config, "num_kv_heads", "n_head_kv") or heads
    return FusedQkv(groups, {"q": heads // groups, "k": 1, "v": 1})


def _four_cores(config: Config, heads: int) -> FusedQkv:
    """Four groups, a trace of the four accelerator cores it was trained on; values come before keys."""
    return FusedQkv(4, {"q": heads // 4, "v": heads // 4, "k": heads // 4})


_FUSED_WI = Family(fused_names={"Wi": "gate_up", "Wo": "down"}, qkv=_in_a_row)
_MOONSHINE = Family(fused_up=("up", "gate"))
_QWEN3_VL_MOE = Family(in_out_halves="side by side", turned_on_load=True)  # its checkpoints exist both ways

_BLOCK_SPARSE = ((r"\.block_sparse_moe\.", ".mlp."),)
_PHIMOE = (*_BLOCK_SPARSE, (r"\.mlp\.gate\.", ".mlp.router."))
_GRANITE = (
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
    (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router."),
)

# Experts stored (E, out, in), and nothing else to tell.
_PLAIN_EXPERTS = words(
    "afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1 "
    "ernie4_5_moe exaone_moe flex_olmo gemma4_text glm4_moe glm4_moe_lite glm4v_moe_text glm_moe_dsa "
    "hunyuan_v1_moe hy_v3 jamba laguna lfm2_moe mimo_v2_flash olmoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next "
    "qwen3_omni_moe_text solar_open"
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_PLAIN_EXPERTS, Family(experts="out_in")),
    **dict.fromkeys(words("kimi_linear minimax_m2 mixtral"), Family(experts="out_in", renames=_BLOCK_SPARSE)),
    **dict.fromkeys(words("granitemoe granitemoehybrid granitemoeshared"), Family(experts="out_in", renames=_GRANITE)),
    "aria_text": Family(
        experts="in_out",
        in_out_halves="side by side",
        marked_in_out=True,
        expert_names={"fc1": "gate_up", "fc2": "down"},
        renames=(
            (r"\.experts\.fc1\.weight$", ".experts.gate_up_proj"),
            (r"\.experts\.fc2\.weight$", ".experts.down_proj"),
        ),
    ),
    "bloom": Family(qkv=_per_head, prefix="transformer"),
    "clvp_decoder": Family(conv1d=True),
    "codegen": Family(qkv=_four_cores),
    "ctrl": Family(ffn_names={"0": "up", "2": "down"}),
    "dbrx": Family(experts_below_each_other={"w1": "gate", "v1": "up", "w2": "down"}, qkv=_in_a_row),
    "decision_transformer": Family(conv1d=True),
    "falcon": Family(qkv=_falcon),
    "fuyu": Family(qkv=_per_head),
    "gpt-sw3": Family(conv1d=True),
    "gpt2": Family(conv1d=True, prefix="transformer"),
    "gpt_bigcode": Family(qkv=_multi_query_or_per_head),
    "gpt_neox": Family(qkv=_per_head, renames=((r"^embed_out\.", "lm_head."),)),
    "gpt_neox_japanese": Family(qkv=_per_head),
    "gpt_oss": Family(experts="in_out", in_out_halves="interleaved", marked_in_out=True),
    "imagegpt": Family(conv1d=True),
    "llama4_text": Family(experts="in_out", in_out_halves="side by side"),
    "minimax": Family(experts="out_in", qkv=_per_head, renames=_BLOCK_SPARSE),
    "modernbert": _FUSED_WI,
    "modernbert-decoder": _FUSED_WI,
    "moonshine": _MOONSHINE,
    "moonshine_streaming": _MOONSHINE,
    "moshi": Family(fused_up=("gate", "up"), width_counts_both=True),
    "mpt": Family(qkv=_in_a_row),
    "nemotron_h": Family(experts="out_in", renames=((r"^backbone\.", "model."),)),
    "openai-gpt": Family(conv1d=True),
    "openai_privacy_filter": Family(experts="in_out", in_out_halves="side by side", marked_in_out=True),
    "persimmon": Family(qkv=_per_head),
    "phi3": Family(qkv=_in_a_row),
    "phi4_multimodal": Family(qkv=_in_a_row),
    "qwen3_vl_moe": _QWEN3_VL_MOE,
    "qwen3_vl_moe_text": _QWEN3_VL_MOE,
    "RefinedWeb": Family(qkv=lambda config, heads: _falcon(config, heads, new=True)),
    "RefinedWebModel": Family(qkv=_falcon),
    "phimoe": Family(experts="out_in", renames=_PHIMOE),
    "rwkv": Family(ffn_names={"key": "up", "value": "down"}),
}
_UNKNOWN = Family()


def family_of(config: Config | None) -> Family:
    """The row of a config's `model_type`, or one that knows nothing."""
    return FAMILIES.get(model_type_of(config) or "", _UNKNOWN)


def split_qkv(config: Config | None, fused: int, axis: int) -> tuple[Part, ...]:
    """q, k and v of a fused projection with `fused` outputs along the stored `axis`; empty: not known."""
    rule, heads, size = family_of(config).qkv, query_heads_of(config), head_size_of(config)
    if config is None or rule is None or heads is None or size is None:
        return ()
    found = rule(config, heads)
    entries = {role: count * size for role, count in found.heads.items()}
    if found.groups * sum(entries.values()) != fused:
        return ()
    return split_runs(axis, found.groups, entries, "qkv")


def is_stored_in_out(role: str, shape: tuple[int, int], config: Config | None) -> bool:
    """Whether a tensor of GPT-2's names is a Conv1D, by the hidden size, the model type or the longer side."""
    rows, columns = shape
    hidden = hidden_size_of(config)
    if hidden is not None and (rows == hidden) != (columns == hidden):
        return (columns if role in ("down", "o") else rows) == hidden
    if model_type_of(config) is not None:
        return family_of(config).conv1d
    return rows > columns if role in ("down", "o") else rows < columns
