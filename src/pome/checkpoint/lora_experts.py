"""LoRAs of stacked experts: the tensors of BASE that hold the parameter, and the orientation of factors. No torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from pome.checkpoint.lora import AdapterChange, LoraTensors, LowRank, check_rank, refuse_shape
from pome.checkpoint.lora_config import MERGE_FIRST, LoraConfig
from pome.checkpoint.lora_places import MatrixIndex
from pome.checkpoint.source import Checkpoint
from pome.errors import CheckpointError, PairingError, printable
from pome.roles.experts import STACKS
from pome.roles.families import family_of
from pome.roles.model_config import config_of


class ExpertMatcher:
    """The pairing of LoRAs on parameters of experts with the tensors of one base."""

    def __init__(
        self, ft: Checkpoint, base: Checkpoint, config: LoraConfig, names: Mapping[str, str], matrices: MatrixIndex
    ) -> None:
        """`names` maps names in the adapter's model to BASE's names, where those are known already."""
        self.ft, self.base, self.config, self.names, self.matrices = ft, base, config, names, matrices
        self.shapes = {name: entry.shape for name, (_, entry) in base.tensors.items()}

    def match(self, module: str, levels: list[LoraTensors]) -> list[AdapterChange] | None:
        """The changes that the LoRAs of one module's parameters make, innermost first; None: BASE has no such module.

        Keys do not say which LoRA belongs to which parameter, so their shapes decide.
        """
        params = [name for name in self.config.list_targets(module) if self._find_stored(name)]
        fits = [
            order
            for order in itertools.permutations(params, len(levels))
            if all(self._matches(lora, name) for lora, name in zip(levels, order, strict=True))
        ]
        if not fits:
            if params:
                stored = self._find_stored(params[0])[0][0]
                refuse_shape(self.ft, self.base, levels[0], stored, self.shapes[stored])
            return None
        if len(fits) > 1:
            where = self.ft.where(levels[0].pair[0].name)
            raise PairingError(f"{where}: fits several parameters of {printable(module)}; {MERGE_FIRST}")
        return [
            change for lora, name in zip(levels, fits[0], strict=True) for change in self._change_parameter(lora, name)
        ]

    def _change_parameter(self, lora: LoraTensors, name: str) -> Iterator[AdapterChange]:
        a, b = lora.pair
        extra = sorted(lora.tensors.keys() - {"lora_A", "lora_B"})
        if extra:
            raise CheckpointError(f"{self.ft.where(a.name)}: {', '.join(extra)} on stacked experts; {MERGE_FIRST}")
        stored = self._find_stored(name)
        stacked = len(self.shapes[stored[0][0]]) == 3
        experts = self.shapes[stored[0][0]][0] if stacked else len(stored)
        rank, scaling = check_rank(self.ft, self.config, lora, name, experts)
        # Of a single matrix PEFT takes the rows for `out`, in every release.
        flipped = (stacked or experts > 1) and self._is_flipped(lora, stored[0])
        low = LowRank(name, a.name, b.name, rank, scaling, "parameter", flipped, experts)
        for expert, leaves in enumerate(stored):
            at = 0
            for leaf in leaves:
                rows = self.shapes[leaf][-2]
                part = replace(
                    low,
                    expert=None if stacked else expert,
                    rows=(at, at + rows) if len(leaves) > 1 else None,
                )
                yield AdapterChange(leaf, lows=(part,))
                at += rows

    def _is_flipped(self, lora: LoraTensors, leaves: tuple[str, ...]) -> bool:
        """Whether the product B A of one expert is the transpose of what BASE stores. Raises PairingError.

        The shapes tell, but for a square one: there the release of PEFT decides, which the config names.
        """
        a, b = lora.pair
        rows, columns = self._size(leaves)
        if rows != columns:
            return (b.shape[0], a.shape[1]) != (rows, columns)
        facts = config_of(leaves[0], self.base.config)
        family = family_of(facts)
        # PEFT takes the first axis after the experts for `in` where transformers marks them as (E, in, out).
        in_out = family.marked_in_out or self.config.reads_experts_as_in_out()
        if in_out is None or family.turned_on_load:
            raise PairingError(
                f"{self.ft.where(a.name)}: the experts of {printable(leaves[0])} are square, and releases of PEFT "
                f"(up to 0.18, from 0.19 on) and transformers differ in which side is which; {MERGE_FIRST}"
            )
        stacked = len(self.shapes[leaves[0]]) == 3
        held_in_out = family.experts == "in_out"  # in the model
        return in_out != ((stacked and held_in_out) != held_in_out)

    def _size(self, leaves: tuple[str, ...]) -> tuple[int, int]:
        """(rows, columns) of one expert, the tensors of it below each other."""
        return sum(self.shapes[leaf][-2] for leaf in leaves), self.shapes[leaves[0]][-1]

    def _find_stored(self, name: str) -> list[tuple[str, ...]]:
        """The tensors of BASE that hold a stacked parameter: one tuple of a stack, or one for each expert."""
        fused = self.names.get(name) or (name if name in self.shapes else None)
        if fused is not None:
            return [(fused,)]
        module, _, leaf = name.rpartition(".")
        roles, names = STACKS.get(leaf, ((), ()))
        for around in self._list_prefixes(module):
            for leaves in names:
                stored = []
                for expert in itertools.count():
                    tensors = tuple(f"{around}.{expert}.{one}.weight" for one in leaves)
                    if not all(tensor in self.shapes and len(self.shapes[tensor]) == 2 for tensor in tensors):
                        break
                    stored.append(tensors)
                if stored:
                    return stored
        # Only a module of experts has stacks, though `target_parameters` may name a parameter of any module.
        return self.matrices.find_stack(module, roles) if roles and "expert" in module.rpartition(".")[2] else []

    def _list_prefixes(self, module: str) -> Iterator[str]:
        """The names that a module of experts may have in BASE."""
        prefixes = {(old, new) for old, new in self.names.items() if old != new}
        changes = {(old[: -len(end)], new[: -len(end)]) for old, new in prefixes if (end := _common_end(old, new))}
        for old, new in [("", ""), *sorted(changes)]:
            if module.startswith(old):
                moved = new + module[len(old) :]
                yield moved
                yield re.sub(r"\.mlp\.experts$", ".block_sparse_moe.experts", moved)

    def _matches(self, lora: LoraTensors, name: str) -> bool:
        """Whether the factors of a LoRA have the sizes of a parameter, in either orientation."""
        a, b = lora.pair
        stored = self._find_stored(name)
        shape = self.shapes[stored[0][0]]
        experts = shape[0] if len(shape) == 3 else len(stored)
        size = self._size(stored[0])
        sizes = (size, size[::-1]) if len(shape) == 3 or experts > 1 else (size,)
        return a.shape[0] % experts == 0 and (b.shape[0], a.shape[1]) in sizes


def _common_end(old: str, new: str) -> str:
    """The longest common ending of whole words."""
    count = 0
    for one, other in zip(reversed(old.split(".")), reversed(new.split(".")), strict=False):
        if one != other:
            break
        count += 1
    return ".".join(old.split(".")[-count:]) if count else ""
