"""The pairing of a LoRA adapter with a base: which tensors it changes, their orientation, ranks and scalings.

No torch, no tensor data.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cached_property

from pome.checkpoint.header import TensorEntry
from pome.checkpoint.lora import (
    AdapterChange,
    LoraTensors,
    LowRank,
    MatchedAdapter,
    check_rank,
    group_keys,
    refuse_shape,
)
from pome.checkpoint.lora_config import MERGE_FIRST, LoraConfig
from pome.checkpoint.lora_experts import ExpertMatcher
from pome.checkpoint.lora_places import MatrixIndex
from pome.checkpoint.lora_tables import AS_ADAPTER, TABLES, TableMatcher
from pome.checkpoint.source import Checkpoint
from pome.errors import CheckpointError, PairingError, printable
from pome.roles.pairing import pair_names
from pome.roles.roles import find_layout

_OWN_EXPERT = re.compile(r"experts\.(\d+)\.[^.]+$")


def match_adapter(ft: Checkpoint, base: Checkpoint, *, merges: bool) -> MatchedAdapter:
    """The change that the adapter `ft` makes to each tensor of BASE.

    With `merges` BASE's tensors are to hold the changes, and what they cannot hold is refused. Without, those tensors
    of the adapter are listed as unmatched.

    Raises CheckpointError for an adapter that is broken or of a kind not known here, and PairingError for one that
    does not fit BASE: keys that match no tensor, other shapes.
    """
    return _Matcher(ft, base, merges).match()


class _Matcher:
    """The state while one adapter is paired with one base."""

    def __init__(self, ft: Checkpoint, base: Checkpoint, merges: bool) -> None:
        self.ft, self.base, self.merges = ft, base, merges
        self.config = LoraConfig(ft)
        self.tensors = group_keys(ft)
        self.shapes = {name: entry.shape for name, (_, entry) in base.tensors.items()}
        self.found = MatchedAdapter()
        self.names = self._pair()
        self.tables = TableMatcher(ft, base, self.config, self.names, merges)

    def match(self) -> MatchedAdapter:
        found = self.found
        for plain, entry in self.tensors.replacements.items():
            self.tables.match_replacement(plain, entry, found)
        for module, entry in self.tensors.tokens.items():
            self.tables.match_tokens(module, entry, found)
        stacks: dict[str, list[LoraTensors]] = {}
        for lora in self.tensors.loras:
            name = self.names.get(f"{lora.module}.weight")
            if self.tables.match_lora(lora, found):
                continue
            if name is not None and lora.depth == 0 and len(self.shapes[name]) == 2:
                self._match_matrix(lora, name)
            elif lora.depth > 0 or not self._match_by_role(lora):
                stacks.setdefault(lora.module, []).append(lora)
        for module, levels in stacks.items():
            changes = self.experts.match(module, sorted(levels, key=lambda lora: -lora.depth))
            if changes is None:
                found.unused += [entry.name for lora in levels for entry in lora.tensors.values()]
            for change in changes or ():
                found.put(self.ft, change)
        if found.unused:
            shown = ", ".join(printable(key, 120) for key in found.unused[:3])
            more = f" and {len(found.unused) - 3} more" if len(found.unused) > 3 else ""
            raise PairingError(
                f"{printable(self.ft.source)}: {len(found.unused)} of the adapter's {len(self.ft.tensors)} keys match "
                f"no tensor of {printable(self.base.source)}: {shown}{more}; give as BASE the model it was trained on, "
                f"{MERGE_FIRST}"
            )
        return found

    @cached_property
    def matrices(self) -> MatrixIndex:
        return MatrixIndex(self.base)

    @cached_property
    def experts(self) -> ExpertMatcher:
        return ExpertMatcher(self.ft, self.base, self.config, self.names, self.matrices)

    def _pair(self) -> dict[str, str]:
        """Names in the model -> names in BASE, which may lack a prefix or have another.

        The sides of a shape are compared without their order, for the orientation of a matrix is decided later.
        """
        wanted = {plain: entry.shape for plain, entry in self.tensors.replacements.items()}
        for module, entry in self.tensors.tokens.items():
            wanted.setdefault(f"{module}.weight", entry.shape)
        for lora in self.tensors.loras:
            a, b = lora.pair
            size = (b.shape[0], a.shape[1])
            wanted.setdefault(f"{lora.module}.weight", size[::-1] if lora.is_embedding else size)
            if f"{lora.module}.bias" not in wanted and "lora_B.bias" in lora.tensors:
                wanted[f"{lora.module}.bias"] = (b.shape[0],)
            for name in self.config.list_targets(lora.module):
                experts = a.shape[0] // self.config.resolve_rank(name)
                wanted[name] = (experts, *size)
        sorted_base = {name: tuple(sorted(shape)) for name, shape in self.shapes.items()}
        names = pair_names(sorted_base, {name: tuple(sorted(shape)) for name, shape in wanted.items()})
        return names | self._pair_by_role({name: shape for name, shape in wanted.items() if name not in names}, names)

    def _pair_by_role(self, wanted: dict[str, tuple[int, ...]], names: dict[str, str]) -> dict[str, str]:
        """The whole tensors and the tables among `wanted` that BASE has under another name: by role and shape."""
        found: dict[str, str] = {}
        whole = self.tensors.replacements.keys() | {f"{module}.weight" for module in self.tensors.tokens}
        taken = set(names.values())
        sizes = {lora.module: (lora.pair[1].shape[0], lora.pair[0].shape[1]) for lora in self.tensors.loras}
        for plain, shape in wanted.items():
            module = plain.removesuffix(".weight").removesuffix(".bias")
            if plain.endswith(".bias") and len(shape) == 1 and module in sizes:
                bias = self._find_bias(module, sizes[module])
                if bias is not None and bias not in taken:
                    found[plain] = bias
                    taken.add(bias)
            if len(shape) != 2:
                continue
            roles = {part.role for part in find_layout(plain, shape, self.base.config).parts}
            fitting: list[str] = []
            if roles <= TABLES:
                rows = shape[0] if module not in self.tensors.tokens else None
                fitting = self.matrices.find_tables(roles, shape[1], rows)
            elif plain in whole:
                matrices = self.matrices.find_module(module, (shape[0], shape[1]))
                fitting = [one.name for one in matrices if one.part.block is None and not one.layout.stacked]
            if len(fitting) == 1 and fitting[0] not in taken:
                found[plain] = fitting[0]
                taken.add(fitting[0])
        return found

    def _match_matrix(self, lora: LoraTensors, name: str) -> None:
        """A LoRA of a module whose weight BASE stores under the module's name."""
        a, b = lora.pair
        out_in, shape = (b.shape[0], a.shape[1]), self.shapes[name]
        if lora.is_embedding:
            kind, flipped = "embedding", True
        elif self.config.is_target(f"{lora.module}.weight"):
            kind, flipped = "parameter", False
        else:
            # As in PEFT the kind of module decides, whatever fan_in_fan_out says; only a square matrix leaves a doubt.
            square = shape[0] == shape[1]
            told = bool(self.config.get("fan_in_fan_out")) or find_layout(name, shape, self.base.config).transposed
            kind, flipped = self._kind_of(lora), told if square else shape != out_in
        if shape != (out_in[::-1] if flipped else out_in):
            refuse_shape(self.ft, self.base, lora, name, shape)
        low = self._make_low(lora, kind, flipped)
        self.found.put(self.ft, AdapterChange(name, lows=(low,)))
        bias = lora.tensors.get("lora_B.bias")
        if bias is not None:
            beside = self.names.get(f"{lora.module}.bias")
            if beside is None and self.merges:
                raise PairingError(
                    f"{self.ft.where(bias.name)}: the adapter adds a bias, and BASE's {printable(lora.module)} has "
                    f"none; {AS_ADAPTER}"
                )
            if beside is None:
                self.found.unmatched.append(bias.name)
            else:
                self._put_bias(beside, bias, lora)

    def _put_bias(self, name: str, bias: TensorEntry, lora: LoraTensors) -> None:
        """The bias of lora_B, which PEFT scales and adds to that of the module."""
        _, scaling = self.config.resolve(lora.module)
        self.found.put(self.ft, AdapterChange(name, bias=(bias.name, scaling)))

    def _find_bias(self, module: str, size: tuple[int, int]) -> str | None:
        """The bias of a module that BASE has under another name."""
        matrices = self.matrices.find_module(module, size)
        if len(matrices) != 1 or matrices[0].part.block is not None or not matrices[0].name.endswith(".weight"):
            return None
        name = f"{matrices[0].name.removesuffix('weight')}bias"
        return name if self.shapes.get(name) == size[:1] else None

    def _match_by_role(self, lora: LoraTensors) -> bool:
        """A LoRA of a module that BASE stores under another name, packed or split: by layer, role and expert."""
        a, b = lora.pair
        is_stack = "expert" in lora.module.rpartition(".")[2]  # a parameter of which may be targeted
        if lora.is_embedding or is_stack:
            return False
        matrices = self.matrices.find_module(lora.module, (b.shape[0], a.shape[1]))
        bias = lora.tensors.get("lora_B.bias")
        if bias is not None and matrices:
            beside = self._find_bias(lora.module, (b.shape[0], a.shape[1]))
            if beside is None:
                return False
            self._put_bias(beside, bias, lora)
        kind = "parameter" if self.config.is_target(f"{lora.module}.weight") else self._kind_of(lora)
        expert = _OWN_EXPERT.search(lora.module)
        at = 0
        for matrix in matrices:
            low = self._make_low(lora, kind, matrix.layout.transposed)
            rows = matrix.size[0]
            low = replace(
                low,
                rows=(at, at + rows) if len(matrices) > 1 else None,
                part=matrix.part if matrix.part.block is not None else None,
                slot=int(expert[1]) if expert is not None and matrix.layout.stacked else None,
            )
            if low.magnitude is not None and low.rows is not None:
                raise PairingError(f"{self.ft.where(a.name)}: a DoRA of matrices that BASE stores apart; {MERGE_FIRST}")
            self.found.put(self.ft, AdapterChange(matrix.name, lows=(low,)))
            at += rows
        return bool(matrices)

    def _kind_of(self, lora: LoraTensors) -> str:
        """How PEFT rounds the change: transformers 5 holds single experts stacked, and PEFT merges into the stack."""
        return "expert" if _OWN_EXPERT.search(lora.module) else "linear"

    def _make_low(self, lora: LoraTensors, kind: str, flipped: bool) -> LowRank:
        a, b = lora.pair
        # PEFT finds rank and alpha of a parameter by its own name, and of a module by the module's.
        key = f"{lora.module}.weight" if kind == "parameter" else lora.module
        rank, scaling = check_rank(self.ft, self.config, lora, key, 1)
        magnitude = lora.tensors.get("lora_magnitude_vector")
        if bool(self.config.get("use_dora")) != (magnitude is not None) or (
            magnitude is not None and math.prod(magnitude.shape) != b.shape[0]
        ):
            raise CheckpointError(
                f"{self.ft.where(a.name)}: use_dora is {bool(self.config.get('use_dora'))}, but its "
                f"lora_magnitude_vector is {'absent' if magnitude is None else list(magnitude.shape)}; save or "
                "download the adapter again"
            )
        name = magnitude.name if magnitude else None
        return LowRank(key, a.name, b.name, rank, scaling, kind, flipped, magnitude=name)
