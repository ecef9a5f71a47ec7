"""What `pome sweep` shows at its end: heat maps of k and beta, and a row for each model."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from pome.cli.tables.fitted import FittedTable
from pome.reports.sweep_data import list_heat_maps, list_rows, list_scores, rank_score, show_number
from pome.sweeping.trials import Outcome

# From the worst score to the best, in colours that every terminal has; the number stands in each cell anyway.
SHADES = ("dim", "default", "cyan", "cyan bold", "black on cyan", "black on bright_cyan bold")


def make_sweep_tables(outcome: Outcome) -> list[FittedTable]:
    """The heat map of K and beta where both were varied, and a row for each model, best first."""
    tables = []
    values = list_scores(outcome)
    for heat in list_heat_maps(outcome):
        if len(heat.rows) > 1 and len(heat.columns) > 1:
            table = FittedTable(heat.title, *(f"beta {beta}" for beta in heat.columns), where="--csv has them")
            for name, scores in zip(heat.rows, heat.cells, strict=True):
                table.add_row(name, *(_shade_cell(value, values, outcome.minimize) for value in scores))
            tables.append(table)
    header, rows = list_rows(outcome)
    table = FittedTable(*header, where="--csv has them")
    for trial, row in zip(outcome.trials, rows, strict=True):
        best = outcome.best is not None and trial.key == outcome.best.key
        style = "red" if trial.failed else "bold" if best else "dim" if trial.candidate is None else None
        table.add_row(*row, style=style)
    return [*tables, table]


def _shade_cell(value: float | None, values: Sequence[float], minimize: bool) -> Text:
    if value is None:
        return Text("-")
    level = round(5 * rank_score(value, values, minimize))
    return Text(f" {show_number(value)} ", style=SHADES[level])
