"""Pictures of a sweep's page: differences with their intervals, and heat maps. Positions are per cents. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pome.reports.sweep_data import (
    HeatMap,
    find_largest_gain,
    list_scored,
    measure_tone,
    show_interval,
    show_number,
)
from pome.sweeping.grid import BASE
from pome.sweeping.trials import Outcome, Trial

MARGIN = 0.04  # of the axis, free at each end
TICKS = 4  # wanted on the axis; a round step gives some more or less
FAINTEST = 22  # per cent of the colour of the smallest difference beyond noise


@dataclass(frozen=True)
class PlotRow:
    """One model: positions along the axis, and its numbers as texts. `kind` is best, plain (not edited) or empty."""

    label: str
    kind: str
    dot: float | None  # None where it lies outside the axis
    low: float | None
    high: float | None
    difference: str
    interval: str


@dataclass(frozen=True)
class Plot:
    """Differences to the fine-tuned model, which stands at `zero`; `ticks` are (position, text)."""

    rows: list[PlotRow]
    zero: float
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Cell:
    """One score of a heat map. `tone` is better, worse, or empty within noise; `strength` per cent of its colour."""

    number: str
    tone: str = ""
    strength: int = 0
    best: bool = False


def draw_plot(outcome: Outcome) -> Plot:
    """Dots and intervals of all candidates, best first, and of BASE."""
    scored = list_scored(outcome)
    others = [trial for trial in outcome.trials if not trial.candidate and trial.score and trial.key == BASE]
    ends = [0.0]
    for trial in scored:
        assert trial.difference is not None
        ends += [trial.difference.delta, *(trial.difference.interval or ())]
    low, high = min(ends), max(ends)
    margin = (high - low) * MARGIN or 1.0
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return round(100.0 * (value - low) / (high - low), 2)

    def make_row(trial: Trial) -> PlotRow:
        assert trial.difference is not None
        delta, interval = trial.difference.delta, trial.difference.interval
        is_inside = low <= delta <= high
        shown = [place(min(max(end, low), high)) for end in interval] if interval and is_inside else [None, None]
        kind = "best" if outcome.best and trial.key == outcome.best.key else "" if trial.candidate else "plain"
        dot = place(delta) if is_inside else None
        return PlotRow(trial.label, kind, dot, shown[0], shown[1], f"{delta:+.4g}", show_interval(trial))

    rows = [make_row(trial) for trial in (*scored, *others) if trial.difference]
    return Plot(rows, place(0.0), [(place(tick), f"{tick:+g}" if tick else "0") for tick in _list_ticks(low, high)])


def _list_ticks(low: float, high: float) -> list[float]:
    """Multiples of a round step inside an axis."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_cells(heat: HeatMap, outcome: Outcome) -> list[tuple[str, list[Cell]]]:
    """The rows of a heat map, each with its name: scores coloured by their difference to the fine-tuned model's."""
    return [
        (name, [_draw_cell(trial, outcome) for trial in trials])
        for name, trials in zip(heat.rows, heat.cells, strict=True)
    ]


def _draw_cell(trial: Trial | None, outcome: Outcome) -> Cell:
    if trial is None or trial.score is None:
        return Cell("-")
    tone = measure_tone(trial, outcome)
    strength = round(FAINTEST + (100 - FAINTEST) * abs(tone)) if tone else 0
    best = outcome.best is not None and trial.key == outcome.best.key
    return Cell(
        show_number(trial.score.scored.value), "better" if tone > 0 else "worse" if tone else "", strength, best
    )


def describe_scale(outcome: Outcome) -> str:
    """The largest difference, at which the colours of the heat maps end."""
    return f"{find_largest_gain(outcome):.2g}"
