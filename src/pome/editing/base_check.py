"""Likeness of BASE and FT in a few of their matrices: whether FT was trained from it. Loads torch when called.

Training moves weights a little: W_base and W_ft point the same way. Weights of two models that were trained apart, or
of one that was drawn anew, are as good as orthogonal, and no edit of their difference means anything.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass

from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import PairingError, printable
from pome.planning.units import Plan, Unit

SAMPLE = 8  # units looked at, spread over the depth
ALIKE = 0.3  # cosine of W_base and W_ft below which they are not one model before and after training
FAR = 0.3  # norm of the delta beside the base's, above which BASE is in doubt
LARGEST = 1 << 22  # entries compared of one matrix: of larger ones the first rows


@dataclass(frozen=True)
class Likeness:
    """How near a unit's two sides are."""

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
    """The likeness of a unit's edited matrices; None where a side is zero or not finite."""
    import torch

    from pome.editing.lora_merge import read_unit
    from pome.editing.unit import TORCH_DTYPES, take

    rows, columns = unit.shape
    if rows * columns > LARGEST and not unit.base_parts and all(part.block is None for part in unit.parts):
        few = max(1, LARGEST // columns)
        sizes = unit.nbytes // rows * few, unit.base_nbytes // rows * few
        unit = dataclasses.replace(unit, shape=(few, columns), nbytes=sizes[0], base_nbytes=sizes[1])
    mine, theirs = read_unit(unit, ft, base)
    if isinstance(mine, dict):
        return None
    stored = torch.frombuffer(mine, dtype=TORCH_DTYPES[unit.dtype]).reshape(unit.shape)
    base_stored = torch.frombuffer(theirs, dtype=TORCH_DTYPES[unit.base_dtype]).reshape(unit.shape)
    inner = old = new = moved = 0.0
    for part in unit.parts:
        few = max(1, LARGEST // stored.shape[1])
        W, W_base = take(stored, part)[:few].double(), take(base_stored, part)[:few].double()
        inner += float((W * W_base).sum())
        old, new = old + float(W_base.square().sum()), new + float(W.square().sum())
        moved += float((W - W_base).square().sum())
    if not 0 < old < float("inf") or not 0 < new < float("inf"):
        return None
    return Likeness(unit.name, inner / (old * new) ** 0.5, (moved / old) ** 0.5)
