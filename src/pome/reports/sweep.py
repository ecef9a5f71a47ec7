"""Report of a sweep: HTML page, CSV, plots. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pome.config.outputs import Reports
from pome.reports.files import resolve_path, write_texts
from pome.reports.pages import render_page
from pome.reports.sweep_data import HeatMap, list_heat_maps, list_rows, list_scores, make_csv, rank_score, show_number
from pome.reports.sweep_words import describe_outcome, make_command
from pome.sweeping.trials import Outcome


def make_page(outcome: Outcome, base: str, ft: str, out: str) -> str:
    """One HTML page that needs nothing else: no script, no network. Every text is escaped."""
    header, rows = list_rows(outcome)
    best = outcome.best
    kinds = [
        "best" if best and trial.key == best.key else "" if trial.candidate else "plain" for trial in outcome.trials
    ]
    return render_page(
        "sweep.html",
        base=base,
        fine_tuned=ft,
        sentences=describe_outcome(outcome),
        command=make_command(outcome, base, ft, out),
        better="lower" if outcome.minimize else "higher",
        heat_maps=[_shade(heat, outcome) for heat in list_heat_maps(outcome)],
        header=header,
        rows=list(zip(kinds, rows, strict=True)),
    )


def _shade(heat: HeatMap, outcome: Outcome) -> dict[str, Any]:
    """A heat map for the template: of each cell its number, its place among all scores, and whether it is the best."""
    scores = list_scores(outcome)
    best = outcome.best.score.scored.value if outcome.best and outcome.best.score else None

    def describe_cell(value: float | None) -> dict[str, Any]:
        place = None if value is None else rank_score(value, scores, outcome.minimize)
        return {"number": show_number(value), "place": place, "best": value is not None and value == best}

    lines = [(name, [describe_cell(value) for value in row]) for name, row in zip(heat.rows, heat.cells, strict=True)]
    return {"title": heat.title, "columns": heat.columns, "lines": lines}


def write_sweep_reports(outcome: Outcome, reports: Reports, base: str, ft: str, out: str) -> list[Path]:
    """Write what was asked for; returns the paths. Raises OutputError."""
    made = write_texts(reports, lambda: make_page(outcome, base, ft, out), lambda: make_csv(outcome))
    if reports.plots:
        from pome.reports.plots import write_heat_maps

        made += write_heat_maps(list_heat_maps(outcome), outcome.minimize, resolve_path(reports.plots))
    return made
