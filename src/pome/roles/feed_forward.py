"""Feed-forward matrices: which 2-D tensors of an FFN, or of one expert, are gate, up and down. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pome.roles.families import family_of, is_stored_in_out
from pome.roles.layout import OTHER, Block, Layout, Part, matrix_shape, split_runs
from pome.roles.model_config import Config, expert_count_of, hidden_size_of, intermediate_size_of
from pome.roles.names import Path, Shape, invert, words

FFN_MODULE = re.compile(
    r"mlps?|ffn[s12]?|ff|\w*feed_?forward\w*|\w*_mlp|mlp_block|block_sparse_moe|\w*moe|mixer|\w*experts?|"
    r"dense\w*relu\w*dense|dense\w*act\w*dense",
    re.IGNORECASE,
)
_INDEX = re.compile(r"(?:expert_|layer_|block_)?\d+")
_PLAIN = re.compile(r"(?<![a-z])(gate|up|down)(?![a-z])[^.]*(\.weight)?$")

_FFN_ROLE = invert(
    {
        "gate": "gate_proj fc12 wi_0 w_in.w_0 proj_up_gate linear_gate",
        "up": "up_proj fc1 fc_1 fc11 linear_1 linear_fc1 ffn c_fc fc_in dense_h_to_4h lin1 linear1 wi wi_1 w_in.w_1 "
        "proj_up intermediate_dense intermediate.dense intermediate_query.dense ff.layer_1 feed_forward.intermediate "
        "dense.dense",
        "down": "down_proj fc2 fc_2 linear_2 linear_fc2 ffn_output c_proj fc_out dense_4h_to_h lin2 linear2 wo w_out "
        "proj_down output_dense output.dense output_query.dense ff.layer_2 feed_forward.output",
    }
)
# What may stand in a layer without an FFN module around it, or with nothing around it at all.
_BARE_IN_LAYER = words(
    "fc1 fc2 lin1 lin2 linear1 linear2 ffn ffn_output",
    "intermediate.dense output.dense intermediate_query.dense output_query.dense",
)
_BARE_ANYWHERE = words("gate_proj up_proj down_proj gate_up_proj")
# One matrix that a gated FFN may have fused under the same name.
_MAYBE_FUSED = words("fc1 fc_1 c_fc fc_in dense_h_to_4h lin1 linear1 linear_1 linear_fc1 wi")
_W123 = {"w1": "gate", "w2": "down", "w3": "up"}
# Where Meta's names are used as Meta does; in an `mlp`, and in vision towers, they mean other things.
_W123_MODULE = re.compile(r"\w*experts?|feed_forward|ffn|block_sparse_moe")
_VISION = re.compile(r"vision|visual|image|(^|_)vit(_|$)")


def find_ffn_layout(path: Path, leaves: tuple[str, str], ffn: int, shape: Shape, facts: Config | None) -> Layout | None:
    """The layout of a 2-D tensor at `path` whose last FFN module is token `ffn` of it; None: it is none of an FFN.

    `leaves` are its last two names together and its last name alone.
    """
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
    family = family_of(facts)
    own = family.ffn_names.get(leaf)
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
    if leaf in family.fused_names:
        fused = family.fused_names[leaf] == "gate_up"
        return _split_halves(("gate", "up"), shape) if fused else Layout((Part("down"),))
    if leaf in family.experts_below_each_other:
        return _split_experts(family.experts_below_each_other[leaf], shape, expert_count_of(facts))
    if leaf in _W123:
        if not _W123_MODULE.fullmatch(around[-1]) or any(_VISION.search(token) for token in path):
            return OTHER
        return _find_w123_layout(leaf, shape, facts)
    role = _FFN_ROLE.get(leaf)
    if role is None:
        return None
    inside = intermediate_size_of(facts)
    twice = inside is not None and shape[0] == 2 * inside
    if leaf in _MAYBE_FUSED and (twice or family.width_counts_both):
        # Two halves under one name, in an order that only the architecture knows.
        return _split_halves(family.fused_up, shape) if family.fused_up else OTHER
    if leaf in _MAYBE_FUSED and leaf != "c_fc" and _runs_backwards(shape, hidden_size_of(facts)):
        return OTHER
    return Layout((Part(role),), leaf in ("c_fc", "c_proj") and is_stored_in_out(role, shape, facts))


def _runs_backwards(shape: Shape, hidden: int | None) -> bool:
    """Whether a would-be up projection (out, in) leads back to the stream, as `fc1` does after an `fc0`."""
    rows, columns = shape
    return columns != hidden if hidden in shape and rows != columns else rows < columns


def _split_experts(role: str, shape: Shape, experts: int | None) -> Layout:
    """All experts of a layer below each other in one matrix."""
    if experts is None or shape[0] % experts:
        return OTHER
    rows = shape[0] // experts
    blocks = [Block(0, 1, shape[0], expert * rows, rows) for expert in range(experts)]
    parts = tuple(Part(role, f"expert={expert}", block) for expert, block in enumerate(blocks))
    return Layout(parts, transposed=role == "down")


def _find_w123_layout(leaf: str, shape: Shape, facts: Config | None) -> Layout:
    """Meta's names: w1 is the gate, w3 the up and w2 the down projection, if the sizes agree."""
    role = _W123[leaf]
    hidden = hidden_size_of(facts)
    if hidden is not None and shape[0 if role == "down" else 1] != hidden:
        return OTHER
    return Layout((Part(role),))


def _split_halves(order: tuple[str, str], shape: Shape) -> Layout | None:
    if shape[0] % 2:
        return None
    return Layout(split_runs(0, 1, dict.fromkeys(order, shape[0] // 2), "half"))


def module_of(path: Path) -> Path:
    """Where the matrices of one FFN stand together: the path of one of them without its own name."""
    return path[: -2 if ".".join(path[-2:]) in _FFN_ROLE else -1]


def find_refuted(layouts: Mapping[str, Layout], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Of the tensors of one FFN, those whose roles their sizes together, or a third of their kind, prove wrong.

    `layouts` are those with a role in an FFN, `shapes` of all tensors of the checkpoint. An up without a gate, of twice
    the rows that down has columns, holds the gate as well. Numbered names (fc1, fc2) mean other things where there are
    three of them, or where two that should face each other do not; names that say what they are, are believed.
    """
    sizes: dict[str, set[Shape]] = {"gate": set(), "up": set(), "down": set()}
    for name, layout in layouts.items():
        for part in layout.parts:
            sizes[part.role].add(matrix_shape(layout, part, shapes[name]))
    if not sizes["gate"] and any((2 * F, H) in sizes["up"] for H, F in sizes["down"]):
        return [name for name, layout in layouts.items() if layout.parts[0].role == "up"]
    outward = sizes["gate"] | sizes["up"]
    turned = {(n, m) for m, n in outward if m != n}
    # Of fc1, fc2 and fc3 nobody knows which leads back; Meta's w3 has a role of its own.
    thirds = {re.sub(r"2(\.weight)?$", r"3\1", name) for name in layouts} - layouts.keys()
    if not (any(name in shapes for name in thirds) or outward & turned or {(n, m) for m, n in sizes["down"]} & turned):
        return []
    return [
        name
        for name, layout in layouts.items()
        if layout.parts[0].block is None and not _PLAIN.search(name)  # halves are so by their name
    ]
