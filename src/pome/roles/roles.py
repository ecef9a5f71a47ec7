"""Name, shape and config -> role, orientation, and how a stored tensor splits into matrices. No torch, no I/O.

A rule that cannot be sure answers `other`: an unknown role costs a user one `--layers re:...`, a wrong one costs
the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pome.choices import GROUPS as GROUPS
from pome.choices import ROLES as ROLES
from pome.roles import families as arch
from pome.roles.feed_forward import (
    FFN_MODULE,
    OTHER,
    Path,
    Shape,
    describe_experts,
    describe_feed_forward,
    find_refuted,
    invert,
    module_of,
    words,
)
from pome.roles.layout import Block as Block
from pome.roles.layout import Layout as Layout
from pome.roles.layout import Part as Part
from pome.roles.layout import cut_runs
from pome.roles.layout import matrix_shape as matrix_shape

# Which module a tensor belongs to is decided by the last path token that names one of these or an FFN.
_ATTENTION = re.compile(r"(self|cross|encoder|rel|multi_head|enc_?dec)?_?(attn|attention|att)s?", re.IGNORECASE)
# Inside these nothing is what its name suggests: state-space and linear attention, the indexers of sparse
# attention, adapters, projections between towers and into a bottleneck, norms with a gate.
_FOREIGN = re.compile(
    r"linear_attn|mamba\w*|indexer|\w*compressor|\w*adapter\w*|lora_\w+|\w*projector|\w*resampler|\w*merger|"
    r"\w*connector|perceiver\w*|conv\w*|\w*_conv|\w*sconv|rbr\w*|\w*embedder|(?!roberta|norm_attn)\w*norm\d*|\w+_norm_\w+|"
    r"temporal_block|bottleneck",
    re.IGNORECASE,
)
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
_FUSED_QKV = words("query_key_value c_attn qkv_proj Wqkv qkv")

_EMBED = words(
    "embed_tokens wte wpe word_embeddings position_embeddings token_type_embeddings tok_embeddings embed_positions",
    "position_embedding word_embedding embed_in tokens_embed positions_embed shared",
)
_HEAD = words("lm_head embed_out score classifier output_projection generator_lm_head lm_loss qa_outputs")
_HEAD_PATHS = ("cls.predictions.decoder", "lm_head.decoder")


def describe(name: str, shape: tuple[int, ...], config: Mapping[str, Any] | None = None) -> Layout:
    """The matrices that a stored tensor holds, by architecture rules over its name, shape and `config.json`.

    `name` may carry any prefix and may lack `.weight`. `config` is the parsed `config.json` of the checkpoint, None
    for a lone file: then what only a config can tell (head counts of a fused attention projection, the orientation
    of stacked experts) is answered with `other`; a GPT-2 style weight shows its orientation by its longer side, and
    where it is square (out, in) is assumed, which changes no edit, for the edit of a transpose is the edit
    transposed. Whatever no rule knows, and every tensor that is not of 2 or 3 dimensions, is one part `other`.
    """
    path = _module_path(name)
    facts = arch.config_of(name, config)
    if len(shape) == 2:
        return _describe_matrix(path, (shape[0], shape[1]), facts)
    foreign = any(_ATTENTION.fullmatch(token) or _FOREIGN.fullmatch(token) for token in path)
    if len(shape) == 3 and not foreign:
        return describe_experts(path, (shape[1], shape[2]), facts)
    return OTHER


def describe_all(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None) -> dict[str, Layout]:
    """`describe` for all matrices of a checkpoint at once: a role that its neighbours' sizes prove wrong is `other`."""
    layouts = {name: describe(name, shape, config) for name, shape in shapes.items()}
    modules: dict[Path, dict[str, Layout]] = {}
    for name, layout in layouts.items():
        if layout.parts[0].role in GROUPS["ffn"]:
            modules.setdefault(module_of(_module_path(name)), {})[name] = layout
    for module in modules.values():
        for name in find_refuted(module, shapes):
            layouts[name] = replace(layouts[name], parts=OTHER.parts)
    return layouts


