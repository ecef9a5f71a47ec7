"""Roles of the stored tensors of a model, from names, shapes and `config.json`. No torch, no I/O.

A rule that cannot be sure answers `other`: an unknown role costs a user one `--layers re:...`, a wrong one costs
the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pome.choices import GROUPS
from pome.roles.attention import ATTENTION_MODULE, FUSED_QKV, find_attention_layout
from pome.roles.experts import find_experts_layout
from pome.roles.feed_forward import FFN_MODULE, find_ffn_layout, find_refuted, module_of
from pome.roles.layout import OTHER, Layout, Part
from pome.roles.model_config import Config, config_of, expert_count_of
from pome.roles.names import Path, Shape, match_word, module_path, words

# Inside these nothing is what its name suggests: state-space and linear attention, the indexers of sparse
# attention, adapters, projections between towers and into a bottleneck, norms with a gate.
_FOREIGN = re.compile(
    r"linear_attn|mamba\w*|indexer|\w*compressor|\w*adapter\w*|lora_\w+|\w*projector|\w*resampler|\w*merger|"
    r"\w*connector|perceiver\w*|conv\w*|\w*_conv|\w*sconv|rbr\w*|\w*embedder|(?!roberta|norm_attn)\w*norm\d*|\w+_norm_\w+|"
    r"temporal_block|bottleneck",
    re.IGNORECASE,
)
_EMBED = words(
    "embed_tokens wte wpe word_embeddings position_embeddings token_type_embeddings tok_embeddings embed_positions",
    "position_embedding word_embedding embed_in tokens_embed positions_embed shared",
)
_HEAD = words("lm_head embed_out score classifier output_projection generator_lm_head lm_loss qa_outputs")
_HEAD_PATHS = ("cls.predictions.decoder", "lm_head.decoder")


def find_layout(name: str, shape: tuple[int, ...], config: Mapping[str, Any] | None = None) -> Layout:
    """The matrices that a stored tensor holds, by architecture rules over its name, shape and `config.json`.

    `name` may carry any prefix and may lack `.weight`. `config` is the parsed `config.json` of the checkpoint, None
    for a lone file: then what only a config can tell (head counts of a fused attention projection, the orientation
    of stacked experts) is answered with `other`; a GPT-2 style weight shows its orientation by its longer side, and
    where it is square (out, in) is assumed, which changes no edit, for the edit of a transpose is the edit
    transposed. Whatever no rule knows, and every tensor that is not of 2 or 3 dimensions, is one part `other`.
    """
    path = module_path(name)
    facts = config_of(name, config)
    if len(shape) == 2:
        return _find_matrix_layout(path, (shape[0], shape[1]), facts)
    foreign = any(match_word(ATTENTION_MODULE, token) or match_word(_FOREIGN, token) for token in path)
    if len(shape) == 3 and not foreign:
        return find_experts_layout(path, (shape[1], shape[2]), facts)
    return OTHER


def find_layouts(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None) -> dict[str, Layout]:
    """The layouts of all tensors of a checkpoint; a role that its neighbours' sizes prove wrong is `other`."""
    layouts = {name: find_layout(name, shape, config) for name, shape in shapes.items()}
    modules: dict[Path, dict[str, Layout]] = {}
    for name, layout in layouts.items():
        if layout.parts[0].role in GROUPS["ffn"]:
            modules.setdefault(module_of(module_path(name)), {})[name] = layout
    for module in modules.values():
        for name in find_refuted(module, shapes):
            layouts[name] = replace(layouts[name], parts=OTHER.parts)
    return layouts


def _find_matrix_layout(path: Path, shape: Shape, facts: Config | None) -> Layout:
    if not path:
        return OTHER
    if any("router" in token for token in path):
        return Layout((Part("router"),))
    if any(match_word(_FOREIGN, token) for token in path) or any(token in FUSED_QKV for token in path[:-1]):
        return OTHER
    # The last module around a tensor decides: an attention inside an FFN is an attention.
    attention = max((i for i, token in enumerate(path) if match_word(ATTENTION_MODULE, token)), default=-1)
    ffn = max((i for i, token in enumerate(path[:-1]) if match_word(FFN_MODULE, token)), default=-1)
    leaves = (".".join(path[-2:]), path[-1])
    if attention > ffn or (attention == ffn and path[-1] in ("q_proj", "k_proj", "v_proj", "o_proj")):
        return find_attention_layout(path, leaves, shape, facts)
    if _is_router(path, shape, facts):
        return Layout((Part("router"),))
    if "gate" in path:
        return Layout((Part("router"),)) if expert_count_of(facts) else OTHER
    found = find_ffn_layout(path, leaves, ffn, shape, facts)
    return found or Layout((Part(_role_outside_layers(path)),))


def _is_router(path: Path, shape: Shape, facts: Config | None) -> bool:
    """Whether an FFN's `gate` chooses experts: as many rows as there are experts, or few when nobody says."""
    if path[-1] == "shared_expert_gate":
        return True
    if path[-1] != "gate" or len(path) < 2 or not match_word(FFN_MODULE, path[-2]):
        return False
    experts = expert_count_of(facts)
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
