"""Likeness of BASE and FT in a few of their matrices: whether FT was trained from it. Loads torch when called.

Training moves weights a little: W_base and W_ft point the same way. Weights of two models that were trained apart, or
of one that was drawn anew, are as good as orthogonal, and no edit of their difference means anything.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass

from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import PairingError, printable
from pome.planning.units import Plan, Unit

SAMPLE = 8  # units looked at, spread over the depth
ALIKE = 0.3  # cosine of W_base and W_ft below which they are not one model before and after training
FAR = 0.3  # norm of the delta over the base's, above which BASE is in doubt
LARGEST = 1 << 14  # entries compared of one matrix, or one row: of larger ones the first rows


@dataclass(frozen=True)
class Likeness:
    """Likeness of a unit's two sides."""

    name: str
    cosine: float
    change: float  # norm_F(W_ft - W_base) / norm_F(W_base)


def check_base(base: Checkpoint, ft: Checkpoint, plan: Plan, spec: EditSpec) -> tuple[str, ...]:
    """Notes on how near BASE is to FT, by at most eight units of the plan.

    Full checkpoints only: an adapter is the change itself. Raises PairingError if over half of the sample have a cosine
    under 0.3, unless `spec.allow_other_base`.
    """
    if ft.adapter_config is not None:
        return ()
    found = [likeness for unit in sample_units(plan) if (likeness := _compare(unit, base, ft)) is not None]
    if not found:
        return ()
    sides = f"{printable(base.source)} is taken as pretrained, {printable(ft.source)} as trained from it"
    unlike = [item for item in found if item.cosine < ALIKE]
    if 2 * len(unlike) > len(found):
        worst = min(unlike, key=lambda item: item.cosine)
        said = (
            f"does not look like the model that FT was trained from: in {len(unlike)} of {len(found)} sampled tensors, "
            f"such as {printable(worst.name)}, W_base and W_ft have a cosine under {ALIKE} ({worst.cosine:.2f} there)"
        )
        if not spec.allow_other_base:
            raise PairingError(
                f"{printable(base.source)}: {said} ({sides}); give the pretrained model as BASE, or edit all the same "
                "with --allow-other-base"
            )
        return (f"warning: BASE {said}; {sides}",)
    change = statistics.median(item.change for item in found)
    if change > FAR:
        return (
            f"warning: the update is {change:.0%} of BASE's weights (median of {len(found)} sampled tensors), which is "
            f"far for a fine-tune: is BASE the right model? {sides}",
        )
    return ()


def sample_units(plan: Plan) -> list[Unit]:
    """At most eight units with edited matrices, evenly spread over the layers."""
    units = [unit for unit in plan.units if unit.parts and unit.change is None]
    units.sort(key=lambda unit: [int(word) if word.isdecimal() else -1 for word in unit.name.split(".")])
    count = min(SAMPLE, len(units))
    return [units[round(i * (len(units) - 1) / max(count - 1, 1))] for i in range(count)]


def _compare(unit: Unit, base: Checkpoint, ft: Checkpoint) -> Likeness | None:
    """The likeness of a unit's first edited matrix; None where a side is zero or not finite."""
    import torch

    from pome.editing.lora_merge import read_unit
    from pome.editing.unit import TORCH_DTYPES, take

    unit = _cut_rows(unit)
    mine, theirs = read_unit(unit, ft, base)
    if isinstance(mine, dict):
        return None
    sides = ((mine, unit.dtype), (theirs, unit.base_dtype))
    stored = [torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]).reshape(unit.shape) for data, dtype in sides]
    few = max(1, LARGEST // unit.shape[1])
    W, W_base = (take(side, unit.parts[0])[:few].double() for side in stored)
    old, new = float(W_base.square().sum()), float(W.square().sum())
    if not 0 < old < math.inf or not 0 < new < math.inf:
        return None
    inner, moved = float((W * W_base).sum()), float((W - W_base).square().sum())
    return Likeness(unit.name, inner / math.sqrt(old * new), math.sqrt(moved / old))


def _cut_rows(unit: Unit) -> Unit:
    """The first stored rows of a unit's first matrix as a unit, where both sides hold them in the same rows."""
    part, columns = unit.parts[0], unit.shape[1]
    rows = part.block if part.block is not None and part.block.axis == 0 else None
    first, count = (rows.start, rows.size) if rows else (0, unit.shape[0])
    count = min(count, max(1, LARGEST // columns))
    row, base_row = unit.nbytes // unit.shape[0], unit.base_nbytes // unit.shape[0]
    fewer = dataclasses.replace(
        unit,
        parts=(dataclasses.replace(part, block=None) if rows else part,),
        shape=(count, columns),
        start=unit.start + first * row,
        nbytes=count * row,
    )
    if not unit.base_parts:
        return dataclasses.replace(fewer, base_start=unit.base_start + first * base_row, base_nbytes=count * base_row)
    lies = unit.base_parts[0]
    if lies.block is not None or lies.transposed != unit.transposed or (part.block is not None and rows is None):
        return dataclasses.replace(unit, parts=(part,), base_parts=(lies,), base_dtype=lies.dtype)
    lies = dataclasses.replace(lies, shape=(count, columns), nbytes=count * (lies.nbytes // lies.shape[0]))
    return dataclasses.replace(fewer, base_parts=(lies,), base_dtype=lies.dtype)
