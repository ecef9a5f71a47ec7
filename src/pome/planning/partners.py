"""Partners of FT's matrices in BASE: whole tensors by name, and matrices by their place in the model. No torch.

A tensor of BASE with FT's name and shape is its partner. Where there is none (experts packed on one side and separate
on the other, fused halves, another orientation, names of another release) each matrix is looked for by what it is.
"""

from __future__ import annotations

import functools
from collections.abc import Container
from dataclasses import dataclass

from pome.checkpoint.header import DTYPE_BITS
from pome.checkpoint.source import Checkpoint
from pome.errors import PairingError, printable
from pome.planning.selection import find_tensor_layouts
from pome.planning.units import BaseRange
from pome.roles.layout import Layout, Part
from pome.roles.names import module_path
from pome.roles.pairing import pair_names
from pome.roles.places import Place, PlaceIndex, find_places

# Stored rows of q and k differ between implementations of rotary embeddings; these names are those of the original
# one, whose rows are permuted when a checkpoint is converted.
_ORIGINAL_ROTARY = frozenset({"wq", "wk", "Wq", "Wk"})

# (slice of a stack or None, part) -> where BASE holds that matrix.
Found = dict[tuple[int | None, Part], BaseRange]


@dataclass
class Partners:
    """The partners in BASE of FT's tensors and matrices."""

    base: Checkpoint
    ft: Checkpoint

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """FT's tensors -> BASE's, by name."""
        shapes = [{name: entry.shape for name, (_, entry) in side.tensors.items()} for side in (self.base, self.ft)]
        return pair_names(*shapes)

    @functools.cached_property
    def reshaped(self) -> set[str]:
        """Tensors of FT whose partner by name has another shape."""
        return {n for n, other in self.names.items() if self._shape(n) != self.base.tensors[other][1].shape}

    def need_matrices(self, name: str, layout: Layout) -> bool:
        """Whether no partner by name is the same tensor, so that each matrix must be looked for."""
        roles = {part.role for part in layout.parts}
        known = not roles & {"other", "embed", "head"}
        return name not in self.names or (known and name in self.reshaped)

    def find_matrices(self, name: str, layout: Layout) -> Found:
        """Ranges of BASE with the matrices of a tensor, without what BASE lacks. Raises PairingError in doubt."""
        found: Found = {}
        for place in find_places(name, layout, self._shape(name)):
            partner = self._find_partner(place)
            if partner is not None:
                found[place.slice, place.part] = self._locate(partner)
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.ft.tensors[name][1].shape

    @functools.cached_property
    def _sides(self) -> tuple[PlaceIndex, PlaceIndex]:
        """The places of BASE's and FT's matrices that are no tensors with a partner by name."""
        settled = {n: other for n, other in self.names.items() if n not in self.reshaped}
        taken = set(settled.values())
        return self._index(self.base, taken), self._index(self.ft, settled)

    def _index(self, side: Checkpoint, settled: Container[str]) -> PlaceIndex:
        shapes = {name: entry.shape for name, (_, entry) in side.tensors.items()}
        layouts = find_tensor_layouts(side)
        return PlaceIndex(layouts, shapes, settled)

    @functools.cached_property
    def _keys(self) -> dict[str, str]:
        """FT's places -> BASE's, which may have another prefix."""
        base, ft = self._sides
        return pair_names(base.shapes, ft.shapes)

    def _find_partner(self, place: Place) -> Place | None:
        base, ft = self._sides
        key = self._keys.get(place.key)
        experts = base.by_key.get(key or "", {})
        mine = ft.by_key.get(place.key, {})
        if not experts:
            return None
        if place.expert is not None and mine and len(experts) != len(mine):
            raise PairingError(
                f"{self.ft.where(place.name)}: it is one of {len(mine)} experts, BASE has {len(experts)} in that "
                "layer, and an expert's number says nothing of where it comes from; leave them out with --exclude"
            )
        candidates = experts.get(place.expert, [])
        rivals = mine.get(place.expert, [place])
        if len(candidates) != 1 or len(rivals) != 1:
            candidates = self._choose_by_words(place, candidates, rivals)
        if not candidates:
            return None
        (partner,) = candidates
        if partner.name == self.names.get(place.name) and partner.layout == place.layout:
            return None  # stored like FT's, except for its shape
        if partner.shape != place.shape:
            raise PairingError(
                f"{self.ft.where(place.name)}: its {place.part.role} matrix is {list(place.shape)}, that of BASE's "
                f"{printable(partner.name)} is {list(partner.shape)}; is {printable(self.base.source)} the model it "
                "was trained from? leave it out with --exclude to edit the others"
            )
        leaves = [module_path(one.name)[-1] in _ORIGINAL_ROTARY for one in (place, partner)]
        if place.part.role in ("q", "k") and leaves[0] != leaves[1]:
            raise PairingError(
                f"{self.ft.where(place.name)}: BASE's {printable(partner.name)} may hold the same rows, or the rows "
                "in the order of another rotary embedding; convert one checkpoint to the other's layout, or leave it "
                "out with --exclude"
            )
        return partner

    def _choose_by_words(self, place: Place, candidates: list[Place], rivals: list[Place]) -> list[Place]:
        """The one of several matrices in a place whose name agrees inside the layer. Raises PairingError in doubt."""
        agreeing = [one for one in candidates if one.around == place.around]
        same = [one for one in rivals if one.around == place.around]
        if len(agreeing) == 1 and len(same) == 1:
            return agreeing
        if len(candidates) > 1:
            readings = " and ".join(f"BASE's {printable(one.name)}" for one in candidates[:2])
            raise PairingError(
                f"{self.ft.where(place.name)}: {readings} are both the {place.part.role} matrix of that place; give as "
                "BASE a checkpoint that holds only one of them, or leave it out with --exclude"
            )
        if candidates and not any(one.around == candidates[0].around for one in rivals if one.name != place.name):
            readings = " and ".join(printable(one.name) for one in rivals[:2])
            raise PairingError(
                f"{printable(self.ft.source)}: {readings} may both be trained from BASE's "
                f"{printable(candidates[0].name)}; leave one of them out with --exclude"
            )
        return []

    def _locate(self, place: Place) -> BaseRange:
        _, entry = self.base.tensors[place.name]
        rows, columns = entry.shape[-2:]
        row = columns * DTYPE_BITS[entry.dtype] // 8
        start = entry.start + (place.slice or 0) * rows * row
        block = place.part.block
        if block is not None and block.axis == 0 and block.count == 1:  # rows that lie together are read alone
            start, rows, block = start + block.start * row, block.size, None
        return BaseRange(place.name, entry.dtype, start, rows * row, (rows, columns), block, place.layout.transposed)
