"""Report of an inspection, or of an edit from its manifest: HTML page, CSV, plots. No torch."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from pome.config.outputs import Reports
from pome.reports.files import resolve_path, write_texts
from pome.reports.pages import render_page
from pome.reports.quantities import SURVEYED_RULES
from pome.reports.sheet import Sheet
from pome.reports.tiles import list_tiles
from pome.reports.weights import HEADS, describe_weights, summarise_weights

TITLES = {"survey": "What fine-tuning changed", "edit": "What the edit did"}
# The quantities that say what an edit makes of a spectrum: k, and the value of each singular value kept.
EDIT_KEYS = {"survey": ("k_ratio", "alpha_frobenius"), "edit": ("k", "alpha")}
FIRST_QUANTITIES = {"survey": "relative_norm", "edit": "departure"}  # what the heat map shows at first
SCRIPTS = ("page.js", "heat_map.js", "matrices.js", "spectrum.js", "tables.js", "start.js")
MOST_NAMED = 3  # matrices of a warning that stand beside it; a link lists the others
MOST_KEPT = 500  # tensors that were not looked at, listed in the page
# A singular value takes two characters in the page: 4096 levels of its logarithm over 20 decades, a step of 1.1 %.
LEVELS, LOWEST, DECADES = 4096, -14.0, 20.0
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"


def make_csv(sheet: Sheet) -> str:
    """One line for each matrix, without spectra. A text that a spreadsheet would run as a formula is quoted."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    keys = [quantity.key for quantity in sheet.quantities]
    writer.writerow(["name", "part", "role", "layer", "fan_out", "fan_in", *keys])
    for row in sheet.rows:
        texts = [_quote_formula(text) for text in (row.name, row.part or "", row.role, row.place)]
        writer.writerow([*texts, *row.shape, *(row.values[key] for key in keys)])
    return file.getvalue()


def _quote_formula(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def make_page(sheet: Sheet) -> str:
    """One HTML page that needs nothing else: data, style and script inside, and a policy that forbids it the network.

    Names of matrices go into the page as JSON and from there into text nodes, so that none can be markup.
    """
    return render_page(
        "inspection.html",
        title=TITLES[sheet.kind],
        base=sheet.base,
        fine_tuned=sheet.fine_tuned,
        sheet=sheet,
        tiles=list_tiles(sheet),
        first_quantity=FIRST_QUANTITIES[sheet.kind],
        notices=_describe_notices(sheet),
        weight_heads=HEADS,
        weights=summarise_weights(sheet),
        said_of_weights=describe_weights(sheet),
        most_kept=MOST_KEPT,
        scripts=SCRIPTS,
        data=_encode(sheet),
    )


def write_reports(sheet: Sheet, reports: Reports) -> list[Path]:
    """Write what was asked for; returns the paths. Raises OutputError."""
    made = write_texts(reports, lambda: make_page(sheet), lambda: make_csv(sheet))
    if reports.plots:
        from pome.reports.plots import write_plots

        made += write_plots(sheet, resolve_path(reports.plots))
    return made


def _describe_notices(sheet: Sheet) -> list[dict[str, Any]]:
    """The warnings for the template, each with the rows of its matrices: the first ones named, the others listed."""
    index = {row.title: i for i, row in enumerate(sheet.rows)}
    described = []
    for notice in sheet.warnings:
        rows = sorted(index[title] for title in notice.matrices if title in index)
        named = [(i, sheet.rows[i].title) for i in rows[:MOST_NAMED]]
        rest = rows if MOST_NAMED < len(rows) < len(sheet.rows) else []
        described.append(
            {"text": notice.text, "option": notice.option, "count": len(rows), "named": named, "rest": rest}
        )
    return described


def _encode(sheet: Sheet) -> dict[str, Any]:
    """The page's data, a column for each thing, as short as it goes: a large model has tens of thousands of rows."""
    places, roles = sheet.places, sheet.roles
    place_of, role_of = ({name: i for i, name in enumerate(names)} for names in (places, roles))
    grids: dict[tuple[int, ...], int] = {}
    for row in sheet.rows:
        grids.setdefault(tuple(i for i, _ in row.points), len(grids))
    return {
        "kind": sheet.kind,
        "places": places,
        "roles": roles,
        "quantities": [[q.key, q.label, q.help, q.log, q.column] for q in sheet.quantities],
        "table": [q.key for q in sheet.quantities if q.column],
        "names": [row.title for row in sheet.rows],
        "place": [place_of[row.place] for row in sheet.rows],
        "role": [role_of[row.role] for row in sheet.rows],
        "shape": [f"{row.shape[0]} × {row.shape[1]}" for row in sheet.rows],
        "values": {q.key: [_shorten(row.values[q.key]) for row in sheet.rows] for q in sheet.quantities},
        "floor": [_shorten(row.floor) for row in sheet.rows],
        "rules": [rule.name for rule in SURVEYED_RULES] if sheet.kind == "survey" else [],
        "after": EDIT_KEYS[sheet.kind],
        "power": [row.power for row in sheet.rows] if any(row.power for row in sheet.rows) else [],
        "grids": [list(grid) for grid in grids],
        "grid": [grids[tuple(i for i, _ in row.points)] for row in sheet.rows],
        "levels": [LEVELS, LOWEST, DECADES, ALPHABET],
        "spectra": ["".join(_encode_value(s) for _, s in row.points) for row in sheet.rows],
    }


def _encode_value(s: float) -> str:
    """Two characters: level 0 for zero, else the logarithm in LEVELS steps."""
    level = 0 if s <= 0.0 else 1 + round((math.log10(s) - LOWEST) / DECADES * (LEVELS - 2))
    level = max(0, min(LEVELS - 1, level))
    return ALPHABET[level // 64] + ALPHABET[level % 64]


def _shorten(value: float | None) -> float | int | None:
    """Four digits; None for what JSON cannot hold."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.3e}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e6 else rounded