def _module_path(name: str) -> Path:
    tokens = name.split(".")
    if tokens[-1] == "weight":
        tokens.pop()
    # Wrappers around a linear layer: PEFT's, and the clipped or per-codebook ones of some multimodal models.
    if len(tokens) > 1 and tokens[-1] in ("base_layer", "linear"):
        tokens.pop()
    return tuple(tokens)


def _describe_matrix(path: Path, shape: Shape, facts: arch.Config | None) -> Layout:
    if not path:
        return OTHER
    if any("router" in token for token in path):
        return Layout((Part("router"),))
    if any(_FOREIGN.fullmatch(token) for token in path) or any(token in _FUSED_QKV for token in path[:-1]):
        return OTHER
    attention = max((i for i, token in enumerate(path) if _ATTENTION.fullmatch(token)), default=-1)
    ffn = max((i for i, token in enumerate(path[:-1]) if FFN_MODULE.fullmatch(token)), default=-1)
    leaves = (".".join(path[-2:]), path[-1])
    if attention > ffn or (attention == ffn and path[-1] in ("q_proj", "k_proj", "v_proj", "o_proj")):
        return _describe_attention(path, leaves, shape, facts)
    if _is_router(path, shape, facts):
        return Layout((Part("router"),))
    if "gate" in path:
        return Layout((Part("router"),)) if arch.expert_count_of(facts) else OTHER
    found = describe_feed_forward(path, leaves, ffn, shape, facts)
    return found or Layout((Part(_role_outside_layers(path)),))


def _is_router(path: Path, shape: Shape, facts: arch.Config | None) -> bool:
    """Whether an FFN's `gate` chooses experts: as many rows as there are experts, or few when nobody says."""
    if path[-1] == "shared_expert_gate":
        return True
    if path[-1] != "gate" or len(path) < 2 or not FFN_MODULE.fullmatch(path[-2]):
        return False
    experts = arch.expert_count_of(facts)
    return shape[0] == experts if experts else shape[0] < shape[1] and shape[0] <= 1024


def _role_outside_layers(path: Path) -> str:
    dotted = ".".join(path)
    if any(token.isdigit() for token in path):
        return "other"
    if path[-1] in _EMBED:
        return "embed"
    if path[-1] in _HEAD or any(dotted == end or dotted.endswith("." + end) for end in _HEAD_PATHS):
        return "head"
    return "other"


def _describe_attention(path: Path, leaves: tuple[str, str], shape: Shape, facts: arch.Config | None) -> Layout:
    leaf = leaves[-1]
    role = _ATTENTION_ROLE.get(leaves[0]) or _ATTENTION_ROLE.get(leaf)
    around = path[:-2] if leaves[0] in _ATTENTION_ROLE else path[:-1]
    within = bool(around) and (around[-1] == "self" or _ATTENTION.fullmatch(around[-1]) is not None)
    if leaf in _ONLY_IN_ATTENTION and not within:
        return OTHER
    if leaf in _FUSED_QKV:
        transposed = leaf == "c_attn" and arch.is_stored_in_out("qkv", shape, facts)
        axis = 1 if transposed else 0
        parts = arch.split_qkv(facts, shape[axis], axis)
        if not parts and transposed:
            parts = _split_conv1d_attention(shape)
        return Layout(parts or (Part("other"),), transposed)
    if role is None:
        return OTHER
    heads, size = arch.query_heads_of(facts), arch.head_size_of(facts)
    if role == "q" and leaf == "q_proj" and heads and size and shape[0] == 2 * heads * size:
        return OTHER  # the queries and, head by head, a gate on the attention's output
    return Layout((Part(role),), leaf in ("c_proj", "q_attn") and arch.is_stored_in_out(role, shape, facts))


def _split_conv1d_attention(shape: Shape) -> tuple[Part, ...]:
    """GPT-2's c_attn, stored (in, out): q, k and v side by side, or k and v in cross-attention."""
    hidden, fused = shape
    roles = {3 * hidden: ("q", "k", "v"), 2 * hidden: ("k", "v")}.get(fused, ())
    return cut_runs(1, 1, dict.fromkeys(roles, hidden), "qkv")
