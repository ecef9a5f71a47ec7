"""Name, shape and config -> role, orientation, and how a stored tensor splits into matrices. No torch, no I/O.

A rule that cannot be sure answers `other`: an unknown role costs a user one `--layers re:...`, a wrong one costs
the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pome import architectures as arch
from pome.layout import Block as Block
from pome.layout import Layout as Layout
from pome.layout import Part as Part
from pome.layout import cut_runs
from pome.layout import matrix_shape as matrix_shape

ROLES = ("gate", "up", "down", "q", "k", "v", "o", "embed", "head", "router", "other")
GROUPS = {"ffn": ("gate", "up", "down"), "attention": ("q", "k", "v", "o")}

OTHER = Layout((Part("other"),))
Path = tuple[str, ...]
Shape = tuple[int, int]


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


def _invert(leaves: dict[str, str]) -> dict[str, str]:
    return {leaf: role for role, names in leaves.items() for leaf in names.split()}


# Which module a tensor belongs to is decided by the last path token that names one of these two.
_ATTENTION = re.compile(r"(self|cross|encoder|rel|multi_head|enc_?dec)?_?(attn|attention|att)s?", re.IGNORECASE)
_FFN = re.compile(
    r"mlps?|ffns?|ff|\w*feed_?forward\w*|\w*_mlp|mlp_block|block_sparse_moe|\w*moe|mixer|\w*experts?|"
    r"dense\w*relu\w*dense|dense\w*act\w*dense",
    re.IGNORECASE,
)
# Inside these nothing is what its name suggests: state-space and linear attention, the indexers of sparse
# attention, adapters, projections between towers, norms with a gate.
_FOREIGN = re.compile(
    r"linear_attn|mamba\w*|indexer|\w*compressor|\w*adapter\w*|lora_\w+|\w*projector|\w*resampler|\w*merger|"
    r"\w*connector|perceiver\w*|conv\w*|\w*_conv|\w*sconv|rbr\w*|\w*embedder|(?!roberta|norm_attn)\w*norm\d*|\w+_norm_\w+|"
    r"temporal_block",
    re.IGNORECASE,
)
_INDEX = re.compile(r"(?:expert_|layer_|block_)?\d+")

_FFN_ROLE = _invert(
    {
        "gate": "gate_proj fc12 wi_0 w_in.w_0 proj_up_gate linear_gate",
        "up": "up_proj fc1 fc_1 fc11 linear_1 ffn c_fc fc_in dense_h_to_4h lin1 linear1 wi wi_1 w_in.w_1 proj_up "
        "intermediate_dense intermediate.dense intermediate_query.dense ff.layer_1 feed_forward.intermediate "
        "dense.dense",
        "down": "down_proj fc2 fc_2 linear_2 ffn_output c_proj fc_out dense_4h_to_h lin2 linear2 wo w_out "
        "proj_down output_dense output.dense output_query.dense ff.layer_2 feed_forward.output",
    }
)
# What may stand in a layer without an FFN module around it, or with nothing around it at all.
_BARE_IN_LAYER = _words(
    "fc1 fc2 lin1 lin2 linear1 linear2 ffn ffn_output",
    "intermediate.dense output.dense intermediate_query.dense output_query.dense",
)
_BARE_ANYWHERE = _words("gate_proj up_proj down_proj gate_up_proj")
# One matrix that a gated FFN may have fused under the same name.
_MAYBE_FUSED = _words("fc1 fc_1 c_fc fc_in dense_h_to_4h lin1 linear1 wi")
_W123 = {"w1": "gate", "w2": "down", "w3": "up"}

_ATTENTION_ROLE = _invert(
    {
        "q": "q q_proj query query_proj q_lin Wq wq to_q project_q q_attn",
        "k": "k k_proj key key_proj k_lin Wk wk to_k project_k",
        "v": "v v_proj value value_proj v_lin Wv wv to_v project_v",
        "o": "o o_proj out_proj out_lin dense Wo wo to_out c_proj attention_out output.dense proj",
    }
)
# Names too short to mean anything unless they stand right inside an attention module.
_ONLY_IN_ATTENTION = _words("q k v o dense proj out_proj Wo wo c_proj q_attn query key value")
_FUSED_QKV = _words("query_key_value c_attn qkv_proj Wqkv qkv")

_EMBED = _words(
    "embed_tokens wte wpe word_embeddings position_embeddings token_type_embeddings tok_embeddings embed_positions",
    "position_embedding word_embedding embed_in tokens_embed positions_embed shared",
)
_HEAD = _words("lm_head embed_out score classifier output_projection generator_lm_head lm_loss qa_outputs")
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
    if len(shape) == 3:
        return _describe_experts(path, (shape[1], shape[2]), facts)
    return OTHER


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
    ffn = max((i for i, token in enumerate(path[:-1]) if _FFN.fullmatch(token)), default=-1)
    leaves = (".".join(path[-2:]), path[-1])
    if attention > ffn or (attention == ffn and path[-1] in ("q_proj", "k_proj", "v_proj", "o_proj")):
        return _describe_attention(path, leaves, shape, facts)
    if _is_router(path, shape, facts):
        return Layout((Part("router"),))
    if "gate" in path:
        return Layout((Part("router"),)) if arch.expert_count_of(facts) else OTHER
    found = _describe_ffn(path, leaves, ffn, shape, facts)
    return found or Layout((Part(_role_outside_layers(path)),))


def _is_router(path: Path, shape: Shape, facts: arch.Config | None) -> bool:
    """Whether an FFN's `gate` chooses experts: as many rows as there are experts, or few when nobody says."""
    if path[-1] == "shared_expert_gate":
        return True
    if path[-1] != "gate" or len(path) < 2 or not _FFN.fullmatch(path[-2]):
        return False
    experts = arch.expert_count_of(facts)
    return shape[0] == experts if experts else shape[0] < shape[1] and shape[0] <= 1024


