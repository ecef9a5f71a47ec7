"""Places of matrices in a model: which stack and layer, which kind of block, which role, which expert. No torch.

Two releases of a library, or two libraries, may store one matrix under different names, packed with others or not,
this way round or the other. What it is in the model is the same: `model.layers.3.mlp.experts.7.w3.weight` and the
second half of slice 7 of `model.layers.3.mlp.experts.gate_up_proj` are both the up projection of expert 7 in layer 3.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass

from pome.choices import GROUPS
from pome.roles.attention import ATTENTION_MODULE
from pome.roles.layout import Layout, Part, matrix_shape
from pome.roles.names import Path, invert, module_path

_EXPERTS = re.compile(r"\w*experts?|expert_\d+", re.IGNORECASE)
_SHARED = re.compile(r"\w*shared\w*", re.IGNORECASE)
_CROSS = re.compile(r"\w*(cross|encoder|enc_?dec)\w*", re.IGNORECASE)
_NUMBER = re.compile(r"(?:expert_|layer_|block_)?(\d+)")
# Words inside a layer that tell blocks of one kind apart: the experts of each modality, say.
_MARK = re.compile(r"vision|visual|image|audio|speech|text|language|mtp|gen(?![a-z])", re.IGNORECASE)

# Other spellings of one module, from the renamings that transformers applies while it loads (`conversion_mapping`).
# They serve for tensors whose role no rule knows; what has a role is found by it.
_SPELLING = invert(
    {
        "attention": "attn self_attn self_attention",
        "mlp": "ffn feed_forward block_sparse_moe",
        "layers": "layer blocks block h",
        "q_a_proj": "wq_a",
        "q_b_proj": "wq_b",
        "kv_proj": "wkv",
        "kv_a_proj_with_mqa": "wkv_a_with_mqa",
        "kv_b_proj": "wkv_b",
        "o_a_proj": "wo_a",
        "o_b_proj": "wo_b",
        "gate_proj": "wgate linear_gate",
    }
)
# Tables outside of layers, of which a model has one.
_TABLE = invert(
    {
        "tokens": "embed_tokens tok_embeddings wte word_embeddings word_embedding embed_in tokens_embed embed",
        "positions": "wpe position_embeddings embed_positions position_embedding positions_embed",
        "lm": "lm_head embed_out generator_lm_head output_projection output unembed",
    }
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored matrix belongs in the model, and where it is stored.

    `key` is written as a dotted name, so that a change of prefix between two checkpoints is found as for names. Its
    first number is the layer's. `expert` is None outside of routed experts.
    """

    key: str
    expert: int | None
    name: str  # of the stored tensor
    slice: int | None  # of stacked experts, which one
    part: Part
    layout: Layout
    shape: tuple[int, int]  # (fan_out, fan_in)

    @property
    def around(self) -> Path:
        """The words around the matrix inside its layer: evidence, where the place alone does not tell."""
        path = module_path(self.name)
        first = next((i for i, word in enumerate(path) if word.isdigit()), 0)
        return tuple(word for word in path[first + 1 : -1] if not word.isdigit())


def find_places(name: str, layout: Layout, shape: tuple[int, ...]) -> list[Place]:
    """The place of every matrix that a stored tensor holds."""
    places = []
    path = module_path(name)
    for part in layout.parts:
        key, expert = find_key(path, part)
        size = matrix_shape(layout, part, shape) if len(shape) in (2, 3) else (1, 1)
        slices: list[int | None] = list(range(shape[0])) if layout.stacked else [None]
        for i in slices:
            places.append(Place(key, expert if i is None else i, name, i, part, layout, size))
    return places


def find_key(path: Path, part: Part) -> tuple[str, int | None]:
    """The place of a part as a dotted name, and its expert."""
    first = next((i for i, word in enumerate(path) if word.isdigit()), None)
    if part.role in ("embed", "head") and first is None and path and path[-1] in _TABLE:
        return f"{part.role}.{_TABLE[path[-1]]}", None
    if part.role not in (*GROUPS["ffn"], *GROUPS["attention"], "router"):
        return ".".join(_SPELLING.get(word, word) for word in path), None
    if first is None:
        return ".".join([*path[:-1], part.role]), None
    inside = path[first + 1 :]
    expert = None
    if part.label is not None and part.label.startswith("expert="):
        expert = int(part.label.removeprefix("expert="))
    numbers = []
    for i, word in enumerate(inside):
        number = _NUMBER.fullmatch(word)
        if number and i and _EXPERTS.fullmatch(inside[i - 1]) or word.startswith("expert_"):
            expert = int(number[1]) if number else None
        elif number:
            numbers.append(word)
    marks = sorted({found[0].lower() for word in inside for found in [_MARK.search(word)] if found})
    block = _find_block(inside, part.role)
    return ".".join([*path[: first + 1], *numbers, *marks, block, part.role]), expert


def _find_block(inside: Path, role: str) -> str:
    """The kind of block inside a layer: self- or cross-attention, dense FFN, shared or routed experts."""
    if role in GROUPS["attention"]:
        crossing = any(ATTENTION_MODULE.fullmatch(word) and _CROSS.fullmatch(word) for word in inside)
        return "cross_attention" if crossing else "attention"
    if any(_SHARED.fullmatch(word) for word in inside):
        return "shared"
    if role == "router":
        return "router"
    routed = any(_EXPERTS.fullmatch(word) for word in inside) or inside[-1:] in (("input_linear",), ("output_linear",))
    return "experts" if routed or "moe" in inside else "ffn"


class PlaceIndex:
    """The matrices of one checkpoint by their places: those of the tensors that are not `settled`.

    `shapes` holds the size of the matrices in every place, settled or not: changes of prefix are voted on by all.
    """

    def __init__(
        self, layouts: Mapping[str, Layout], shapes: Mapping[str, tuple[int, ...]], settled: Container[str] = ()
    ) -> None:
        self.by_key: dict[str, dict[int | None, list[Place]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, layout in layouts.items():
            if len(shapes[name]) not in (2, 3):
                continue
            for place in find_places(name, layout, shapes[name]):
                self.shapes.setdefault(place.key, place.shape)
                if name not in settled:
                    self.by_key.setdefault(place.key, {}).setdefault(place.expert, []).append(place)
