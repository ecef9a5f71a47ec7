"""LoRAs of stacked experts: which tensors of BASE hold the parameter, stacked or one expert at a time. No torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from pome.checkpoint.lora import AdapterChange, LoraTensors, LowRank, check_rank, refuse_shape
from pome.checkpoint.lora_config import MERGE_FIRST, LoraConfig
from pome.checkpoint.source import Checkpoint
from pome.errors import CheckpointError, PairingError, printable
from pome.roles.families import family_of
from pome.roles.model_config import config_of

# Fused experts as transformers holds them -> the leaves of single experts as checkpoints store them.
_SPLIT = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


class ExpertMatcher:
    """The pairing of LoRAs on parameters of experts with the tensors of one base."""

    def __init__(self, ft: Checkpoint, base: Checkpoint, config: LoraConfig, names: Mapping[str, str]) -> None:
        """`names` maps names in the adapter's model to BASE's names, where those are known already."""
        self.ft, self.base, self.config, self.names = ft, base, config, names
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
        stacked = len(stored) == 1 and len(stored[0]) == 1 and len(self.shapes[stored[0][0]]) == 3
        experts = self.shapes[stored[0][0]][0] if stacked else len(stored)
        rank, scaling = check_rank(self.ft, self.config, lora, name, experts)
        low = LowRank(name, a.name, b.name, rank, scaling, "parameter", False, experts)
        if stacked:
            tensor = stored[0][0]
            rows, columns = self.shapes[tensor][1:]
            # PEFT takes the first axis after the experts for `in` where transformers marks them as (E, in, out).
            if rows == columns and not family_of(config_of(tensor, self.base.config)).marked_in_out:
                raise PairingError(
                    f"{self.ft.where(a.name)}: the experts of {printable(tensor)} are square, and releases of PEFT "
                    f"differ in which side is which; {MERGE_FIRST}"
                )
            flipped = rows == columns or (b.shape[0], a.shape[1]) != (rows, columns)
            yield AdapterChange(tensor, low=replace(low, flipped=flipped))
            return
        for expert, leaves in enumerate(stored):
            at = 0
            for leaf in leaves:
                rows = self.shapes[leaf][0]
                part = replace(low, expert=expert, rows=(at, at + rows) if len(leaves) > 1 else None)
                yield AdapterChange(leaf, low=part)
                at += rows

    def _find_stored(self, name: str) -> list[tuple[str, ...]]:
        """The tensors of BASE that hold a stacked parameter: one for all experts, or each expert's own, gate first."""
        fused = self.names.get(name) or (name if name in self.shapes else None)
        if fused is not None:
            return [(fused,)]
        module, _, leaf = name.rpartition(".")
        for around in self._list_prefixes(module):
            for leaves in _SPLIT.get(leaf, ()):
                stored = []
                for expert in itertools.count():
                    tensors = tuple(f"{around}.{expert}.{one}.weight" for one in leaves)
                    if not all(tensor in self.shapes and len(self.shapes[tensor]) == 2 for tensor in tensors):
                        break
                    stored.append(tensors)
                if stored:
                    return stored
        return []

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
        """Whether the factors of a LoRA have the sizes of a parameter."""
        a, b = lora.pair
        stored = self._find_stored(name)
        shape = self.shapes[stored[0][0]]
        size = (b.shape[0], a.shape[1])
        if len(shape) == 3:
            return a.shape[0] % shape[0] == 0 and size in (shape[1:], shape[:0:-1])
        rows = sum(self.shapes[leaf][0] for leaf in stored[0])
        return a.shape[0] % len(stored) == 0 and size == (rows, shape[1])


def _common_end(old: str, new: str) -> str:
    """The longest common ending of whole words."""
    count = 0
    for one, other in zip(reversed(old.split(".")), reversed(new.split(".")), strict=False):
        if one != other:
            break
        count += 1
    return ".".join(old.split(".")[-count:]) if count else ""
