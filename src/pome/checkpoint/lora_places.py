"""The matrices of a base by layer, role and expert: where a module is stored whose name in the model is another one.

Releases of transformers rename modules inside a layer, pack single experts into stacks, and split or fuse
projections while they load a file. An adapter has the names of the model, a checkpoint those of the file. No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pome.checkpoint.source import Checkpoint
from pome.errors import PairingError, printable
from pome.roles.layout import Layout, Part, matrix_shape
from pome.roles.pairing import TOWERS
from pome.roles.roles import find_layout, find_layouts

_STORED = ("F64", "F32", "F16", "BF16")
_CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)
_UNKNOWN = ("other", "embed", "head")

Key = tuple[tuple[int, ...], frozenset[str], str]


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix of BASE: a part of a stored tensor, or of every expert of a stacked one."""

    name: str
    part: Part
    layout: Layout
    size: tuple[int, int]  # (fan_out, fan_in)
    expert: int | None  # of a tensor that holds a single expert


class MatrixIndex:
    """The matrices of a base by layer numbers, kind of module and role."""

    def __init__(self, base: Checkpoint) -> None:
        self.config = base.config
        self.shapes = {
            name: entry.shape
            for name, (_, entry) in base.tensors.items()
            if len(entry.shape) in (2, 3) and entry.dtype in _STORED
        }
        self.layouts = find_layouts(self.shapes, base.config)
        self.has_decoder = any("decoder" in name.split(".") for name in self.shapes)
        self._matrices: dict[Key, list[StoredMatrix]] = {}
        for name, layout in self.layouts.items():
            if len(self.shapes[name]) == 3 and not layout.stacked:
                continue
            for part in layout.parts:
                if part.role not in _UNKNOWN:
                    key, expert = self._identify(name, part.role, layout.stacked)
                    size = matrix_shape(layout, part, self.shapes[name])
                    self._matrices.setdefault(key, []).append(StoredMatrix(name, part, layout, size, expert))

    def find_module(self, module: str, size: tuple[int, int]) -> list[StoredMatrix]:
        """The matrices that a linear module of the model with a weight of `size` is, in the order of its rows.

        Empty where nothing fits. Raises PairingError where two matrices of BASE fit equally well.
        """
        layout = find_layout(f"{module}.weight", size, self.config)
        found = []
        for part in layout.parts:
            if part.role in _UNKNOWN:
                return []
            if len(layout.parts) > 1 and (part.block is None or part.block.count != 1 or part.block.axis != 0):
                return []  # rows of several matrices that alternate
            rows = size if part.block is None else (part.block.size, size[1])
            key, expert = self._identify(module, part.role, False)
            fitting = [
                matrix
                for matrix in self._matrices.get(key, [])
                if matrix.size == rows and (matrix.expert == expert or matrix.layout.stacked)
            ]
            if len(fitting) > 1:
                both = " and ".join(printable(matrix.name) for matrix in fitting[:2])
                raise PairingError(
                    f"{printable(module)}: BASE's {both} fit it equally well by layer, role and shape; give as BASE a "
                    "checkpoint that has the module under its own name"
                )
            found += fitting
        return found if len(found) == len(layout.parts) else []

    def find_tables(self, roles: set[str], columns: int, rows: int | None) -> list[str]:
        """The embeddings or heads of a number of columns, and of rows where that is known."""
        return [
            name
            for name, layout in self.layouts.items()
            if {part.role for part in layout.parts} == roles
            and self.shapes[name][1:] == (columns,)
            and rows in (None, self.shapes[name][0])
        ]

    def find_stack(self, module: str, roles: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The tensors that hold a stacked parameter of the model with matrices of `roles`, one below the other.

        One tuple for a stack, of one tensor or of one for each role; one tuple for each expert stored by itself.
        """
        matrices = [self._matrices.get(self._identify(module, role, True)[0], []) for role in roles]
        if not all(matrices):
            return []
        if all(len(found) == 1 and found[0].layout.stacked for found in matrices):
            names = tuple(dict.fromkeys(found[0].name for found in matrices))
            whole = len(names) == 1 and self._is_in_order(self.layouts[names[0]], roles)
            separate = len(names) == len(roles) and all(found[0].part.block is None for found in matrices)
            return [names] if whole or separate else []
        by_expert = [{matrix.expert: matrix.name for matrix in found} for found in matrices]
        count = len(matrices[0])
        if any(len(found) != count or found.keys() != set(range(count)) for found in by_expert):
            return []
        return [tuple(found[expert] for found in by_expert) for expert in range(count)]

    def _is_in_order(self, layout: Layout, roles: tuple[str, ...]) -> bool:
        if tuple(part.role for part in layout.parts) != roles:
            return False
        return len(roles) == 1 or all(part.block is not None and part.block.count == 1 for part in layout.parts)

    def _identify(self, name: str, role: str, stacked: bool) -> tuple[Key, int | None]:
        """(layer numbers, kind of module, role) of a name, and the number of its expert."""
        words = name.split(".")
        numbers, expert = [], None
        for before, word in zip(["", *words], words, strict=False):
            if not word.isdigit():
                continue
            if "expert" in before and "share" not in before:
                expert = int(word)
            else:
                numbers.append(int(word))
        kind = {word for word in words if word in TOWERS and word != "shared"}
        if not self.has_decoder:
            kind.discard("encoder")  # a wrapper, where it has no counterpart
        if any("share" in word for word in words):
            kind.add("shared expert")
        elif stacked or expert is not None or any("expert" in word for word in words):
            kind.add("expert")
        if any(_CROSS.search(word) for word in words):
            kind.add("cross-attention")
        return (tuple(numbers), frozenset(kind), role), expert
