"""What `pome inspect` shows: what is looked at, medians for each role and layer, warnings."""

from __future__ import annotations

import math

from pome.cli.tables.edit import describe_notice, describe_pair_notices
from pome.cli.tables.fitted import FittedTable
from pome.cli.tables.text import name_side, show_bytes
from pome.editing.session import Opened
from pome.reports.sheet import Sheet, summarise_places, summarise_roles
from pome.reports.weights import HEADS, summarise_weights


def describe_survey(opened: Opened) -> str:
    """The two sides, the number of tensors and bytes; and the notices, a line each."""
    plan = opened.plan
    roles = dict.fromkeys(part.role for _, part in plan.matrices())
    looked = len({unit.name for unit in plan.units if unit.parts})
    line = (
        f"{name_side(opened.base)} -> {name_side(opened.ft)}   {looked} of {plan.tensor_count} tensors to look at "
        f"({', '.join(roles)})   {show_bytes(plan.bytes_read)} to read"
    )
    return "\n".join([line, *describe_pair_notices(opened)])


def make_survey_tables(sheet: Sheet) -> list[FittedTable]:
    """Medians for each role, and for each layer; and of the weights for each role, if they were measured."""
    columns = {quantity.key: quantity.column for quantity in sheet.quantities if quantity.column}
    keys, tables = list(columns), []
    for first, summary in (("role", summarise_roles(sheet, keys)), ("layer", summarise_places(sheet, keys))):
        table = FittedTable(first, "matrices", *columns.values(), where="--csv has them")
        for name, count, medians in summary:
            table.add_row(name, str(count), *(_show_median(medians[key]) for key in keys))
        tables.append(table)
    weights = summarise_weights(sheet)
    if weights:
        table = FittedTable(*HEADS, texts=(), lefts=(0, 1), where="--csv has them")
        for cells in weights:
            table.add_row(*cells)
        tables.append(table)
    return tables


def _show_median(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def describe_notices(sheet: Sheet) -> list[str]:
    """The warnings of a sheet, each with the option that answers it."""
    return [describe_notice(notice, len(sheet.rows)) for notice in sheet.warnings]
