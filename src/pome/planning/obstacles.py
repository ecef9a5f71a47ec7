"""Why a selected tensor cannot be edited. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import PairingError, printable
from pome.planning.selection import EDITABLE, PLACEHOLDER
from pome.roles.layout import Layout
from pome.roles.roles import find_layout

MISSING = "BASE has no such tensor"


def is_missing(reason: str) -> bool:
    """Whether a reason says that BASE lacks the tensor."""
    return reason == MISSING or reason.startswith("BASE's is empty")


def find_obstacle(
    name: str, layout: Layout, base: Checkpoint, ft: Checkpoint, pairs: dict[str, str], spec: EditSpec
) -> str | None:
    """Why a selected tensor cannot be edited, or None. A pair that must fit and does not is an error."""
    _, entry = ft.tensors[name]
    where = ft.where(name)
    reason = find_unfit(name, layout, ft)
    if reason is not None:
        return reason
    if name not in pairs:
        return MISSING
    _, base_entry = base.tensors[pairs[name]]
    if not all(base_entry.shape):
        return f"BASE's is empty, {PLACEHOLDER}"
    roles = {part.role for part in layout.parts}
    if roles == {"other"} and entry.dtype in ("I64", "BOOL"):
        return f"it holds no weights ({entry.dtype})"  # positions and masks, which some checkpoints store
    refuse_dtype(where, entry.dtype)
    refuse_dtype(base.where(pairs[name]), base_entry.dtype)
    if entry.shape != base_entry.shape:
        if roles <= {"embed", "head"}:
            if spec.common_rows and len(entry.shape) == 2 and entry.shape[1] == base_entry.shape[1]:
                return None
            return (
                f"its shape is {list(entry.shape)}, BASE's {list(base_entry.shape)} (another vocabulary; --common-rows "
                "edits the rows that both have)"
            )
        if roles == {"other"} and "other" in spec.layers:  # selected with everything, not by a pattern for this tensor
            return f"its shape is {list(entry.shape)}, BASE's {list(base_entry.shape)}"
        raise PairingError(
            f"{where}: its shape {list(entry.shape)} is not BASE's {list(base_entry.shape)}; is "
            f"{printable(base.source)} the model it was trained from? leave it out with --exclude to edit the others"
        )
    if base.config is not None and ft.config is not None:
        other = find_layout(pairs[name], base_entry.shape, base.config)
        if find_layout(name, entry.shape, ft.config) != other:
            models = [printable(str((side.config or {}).get("model_type"))) for side in (ft, base)]
            raise PairingError(
                f"{where}: FT ({models[0]}) and BASE ({models[1]}) store it differently (orientation, heads, halves), "
                "though the shapes agree; convert one checkpoint to the other's architecture"
            )
    return None


def find_unfit(name: str, layout: Layout, ft: Checkpoint) -> str | None:
    """Why a selected tensor of FT cannot be edited whatever BASE holds, or None."""
    shape = ft.tensors[name][1].shape
    if len(shape) < 2 or (len(shape) > 2 and not layout.stacked):
        return f"not a matrix: its shape is {list(shape)}"
    return None if all(shape) else "it is empty"


def refuse_dtype(where: str, dtype: str) -> None:
    """Raise PairingError for a tensor of a dtype that cannot be edited."""
    if dtype not in EDITABLE:
        raise PairingError(
            f"{where}: stored as {dtype}, which cannot be edited; save the checkpoint in bfloat16 first, or leave "
            "the tensor out with --exclude"
        )


def refuse_doubtful_squares(names: Iterable[str], base: Checkpoint, ft: Checkpoint, pairs: dict[str, str]) -> None:
    """Raise PairingError for a square matrix where others prove that one side stores (in, out) and the other (out, in).

    The shape of a square matrix cannot show it, and a config may be missing or may not say. Stacked experts prove
    nothing about plain matrices, and plain matrices nothing about experts.
    """
    shapes = {name: (ft.tensors[name][1].shape, base.tensors[other][1].shape) for name, other in pairs.items()}
    turned = {len(both[0]): name for name, both in reversed(shapes.items()) if _is_turned(*both)}
    for name in names:
        if shapes[name][0][-1] == shapes[name][0][-2] and len(shapes[name][0]) in turned:
            example = turned[len(shapes[name][0])]
            ours, theirs = shapes[example]
            raise PairingError(
                f"{ft.where(name)}: it is square, and FT and BASE store other matrices the other way round "
                f"({printable(example)} is {list(ours)}, BASE's {list(theirs)}); convert one checkpoint to the other's "
                "architecture"
            )


def _is_turned(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are of one matrix, or stack of them, stored both ways; a row and a column prove nothing."""
    return shape != other and len(shape) in (2, 3) and min(shape[-2:]) > 1 and (*other[:-2], *other[-2:][::-1]) == shape
