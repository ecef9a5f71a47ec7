"""Plots of a report, PNG for slides and SVG for print. The only module that imports matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pome.errors import OutputError, printable
from pome.reports.sheet import Row, Sheet
from pome.reports.sweep_data import HeatMap, find_largest_gain, list_heat_maps, measure_tone
from pome.sweeping.trials import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAPS = ("relative_norm", "energy_50", "above_noise", "rounding", "k", "energy_kept")  # a heat map of each that there is
FORMATS = ("png", "svg")
TALLEST = 40.0  # inches: no larger page, however many layers


def load_matplotlib() -> ModuleType:
    """matplotlib without a display. Raises OutputError that says how to install it."""
    try:
        import matplotlib
    except ImportError:
        raise OutputError("--plots needs matplotlib; run: pip install 'pome-edit[plot]'") from None
    matplotlib.use("agg", force=False)
    return matplotlib


def write_plots(sheet: Sheet, folder: Path) -> list[Path]:
    """A heat map of each main quantity and the spectra of each role, into `folder`; returns the files."""
    load_matplotlib()
    labels = {quantity.key: quantity for quantity in sheet.quantities}
    made: list[Path] = []
    try:
        folder.mkdir(exist_ok=True)
        for key in MAPS:
            if key in labels and any(row.values[key] is not None for row in sheet.rows):
                quantity = labels[key]
                made += _save(_draw_map(sheet, key, quantity.label, quantity.log), folder / f"heat_{key}")
        for role in sheet.roles:
            rows = [row for row in sheet.rows if row.role == role]
            made += _save(_draw_spectra(rows, role, sheet.kind == "edit"), folder / f"spectra_{role}")
    except OSError as error:
        raise OutputError(f"{printable(str(folder))}: cannot be written: {error.strerror}") from None
    return made


def write_heat_maps(outcome: Outcome, folder: Path) -> list[Path]:
    """A sweep's scores, k by beta, a picture for each choice of layers and scale, into `folder`; returns the files."""
    load_matplotlib()
    try:
        folder.mkdir(exist_ok=True)
        made: list[Path] = []
        for number, heat in enumerate(list_heat_maps(outcome), 1):
            made += _save(_draw_heat(heat, outcome), folder / f"sweep_{number}")
        return made
    except OSError as error:
        raise OutputError(f"{printable(str(folder))}: cannot be written: {error.strerror}") from None


def _draw_heat(heat: HeatMap, outcome: Outcome) -> Figure:
    """Coloured by the difference to the fine-tuned model: blue better, red worse, white within noise."""
    from matplotlib.figure import Figure

    tones = [[math.nan if cell is None else measure_tone(cell, outcome) for cell in row] for row in heat.cells]
    size = (2.5 + 0.9 * len(heat.columns), 1.6 + 0.45 * len(heat.rows))
    figure = Figure(figsize=(min(TALLEST, size[0]), min(TALLEST, size[1])), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(tones, aspect="auto", cmap="RdBu", vmin=-1.0, vmax=1.0, interpolation="nearest")
    axes.set_xticks(range(len(heat.columns)), [_plain(name) for name in heat.columns])
    axes.set_yticks(range(len(heat.rows)), [_plain(name) for name in heat.rows])
    axes.set_xlabel("beta")
    axes.set_title(_plain(heat.title), fontsize=10)
    for y, row in enumerate(heat.cells):
        for x, cell in enumerate(row):
            if cell is not None and cell.score is not None:
                ink = "w" if abs(tones[y][x]) > 0.6 else "k"
                axes.text(x, y, f"{cell.score.scored.value:.4g}", ha="center", va="center", fontsize=8, color=ink)
    largest = find_largest_gain(outcome)
    bar = figure.colorbar(image, ax=axes, ticks=[-1.0, 0.0, 1.0])
    bar.ax.set_yticklabels([f"worse by {largest:.2g}", "within noise", f"better by {largest:.2g}"])
    return figure


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in FORMATS]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _draw_map(sheet: Sheet, key: str, label: str, log: bool) -> Figure:
    """Layers by roles, each cell the median of its matrices."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    places, roles = sheet.places, sheet.roles
    cells: dict[tuple[str, str], list[float]] = {}
    for row in sheet.rows:
        value = row.values[key]
        if value is not None and math.isfinite(value) and not (log and value <= 0.0):
            cells.setdefault((row.place, row.role), []).append(value)
    medians = {at: statistics.median(values) for at, values in cells.items()}
    grid = [[medians.get((place, role), math.nan) for role in roles] for place in places]
    figure = Figure(figsize=(3.5 + 0.7 * len(roles), min(TALLEST, 1.5 + 0.24 * len(places))), layout="constrained")
    axes = figure.add_subplot()
    low, high = min(medians.values(), default=1.0), max(medians.values(), default=1.0)
    norm = LogNorm(low, high) if log and low < high else Normalize(low, high)
    image = axes.imshow(grid, aspect="auto", cmap="Blues", norm=norm, interpolation="nearest")
    axes.set_xticks(range(len(roles)), roles)
    every = max(1, len(places) // 100)
    axes.set_yticks(range(0, len(places), every), [_plain(place) for place in places[::every]], fontsize=7)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def _draw_spectra(rows: Sequence[Row], role: str, is_edit: bool) -> Figure:
    """Every spectrum of a role, from the first layer (light) to the last (dark), and the edge of storage rounding."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    shades = colormaps["viridis_r"]
    for i, row in enumerate(rows):
        points = [(k, s) for k, s in row.points if s > 0.0]
        axes.loglog(*zip(*points, strict=True), color=shades((i + 1) / (len(rows) + 1)), linewidth=0.9)
        if is_edit and row.after is not None:
            k, alpha = row.after
            edited = [(i, alpha * s**row.power) for i, s in points if i <= k]
            axes.loglog(*zip(*edited, strict=True), "--", color=shades((i + 1) / (len(rows) + 1)), linewidth=0.9)
    floors = [row.floor for row in rows if row.floor > 0.0]
    floor = statistics.median(floors) if floors else 0.0
    if floor > axes.get_ylim()[0] / 100.0:
        axes.axhline(floor, color="tab:red", linestyle=":", linewidth=1.2, label="edge of storage rounding (median)")
        axes.legend(fontsize=8)
    axes.set_xlabel("direction")
    axes.set_ylabel("singular value of the delta")
    axes.set_title(f"{role}: {len(rows)} matrices, first layers light, last dark", fontsize=10)
    return figure


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return printable(text, 40).replace("$", r"\$")
