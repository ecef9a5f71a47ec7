"""What the user selected: which tensors hold it, what is refused in it, and what there was to choose from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pome.checkpoint.header import TensorEntry
from pome.checkpoint.source import Checkpoint
from pome.errors import PairingError, printable
from pome.quantization import find_quantized
from pome.roles import GROUPS, Layout, describe
from pome.spec import EditSpec

EDITABLE = ("F64", "F32", "F16", "BF16")


class Selection:
    """What `--layers` and `--exclude` say of a tensor."""

    def __init__(self, spec: EditSpec) -> None:
        self._roles = {role for name in spec.layers for role in GROUPS.get(name, (name,))}
        self._patterns = [re.compile(name[3:]) for name in spec.layers if name.startswith("re:")]
        self._excluded = [re.compile(pattern) for pattern in spec.exclude]

    def match(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any] | None) -> Layout | None:
        """The layout of a tensor with its selected parts alone; None if it holds no selected matrix."""
        if any(pattern.search(name) for pattern in self._excluded):
            return None
        layout = describe(name, shape, config)
        if any(pattern.search(name) for pattern in self._patterns):
            return layout
        parts = tuple(part for part in layout.parts if part.role in self._roles)
        return Layout(parts, layout.transposed, layout.stacked) if parts and len(shape) >= 2 else None


def select(ft: Checkpoint, spec: EditSpec) -> Iterator[tuple[str, Layout]]:
    """Tensors that hold a selected matrix, each with the layout that has only its selected parts."""
    selection = Selection(spec)
    for name, (_, entry) in ft.tensors.items():
        layout = selection.match(name, entry.shape, ft.config)
        if layout is not None:
            yield name, layout


def refuse_quantized(side: Checkpoint, spec: EditSpec) -> None:
    """Raise PairingError if a selected weight of a checkpoint is stored quantized, naming format and way out."""
    selection = Selection(spec)
    for found in find_quantized(side.tensors, side.config):
        if selection.match(found.weight, found.shape, side.config) is not None:
            raise PairingError(
                f"{side.where(found.stored)}: quantized as {found.format}, which cannot be edited; {found.next_step}, "
                "or leave it out with --exclude"
            )


@dataclass(frozen=True)
class Group:
    """Candidates whose names differ in numbers alone."""

    pattern: str  # a regular expression over tensor names
    example: TensorEntry
    count: int
    role: str


def group_candidates(ft: Checkpoint) -> list[Group]:
    """The floating-point matrices of FT, grouped by name pattern, most bytes first."""
    members: dict[str, list[TensorEntry]] = {}
    for name, (_, entry) in ft.tensors.items():
        if len(entry.shape) in (2, 3) and entry.dtype in EDITABLE:
            pattern = re.sub(r"(?<![A-Za-z])\d+(?=\\\.|$)", r"\\d+", re.escape(name))
            members.setdefault(pattern, []).append(entry)
    groups = []
    for pattern, entries in members.items():
        roles = dict.fromkeys(part.role for part in describe(entries[0].name, entries[0].shape, ft.config).parts)
        groups.append(Group(pattern, entries[0], len(entries), "+".join(roles)))
    return sorted(groups, key=lambda g: -g.count * g.example.nbytes)


def explain_empty(ft: Checkpoint, spec: EditSpec) -> str:
    said = ", ".join(printable(name) for name in spec.layers)
    if spec.exclude:
        said += f" without {', '.join(printable(pattern) for pattern in spec.exclude)}"
    groups = group_candidates(ft)
    head = f"{printable(ft.source)}: no tensor matches --layers {said}"
    if not groups:
        return f"{head}; the checkpoint holds no floating-point matrix at all"
    lines = [f"{head}; its matrices are, and each line can be pasted:"]
    for group in groups[:20]:
        shape = " x ".join(map(str, group.example.shape))
        lines.append(f"  --layers 're:^{printable(group.pattern)}$'   {group.count} of {shape}, role {group.role}")
    if len(groups) > 20:
        lines.append(f"  ... and {len(groups) - 20} more patterns")
    return "\n".join(lines)
