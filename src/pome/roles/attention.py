"""Attention projections: which tensors of an attention module are q, k, v and o, and how fused ones split. No torch."""

from __future__ import annotations

import re

from pome.roles.families import is_stored_in_out, split_qkv
from pome.roles.layout import OTHER, Layout, Part, split_runs
from pome.roles.model_config import Config, head_size_of, query_heads_of
from pome.roles.names import Path, Shape, invert, words

ATTENTION_MODULE = re.compile(r"(self|cross|encoder|rel|multi_head|enc_?dec)?_?(attn|attention|att)s?", re.IGNORECASE)
_ATTENTION_ROLE = invert(
    {
        "q": "q q_proj query query_proj q_lin Wq wq to_q project_q q_attn",
        "k": "k k_proj key key_proj k_lin Wk wk to_k project_k",
        "v": "v v_proj value value_proj v_lin Wv wv to_v project_v",
        "o": "o o_proj out_proj out_lin dense Wo wo to_out c_proj attention_out output.dense proj",
    }
)
# Names too short to mean anything unless they stand right inside an attention module.
_ONLY_IN_ATTENTION = words("q k v o dense proj out_proj Wo wo c_proj q_attn query key value")
FUSED_QKV = words("query_key_value c_attn qkv_proj Wqkv qkv")


def find_attention_layout(path: Path, leaves: tuple[str, str], shape: Shape, facts: Config | None) -> Layout:
    """The layout of a 2-D tensor of an attention module.

    `leaves` are its last two names together and its last name alone.
    """
    leaf = leaves[-1]
    role = _ATTENTION_ROLE.get(leaves[0]) or _ATTENTION_ROLE.get(leaf)
    around = path[:-2] if leaves[0] in _ATTENTION_ROLE else path[:-1]
    within = bool(around) and (around[-1] == "self" or ATTENTION_MODULE.fullmatch(around[-1]) is not None)
    if leaf in _ONLY_IN_ATTENTION and not within:
        return OTHER
    if leaf in FUSED_QKV:
        transposed = leaf == "c_attn" and is_stored_in_out("qkv", shape, facts)
        axis = 1 if transposed else 0
        parts = split_qkv(facts, shape[axis], axis)
        if not parts and transposed:
            parts = _split_conv1d_attention(shape)
        return Layout(parts or (Part("other"),), transposed)
    if role is None:
        return OTHER
    heads, size = query_heads_of(facts), head_size_of(facts)
    if role == "q" and leaf == "q_proj" and heads and size and shape[0] == 2 * heads * size:
        return OTHER  # the queries and, head by head, a gate on the attention's output
    return Layout((Part(role),), leaf in ("c_proj", "q_attn") and is_stored_in_out(role, shape, facts))


def _split_conv1d_attention(shape: Shape) -> tuple[Part, ...]:
    """GPT-2's c_attn, stored (in, out): q, k and v side by side, or k and v in cross-attention."""
    hidden, fused = shape
    roles = {3 * hidden: ("q", "k", "v"), 2 * hidden: ("k", "v")}.get(fused, ())
    return split_runs(1, 1, dict.fromkeys(roles, hidden), "qkv")
