"""Report of a sweep: HTML page, CSV, plots. No torch."""

from __future__ import annotations

from pathlib import Path

from pome.config.outputs import Reports
from pome.reports.files import resolve_path, write_texts
from pome.reports.pages import render_page
from pome.reports.sweep_data import list_heat_maps, list_rows, make_csv
from pome.reports.sweep_pictures import describe_scale, draw_cells, draw_plot
from pome.reports.sweep_words import (
    describe_details,
    describe_failures,
    describe_scorer,
    describe_verdict,
    make_command,
)
from pome.sweeping.trials import Outcome


def make_page(outcome: Outcome, scorer: object, base: str, ft: str, out: str) -> str:
    """One HTML page that needs nothing else: no script, no network. Every text is escaped."""
    header, rows = list_rows(outcome)
    best = outcome.best
    kinds = [
        "best" if best and trial.key == best.key else "" if trial.candidate else "plain" for trial in outcome.trials
    ]
    return render_page(
        "sweep.html",
        verdict=describe_verdict(outcome),
        base=base,
        fine_tuned=ft,
        scorer=describe_scorer(scorer, outcome),
        details=describe_details(outcome),
        better="Lower is better." if outcome.minimize else "Higher is better.",
        failures=describe_failures(outcome),
        command=make_command(outcome, base, ft, out),
        minimize=outcome.minimize,
        plot=draw_plot(outcome),
        has_intervals=bool(best and best.difference and best.difference.interval),
        scale=describe_scale(outcome),
        heat_maps=[(heat.title, heat.columns, draw_cells(heat, outcome)) for heat in list_heat_maps(outcome)],
        header=header,
        rows=list(zip(kinds, rows, strict=True)),
    )


def write_sweep_reports(outcome: Outcome, scorer: object, reports: Reports, base: str, ft: str, out: str) -> list[Path]:
    """Write what was asked for; returns the paths. `scorer` is what gave the scores. Raises OutputError."""
    made = write_texts(reports, lambda: make_page(outcome, scorer, base, ft, out), lambda: make_csv(outcome))
    if reports.plots:
        from pome.reports.plots import write_heat_maps

        made += write_heat_maps(outcome, resolve_path(reports.plots))
    return made
