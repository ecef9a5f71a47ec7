"""Closing tables of `pome sweep`: heat maps of k and beta, and a row for each model."""

from __future__ import annotations

from rich.text import Text

from pome.cli.tables.fitted import FittedTable
from pome.reports.sweep_data import list_heat_maps, list_rows, measure_tone, show_number
from pome.sweeping.trials import Outcome, Trial

# Styles that every terminal has, from little to much better or worse; the number stands in each cell anyway.
BETTER = ("cyan", "cyan bold", "black on bright_cyan")
WORSE = ("yellow", "yellow bold", "black on bright_yellow")


def make_sweep_tables(outcome: Outcome) -> list[FittedTable]:
    """The heat map of K and beta where both were varied, and a row for each model, best first."""
    tables = []
    for heat in list_heat_maps(outcome):
        if len(heat.rows) > 1 and len(heat.columns) > 1:
            table = FittedTable(heat.title, *(f"beta {beta}" for beta in heat.columns), where="--csv has them")
            for name, trials in zip(heat.rows, heat.cells, strict=True):
                table.add_row(name, *(_shade_cell(trial, outcome) for trial in trials))
            tables.append(table)
    header, rows = list_rows(outcome)
    table = FittedTable(*header, where="--csv has them")
    for trial, row in zip(outcome.trials, rows, strict=True):
        best = outcome.best is not None and trial.key == outcome.best.key
        style = "red" if trial.failed else "bold" if best else "dim" if trial.candidate is None else None
        table.add_row(*row, style=style)
    return [*tables, table]


def _shade_cell(trial: Trial | None, outcome: Outcome) -> Text:
    """A score, in the colours of better or worse than the fine-tuned model where it differs beyond noise."""
    if trial is None or trial.score is None:
        return Text("-")
    tone = measure_tone(trial, outcome)
    styles = BETTER if tone > 0 else WORSE
    style = styles[min(2, int(3 * abs(tone)))] if tone else "dim"
    return Text(f" {show_number(trial.score.scored.value)} ", style=style)
