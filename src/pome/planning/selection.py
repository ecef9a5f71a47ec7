"""Selection of matrices by `--layers` and `--exclude`: tensors, refusals, and the candidates there were."""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from pome.checkpoint.header import TensorEntry
from pome.checkpoint.quantization import find_quantized
from pome.checkpoint.source import Checkpoint
from pome.checkpoint.wrapped import find_wrapped
from pome.choices import GROUPS
from pome.config.spec import EditSpec
from pome.errors import PairingError, printable
from pome.manifest import KeptRecord
from pome.roles.layout import Layout
from pome.roles.roles import find_layout, find_layouts

PLACEHOLDER = (
    "as DeepSpeed ZeRO-3 saves weights that other processes hold; gather them first (zero_to_fp32.py, or "
    "stage3_gather_16bit_weights_on_model_save)"
)
EDITABLE = ("F64", "F32", "F16", "BF16")


class Selection:
    """Filter of tensors by `--layers` and `--exclude`."""

    def __init__(self, spec: EditSpec) -> None:
        self._roles = {role for name in spec.layers for role in GROUPS.get(name, (name,))}
        self._patterns = [re.compile(name[3:]) for name in spec.layers if name.startswith("re:")]
        self._excluded = [re.compile(pattern) for pattern in spec.exclude]

    def match(self, name: str, shape: tuple[int, ...], layout: Layout) -> Layout | None:
        """The layout of a tensor with its selected parts alone; None if it holds no selected matrix."""
        if any(pattern.search(name) for pattern in self._excluded):
            return None
        if any(pattern.search(name) for pattern in self._patterns):
            return layout
        parts = tuple(part for part in layout.parts if part.role in self._roles)
        return Layout(parts, layout.transposed, layout.stacked) if parts and len(shape) >= 2 else None


def select(ft: Checkpoint, spec: EditSpec, reshaped: Container[str] = ()) -> Iterator[tuple[str, Layout]]:
    """Tensors that hold a selected matrix, each with the layout that has only its selected parts.

    The shape of a tensor that was `reshaped` (a resized vocabulary, say) tells nothing of its neighbours' roles.
    """
    selection = Selection(spec)
    layouts = find_tensor_layouts(ft, reshaped)
    for name, (_, entry) in ft.tensors.items():
        layout = selection.match(name, entry.shape, layouts[name])
        if layout is not None:
            yield name, layout


def find_placeholders(base: Checkpoint, ft: Checkpoint, names: Mapping[str, str], spec: EditSpec) -> list[KeptRecord]:
    """The empty tensors of FT in place of selected weights, found by the roles of BASE's tensors of those names."""
    empty = [n for n, (_, entry) in ft.tensors.items() if not all(entry.shape) and entry.dtype in EDITABLE]
    selection, layouts = Selection(spec), find_tensor_layouts(base) if empty else {}
    kept = []
    for name in empty:
        shape = base.tensors[names[name]][1].shape if name in names else ()
        if len(shape) > 1 and all(shape) and selection.match(name, shape, layouts[names[name]]) is not None:
            kept.append(KeptRecord(name, None, f"it is empty, {PLACEHOLDER}"))
    return kept


def find_tensor_layouts(side: Checkpoint, reshaped: Container[str] = ()) -> dict[str, Layout]:
    """The layout of every tensor; one stored as something else than floats shows no shape of a matrix."""
    shapes = {name: entry.shape for name, (_, entry) in side.tensors.items()}
    plain = {n: shape for n, shape in shapes.items() if side.tensors[n][1].dtype in EDITABLE and n not in reshaped}
    alone = {n: find_layout(n, shape, side.config) for n, shape in shapes.items() if n not in plain}
    return find_layouts(plain, side.config) | alone


def refuse_quantized(side: Checkpoint, spec: EditSpec) -> None:
    """Raise PairingError if a selected weight of a checkpoint is stored quantized, naming format and way out."""
    selection = Selection(spec)
    for found in find_quantized(side.tensors, side.config):
        layout = find_layout(found.weight, found.shape, side.config)
        if selection.match(found.weight, found.shape, layout) is not None:
            raise PairingError(
                f"{side.where(found.stored)}: quantized as {found.format}, which cannot be edited; {found.next_step}, "
                "or leave it out with --exclude"
            )


def refuse_wrapped(side: Checkpoint, spec: EditSpec) -> None:
    """Raise PairingError if a selected weight of a checkpoint is not what its model computes with."""
    selection = Selection(spec)
    for found in find_wrapped(side.tensors):
        shape = side.tensors[found.stored][1].shape
        if selection.match(found.stored, shape, find_layout(found.stored, shape, side.config)) is not None:
            raise PairingError(
                f"{side.where(found.stored)}: {found.wrapper} changes this weight ({printable(found.tensor)}); "
                f"{found.next_step}, or leave it out with --exclude"
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
    layouts = find_tensor_layouts(ft)
    for pattern, entries in members.items():
        roles = dict.fromkeys(part.role for part in layouts[entries[0].name].parts)
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
        option = f"--layers {shlex.quote(f're:^{group.pattern}$')}"
        if printable(group.pattern) != group.pattern:
            option = f"(a name that cannot be pasted) {printable(group.example.name)}"
        lines.append(f"  {option}   {group.count} of {shape}, role {group.role}")
    if len(groups) > 20:
        lines.append(f"  ... and {len(groups) - 20} more patterns")
    return "\n".join(lines)
