"""Numbers at the head of an inspection's page: what matters most, each with a sentence. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from pome.reports.sheet import Row, Sheet


def list_tiles(sheet: Sheet) -> list[tuple[str, str]]:
    """(number, what it says), the most telling first."""
    if not sheet.rows:
        return [("0", "matrices")]
    return [_count_matrices(sheet), *(_describe_survey(sheet) if sheet.kind == "survey" else _describe_edit(sheet))]


def _count_matrices(sheet: Sheet) -> tuple[str, str]:
    count, layers = len(sheet.rows), len(sheet.places)
    return str(count), f"{_inflect(count, 'matrix', 'matrices')} in {layers} {_inflect(layers, 'layer', 'layers')}"


def _describe_survey(sheet: Sheet) -> list[tuple[str, str]]:
    energy = sum(_read(row, "delta_norm") ** 2 for row in sheet.rows)
    noise = sum(min(_read(row, "noise_share"), 1.0) * _read(row, "delta_norm") ** 2 for row in sheet.rows)
    role = "up" if "up" in sheet.roles else sheet.roles[0]
    chosen = [row for row in sheet.rows if row.role == role]
    return [
        (show_figure(_median(sheet.rows, "relative_norm")), "median ‖Δ‖ / ‖W‖: how far training moved a matrix"),
        (show_share(1.0 - noise / energy if energy else 0.0), "of the update stands above storage rounding"),
        _find_largest(sheet, lambda row: _read(row, "delta_norm") ** 2, "of the update lies in"),
        (
            show_figure(_median(chosen, "departure")),
            f"departure: an edit of {role} with defaults would move a weight by this many lengths of its update "
            "from the fine-tuned one (median)",
        ),
    ]


def _describe_edit(sheet: Sheet) -> list[tuple[str, str]]:
    def moved(row: Row) -> float:
        return (_read(row, "departure") * _read(row, "delta_norm")) ** 2

    return [
        (
            show_figure(_median(sheet.rows, "departure")),
            "departure: the edit moved a weight by this many lengths of its update from the fine-tuned one (median)",
        ),
        *(
            (show(_median(sheet.rows, key)), said)
            for key, show, said in (
                ("energy_kept", show_share, "of the update's energy lies in the directions kept (median)"),
                ("spectral_drift", show_figure, "spectral drift that the edit takes back (median)"),
            )
            if any(row.values.get(key) is not None for row in sheet.rows)
        ),
        _find_largest(sheet, moved, "of what the edit moved lies in"),
        (show_figure(_median(sheet.rows, "rounding")), "of the edit was lost to rounding (median share)"),
    ]


def _find_largest(sheet: Sheet, weigh: Callable[[Row], float], said: str) -> tuple[str, str]:
    """The layer with the largest share of a sum over matrices, and the next one."""
    sums = dict.fromkeys(sheet.places, 0.0)
    for row in sheet.rows:
        sums[row.place] += weigh(row)
    total = sum(sums.values()) or 1.0
    largest, *others = sorted(sums.items(), key=lambda item: -item[1])
    then = f", then {_shorten(others[0][0])} ({show_share(others[0][1] / total)})" if others else ""
    return show_share(largest[1] / total), f"{said} {_shorten(largest[0])}{then}"


def _read(row: Row, key: str) -> float:
    value = row.values[key]
    return 0.0 if value is None or not math.isfinite(value) else float(value)


def _median(rows: Sequence[Row], key: str) -> float:
    known = [value for row in rows if (value := row.values[key]) is not None]
    return statistics.median(known) if known else math.nan


def _shorten(place: str) -> str:
    """The last two words of a layer's name: `layer.11`."""
    return ".".join(place.split(".")[-2:])


def _inflect(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def show_share(share: float) -> str:
    """A share in per cent; never 100 % of what is not all."""
    if 0.995 <= share < 1.0:
        return "> 99 %"
    return "< 1 %" if 0.0 < share < 0.005 else f"{share:.0%}".replace("%", " %")


def show_figure(value: float) -> str:
    """A number with three digits, as the page's script shows it."""
    if math.isnan(value):
        return "–"
    size = abs(value)
    return f"{value:.2e}" if size != 0 and (size < 0.001 or size >= 1e5) else f"{float(f'{value:.3g}'):g}"
