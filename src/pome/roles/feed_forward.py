"""The feed-forward part of the role rules: which tensors of an FFN, dense or of experts, are gate, up and down."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pome.roles import families as arch
from pome.roles.layout import Block, Layout, Part, cut_runs, matrix_shape

Path = tuple[str, ...]
Shape = tuple[int, int]

OTHER = Layout((Part("other"),))


def words(*lines: str) -> frozenset[str]:
    """Names, written with blanks between them."""
    return frozenset(" ".join(lines).split())


def invert(leaves: dict[str, str]) -> dict[str, str]:
    """Name -> role from role -> names."""
    return {leaf: role for role, names in leaves.items() for leaf in names.split()}


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


def describe_feed_forward(
    path: Path, leaves: tuple[str, str], ffn: int, shape: Shape, facts: arch.Config | None
) -> Layout | None:
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
        if not _W123_MODULE.fullmatch(around[-1]) or any(_VISION.search(token) for token in path):
            return OTHER
        return _describe_w123(leaf, shape, facts)
    role = _FFN_ROLE.get(leaf)
    if role is None:
        return None
    inside = arch.intermediate_size_of(facts)
    twice = inside is not None and shape[0] == 2 * inside
    if leaf in _MAYBE_FUSED and (twice or model_type in arch.FUSED_FC1_COUNTS_BOTH):
        # Two halves under one name, in an order that only the architecture knows.
        return _split_halves(arch.FUSED_FC1[model_type], shape) if model_type in arch.FUSED_FC1 else OTHER
    if leaf in _MAYBE_FUSED and leaf != "c_fc" and _runs_backwards(shape, arch.hidden_size_of(facts)):
        return OTHER
    return Layout((Part(role),), leaf in ("c_fc", "c_proj") and arch.is_stored_in_out(role, shape, facts))


def _runs_backwards(shape: Shape, hidden: int | None) -> bool:
    """Whether a would-be up projection (out, in) leads back to the stream, as `fc1` does after an `fc0`."""
    rows, columns = shape
    return columns != hidden if hidden in shape and rows != columns else rows < columns


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


def describe_experts(path: Path, shape: Shape, facts: arch.Config | None) -> Layout:
    """Stacked experts, each stored as a `shape` slice of a 3-D tensor."""
    leaf, around = path[-1], path[:-1]
    if not around:
        return OTHER
    if leaf in ("input_linear", "output_linear"):
        fused, role, known = leaf == "input_linear", "down", around[-1] in ("block_sparse_moe", "mlp")
    else:
        fused, known = leaf in ("gate_up_proj", "w13_weight"), "expert" in around[-1] or around[-1] == "moe"
        role = "down" if leaf == "w2_weight" else leaf.removesuffix("_proj")
        if arch.model_type_of(facts) in arch.EXPERTS_FC and leaf in ("fc1", "fc2"):
            fused, role = leaf == "fc1", "down"
    if not known or not (fused or role in ("gate", "up", "down")):
        return OTHER
    transposed = _are_experts_in_out("down" if not fused and role == "down" else "up", shape, facts)
    if transposed is None:
        return OTHER
    if not fused:
        return Layout((Part(role),), transposed, stacked=True)
    axis = 1 if transposed else 0
    if shape[axis] % 2 or transposed and arch.model_type_of(facts) not in arch.EXPERTS_IN_OUT_HALVES:
        return OTHER  # how (in, out) experts lay out their halves differs from one architecture to the next
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
