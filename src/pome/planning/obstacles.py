"""Why a selected tensor cannot be edited. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import PairingError, printable
from pome.planning.selection import EDITABLE
from pome.roles.layout import Layout
from pome.roles.roles import find_layout


def find_obstacle(
    name: str, layout: Layout, base: Checkpoint, ft: Checkpoint, pairs: dict[str, str], spec: EditSpec
) -> str | None:
    """Why a selected tensor cannot be edited, or None. A pair that must fit and does not is an error."""
    _, entry = ft.tensors[name]
    where = ft.where(name)
    if len(entry.shape) < 2 or (len(entry.shape) > 2 and not layout.stacked):
        return f"not a matrix: its shape is {list(entry.shape)}"
    if not all(entry.shape):
        return "it is empty"
    if name not in pairs:
        return "BASE has no such tensor"
    _, base_entry = base.tensors[pairs[name]]
    roles = {part.role for part in layout.parts}
    if roles == {"other"} and entry.dtype in ("I64", "BOOL"):
        return f"it holds no weights ({entry.dtype})"  # positions and masks, which some checkpoints store
    for side, dtype in ((where, entry.dtype), (base.where(pairs[name]), base_entry.dtype)):
        if dtype not in EDITABLE:
            raise PairingError(
                f"{side}: stored as {dtype}, which cannot be edited; save the checkpoint in bfloat16 first, or leave "
                "the tensor out with --exclude"
            )
    if entry.shape != base_entry.shape:
        if roles <= {"embed", "head"}:
            if spec.common_rows and len(entry.shape) == 2 and entry.shape[1] == base_entry.shape[1]:
                return None
            return (
                f"its shape is {list(entry.shape)}, BASE's {list(base_entry.shape)} (another vocabulary; --common-rows "
                "edits the rows that both have)"
            )
        if roles == {"other"} and "other" in spec.layers:  # everything was asked for, not this tensor by a pattern
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


def refuse_doubtful_squares(names: Iterable[str], base: Checkpoint, ft: Checkpoint, pairs: dict[str, str]) -> None:
    """Raise PairingError for a square matrix where others prove that one side stores (in, out) and the other (out, in).

    The shapes of a square one cannot show it, and a config may be missing or may not say.
    """
    shapes = {name: (ft.tensors[name][1].shape, base.tensors[other][1].shape) for name, other in pairs.items()}
    turned = next((name for name, both in shapes.items() if _is_turned(*both)), None)
    if turned is None:
        return
    ours, theirs = shapes[turned]
    for name in names:
        if shapes[name][0][-1] == shapes[name][0][-2]:
            raise PairingError(
                f"{ft.where(name)}: it is square, and FT and BASE store other matrices the other way round "
                f"({printable(turned)} is {list(ours)}, BASE's {list(theirs)}); convert one checkpoint to the other's "
                "architecture"
            )


def _is_turned(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are of one matrix, or stack of them, stored both ways; a row and a column prove nothing."""
    return shape != other and len(shape) in (2, 3) and min(shape[-2:]) > 1 and (*other[:-2], *other[-2:][::-1]) == shape