def _role_outside_layers(path: Path) -> str:
    dotted = ".".join(path)
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
        transposed = leaf == "c_attn" and _is_stored_in_out("qkv", shape, facts)
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
    return Layout((Part(role),), leaf in ("c_proj", "q_attn") and _is_stored_in_out(role, shape, facts))


def _split_conv1d_attention(shape: Shape) -> tuple[Part, ...]:
    """GPT-2's c_attn, stored (in, out): q, k and v side by side, or k and v in cross-attention."""
    hidden, fused = shape
    roles = {3 * hidden: ("q", "k", "v"), 2 * hidden: ("k", "v")}.get(fused, ())
    return cut_runs(1, 1, dict.fromkeys(roles, hidden), "qkv")


def _describe_ffn(
    path: Path, leaves: tuple[str, str], ffn: int, shape: Shape, facts: arch.Config | None
) -> Layout | None:
    depth = 2 if leaves[0] in _FFN_ROLE else 1
    leaf = leaves[0] if depth == 2 else leaves[1]
    around = path[:-depth]
    while around and _INDEX.fullmatch(around[-1]):
        around = around[:-1]
    in_layer = len(around) < len(path) - depth
    in_ffn = ffn >= 0 and bool(around) and (ffn == len(around) - 1 or leaf.startswith("w_"))
    bare = leaf in _BARE_ANYWHERE and (in_layer or not around) or leaf in _BARE_IN_LAYER and in_layer
    if not (in_ffn or bare or leaf.startswith(("ff.", "feed_forward."))):
        return None
    model_type = arch.model_type_of(facts) or ""
    own = arch.OWN_FFN_NAMES.get(model_type, {}).get(leaf)
    if own is not None:
        return Layout((Part(own),))
    if (
        leaf in ("gate_up_proj", "up_gate_proj", "w12", "weights_in")
        or leaf == "input_linear"
        and around[-1] == "shared_mlp"
    ):
        up_first = leaf == "up_gate_proj" or leaf == "gate_up_proj" and "audio_embed" in path
        order = ("up", "gate") if up_first else ("gate", "up")
        return _split_halves(order, shape)
    if leaf == "output_linear" and around[-1] == "shared_mlp" or leaf == "weights_out":
        return Layout((Part("down"),))
    if leaf in ("Wi", "Wo") and model_type in arch.FUSED_WI:
        return _split_halves(("gate", "up"), shape) if leaf == "Wi" else Layout((Part("down"),))
    if model_type == "dbrx" and leaf in arch.DBRX_EXPERTS:
        return _split_dbrx_experts(leaf, shape, arch.expert_count_of(facts))
    if leaf in _W123:
        return _describe_w123(leaf, shape, facts)
    role = _FFN_ROLE.get(leaf)
    if role is None:
        return None
    inside = arch.intermediate_size_of(facts)
    twice = inside is not None and shape[0] == 2 * inside
    if leaf in _MAYBE_FUSED and (twice or model_type in arch.FUSED_FC1_COUNTS_BOTH):
        # Two halves under one name, in an order that only the architecture knows.
        return _split_halves(arch.FUSED_FC1[model_type], shape) if model_type in arch.FUSED_FC1 else OTHER
    return Layout((Part(role),), leaf in ("c_fc", "c_proj") and _is_stored_in_out(role, shape, facts))


