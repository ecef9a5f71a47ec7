"""What an inspection writes: CSV, and one HTML page that needs nothing else; and where any report may go. No torch."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.config.outputs import Reports
from pome.errors import OutputError, printable
from pome.reports.sheet import Sheet

TEMPLATE = Path(__file__).parent / "templates" / "inspection.html"
LEVELS, LOWEST, DECADES = 4096, -14.0, 20.0  # a singular value in the page: two characters, a step of 1.1 %
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"


def make_csv(sheet: Sheet) -> str:
    """One line for each matrix, without spectra. A text that a spreadsheet would run as a formula is quoted."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    keys = [quantity.key for quantity in sheet.quantities]
    writer.writerow(["name", "part", "role", "layer", "fan_out", "fan_in", *keys])
    for row in sheet.rows:
        texts = [_defuse(text) for text in (row.name, row.part or "", row.role, row.place)]
        writer.writerow([*texts, *row.shape, *(row.values[key] for key in keys)])
    return file.getvalue()


def _defuse(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def make_page(sheet: Sheet) -> str:
    """One HTML page that needs nothing else: data, style and script inside, and a policy that forbids it the network.

    All text goes into the page as JSON and from there into text nodes, so that no name can be markup.
    """
    data = json.dumps(_encode(sheet), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # "</script>" and "<!--" inside a JSON string would end or change the script element that holds it.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", data, 1)


def check_targets(reports: Reports, sides: Iterable[str | os.PathLike[str] | None]) -> None:
    """Refuse what could not or must not be written later, before the long work. Raises OutputError.

    `sides` are BASE, FT and OUT. No report goes into one of them, wherever links lead, nor into the folder of another
    checkpoint or output: a slip of the pen would replace its weights or its config.
    """
    forbidden = {_resolve(side): os.fspath(side) for side in sides if side is not None}
    taken: set[Path] = set()
    for path in (reports.html, reports.csv, reports.plots):
        if path is None:
            continue
        shown, target = printable(path), _resolve(path)
        inside = next((forbidden[place] for place in (target, *target.parents) if place in forbidden), None)
        if inside is not None:
            raise OutputError(f"{shown}: lies in {printable(inside)}, which is an input or OUT; choose another place")
        if target in taken:
            raise OutputError(f"{shown}: two reports would be written there; give each its own")
        taken.add(target)
        if not target.parent.is_dir():
            raise OutputError(f"{shown}: its folder does not exist; make it first")
        if target.exists() and (path == reports.plots) != target.is_dir():
            raise OutputError(
                f"{shown}: a {'folder; name the file' if target.is_dir() else 'file; name the folder'} to write"
            )
        if target.exists() and not target.is_dir() and not target.is_file():
            raise OutputError(f"{shown}: no regular file; name another to write")
        for folder in (target, target.parent):
            if folder.is_dir() and any(n.endswith(".safetensors") or n == MANIFEST_NAME for n in os.listdir(folder)):
                raise OutputError(f"{shown}: {printable(str(folder))} holds a checkpoint; choose another folder")
        try:
            with tempfile.TemporaryFile(dir=target if target.is_dir() else target.parent):
                pass
        except OSError as error:
            raise OutputError(f"{shown}: cannot be written: {error.strerror}") from None
    if reports.plots:
        from pome.reports.plots import load_matplotlib

        load_matplotlib()


def _resolve(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path)))


def write_reports(sheet: Sheet, reports: Reports) -> list[Path]:
    """Write what was asked for; returns the paths. Raises OutputError."""
    made = write_texts(reports, lambda: make_page(sheet), lambda: make_csv(sheet))
    if reports.plots:
        from pome.reports.plots import write_plots

        made += write_plots(sheet, _resolve(reports.plots))
    return made


def write_texts(reports: Reports, page: Callable[[], str], table: Callable[[], str]) -> list[Path]:
    """Write the page and the table that were asked for, each whole or not at all. Raises OutputError."""
    made: list[Path] = []
    for path, make in ((reports.html, page), (reports.csv, table)):
        if path is None:
            continue
        target = _resolve(path)
        text, beside = make(), target.with_name(f".pome-{os.getpid()}.part")
        try:
            beside.write_text(text, encoding="utf-8", newline="")
            os.replace(beside, target)
        except OSError as error:
            raise OutputError(f"{printable(path)}: cannot be written: {error.strerror}") from None
        finally:
            beside.unlink(missing_ok=True)
        made.append(Path(os.path.expanduser(path)))
    return made


def _encode(sheet: Sheet) -> dict[str, Any]:
    """The page's data, a column for each thing, as short as it goes: a large model has tens of thousands of rows."""
    places, roles = sheet.places, sheet.roles
    place_of, role_of = ({name: i for i, name in enumerate(names)} for names in (places, roles))
    grids: dict[tuple[int, ...], int] = {}
    for row in sheet.rows:
        grids.setdefault(tuple(i for i, _ in row.points), len(grids))
    rules = list(dict.fromkeys(rule for row in sheet.rows for rule in row.cuts))
    return {
        "kind": sheet.kind,
        "base": sheet.base,
        "fine_tuned": sheet.fine_tuned,
        "notes": list(sheet.notes),
        "places": places,
        "roles": roles,
        "quantities": [[q.key, q.label, q.help, q.log] for q in sheet.quantities],
        "warnings": [[w.text, w.option, w.count] for w in sheet.warnings],
        "suggestion": sheet.suggestion and [sheet.suggestion.title, sheet.suggestion.command, sheet.suggestion.why],
        "kept": [list(item) for item in sheet.kept],
        "names": [row.title for row in sheet.rows],
        "place": [place_of[row.place] for row in sheet.rows],
        "role": [role_of[row.role] for row in sheet.rows],
        "shape": [f"{row.shape[0]} × {row.shape[1]}" for row in sheet.rows],
        "values": {q.key: [_shorten(row.values[q.key]) for row in sheet.rows] for q in sheet.quantities},
        "floor": [_shorten(row.floor) for row in sheet.rows],
        "rules": rules,
        "cuts": [[row.cuts.get(rule) for rule in rules] for row in sheet.rows],
        "after": [row.after and [row.after[0], _shorten(row.after[1])] for row in sheet.rows],
        "grids": [list(grid) for grid in grids],
        "grid": [grids[tuple(i for i, _ in row.points)] for row in sheet.rows],
        "levels": [LEVELS, LOWEST, DECADES, ALPHABET],
        "spectra": ["".join(_encode_value(s) for _, s in row.points) for row in sheet.rows],
    }


def _encode_value(s: float) -> str:
    """Two characters: 0 for nothing, else the logarithm in LEVELS steps."""
    level = 0 if s <= 0.0 else 1 + round((math.log10(s) - LOWEST) / DECADES * (LEVELS - 2))
    level = max(0, min(LEVELS - 1, level))
    return ALPHABET[level // 64] + ALPHABET[level % 64]


def _shorten(value: float | None) -> float | int | None:
    """Four digits, and nothing that JSON cannot say."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.3e}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e6 else rounded
