"""Options of a look at weights: that they are measured, and the edit that is measured beside them. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pome.choices import ROLES, RankRuleName, ScaleName
from pome.config.options import HOW, Option, check_switch, documented, find_options, pick_options
from pome.config.spec import EDIT_OPTIONS, EditSpec
from pome.errors import SpecError


def _of_edit(name: str) -> Option:
    """An option of `edit` that here speaks of the equalized edit whose weight is measured."""
    option = EDIT_OPTIONS[name]
    return dataclasses.replace(option, help=f"With --weights: {option.help}", commands=None, everyday=False)


@documented
@dataclass(frozen=True)
class Look:
    """What `pome inspect` measures beside the update, and for which edit: options of its own beside EditSpec's."""

    weights: Annotated[
        bool,
        Option(
            "Measure weights too: BASE's, FT's, and what edits give.",
            more="Spectral drift and hyperspherical energy of BASE, FT, the equalized edit by the options that are "
            "given, and the edit of the method `equivalence` with a beta of 1; edits before they are rounded to a "
            "dtype. It takes several times as long.",
            group=HOW,
        ),
    ] = False  # fmt: skip
    rank: Annotated[int | None, _of_edit("rank")] = EditSpec.rank
    rank_rule: Annotated[RankRuleName, _of_edit("rank_rule")] = EditSpec.rank_rule
    scale: Annotated[ScaleName, _of_edit("scale")] = EditSpec.scale
    beta: Annotated[float, _of_edit("beta")] = EditSpec.beta
    power: Annotated[float, _of_edit("power")] = EditSpec.power


# Of a look without weights these have no effect.
OF_EDIT = tuple(name for name in find_options(Look) if name != "weights")


def read_look(values: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[EditSpec, bool]:
    """What is looked at, all roles unless `layers` says otherwise, with the edit to measure; and whether weights are.

    Of `values` those that are `given` were not taken from a file's defaults. Raises SpecError for one of them that has
    no effect.
    """
    weights = check_switch("weights", values.get("weights", False))
    chosen = {"layers": ROLES, **pick_options(values, EditSpec)}
    for name in OF_EDIT if not weights else ():
        if name in given:
            said = f"{name}: has no effect without weights; give both or neither"
            raise SpecError(said, options=[name, "weights"])
        chosen.pop(name, None)
    return EditSpec.from_mapping(chosen), weights