def _split_dbrx_experts(leaf: str, shape: Shape, experts: int | None) -> Layout:
    """DBRX keeps all experts of a layer below each other in one matrix."""
    if experts is None or shape[0] % experts:
        return OTHER
    role, rows = arch.DBRX_EXPERTS[leaf], shape[0] // experts
    blocks = [Block(0, 1, shape[0], expert * rows, rows) for expert in range(experts)]
    parts = tuple(Part(role, f"expert={expert}", block) for expert, block in enumerate(blocks))
    return Layout(parts, transposed=role == "down")


def _describe_w123(leaf: str, shape: Shape, facts: arch.Config | None) -> Layout:
    """Meta's names: w1 is the gate, w3 the up and w2 the down projection, if the sizes agree."""
    role = _W123[leaf]
    hidden = arch.hidden_size_of(facts)
    if hidden is not None and shape[0 if role == "down" else 1] != hidden:
        return OTHER
    return Layout((Part(role),))


def _split_halves(order: tuple[str, str], shape: Shape) -> Layout | None:
    if shape[0] % 2:
        return None
    return Layout(cut_runs(0, 1, dict.fromkeys(order, shape[0] // 2), "half"))


def _is_stored_in_out(role: str, shape: Shape, facts: arch.Config | None) -> bool:
    """Whether a tensor of GPT-2's names is a Conv1D, by the hidden size, the model type or the longer side."""
    rows, columns = shape
    hidden = arch.hidden_size_of(facts)
    if hidden is not None and (rows == hidden) != (columns == hidden):
        return (columns if role in ("down", "o") else rows) == hidden
    model_type = arch.model_type_of(facts)
    if model_type is not None:
        return model_type in arch.CONV1D
    return rows > columns if role in ("down", "o") else rows < columns


def _describe_experts(path: Path, shape: Shape, facts: arch.Config | None) -> Layout:
    """Stacked experts, each stored as a `shape` slice of a 3-D tensor."""
    leaf, around = path[-1], path[:-1]
    if not around or any(_ATTENTION.fullmatch(token) or _FOREIGN.fullmatch(token) for token in path):
        return OTHER
    if leaf in ("input_linear", "output_linear"):
        fused, role, known = leaf == "input_linear", "down", around[-1] in ("block_sparse_moe", "mlp")
    else:
        fused, known = leaf in ("gate_up_proj", "w13_weight"), "expert" in around[-1]
        role = "down" if leaf == "w2_weight" else leaf.removesuffix("_proj")
        if arch.model_type_of(facts) in arch.EXPERTS_FC and leaf in ("fc1", "fc2"):
            fused, role = leaf == "fc1", "down"
    if not known or not (fused or role in GROUPS["ffn"]):
        return OTHER
    transposed = _are_experts_in_out("down" if not fused and role == "down" else "up", shape, facts)
    if transposed is None:
        return OTHER
    if not fused:
        return Layout((Part(role),), transposed, stacked=True)
    axis = 1 if transposed else 0
    if shape[axis] % 2:
        return OTHER
    half = shape[axis] // 2
    interleaved = leaf.startswith("w13") or arch.model_type_of(facts) in arch.EXPERTS_INTERLEAVED
    if interleaved:
        parts = cut_runs(axis, half, {"gate": 1, "up": 1}, "half")
    else:
        parts = cut_runs(axis, 1, {"gate": half, "up": half}, "half")
    return Layout(parts, transposed, stacked=True)


def _are_experts_in_out(role: str, shape: Shape, facts: arch.Config | None) -> bool | None:
    """Whether stacked experts are stored (E, in, out); None where neither the sizes nor the model type tell."""
    model_type, hidden = arch.model_type_of(facts), arch.hidden_size_of(facts)
    rows, columns = shape
    if hidden is None or hidden not in shape:
        return None
    if rows != columns:
        return (columns if role == "down" else rows) == hidden
    if model_type in arch.EXPERTS_IN_OUT:
        return True
    return False if model_type in arch.EXPERTS_OUT_IN else None
