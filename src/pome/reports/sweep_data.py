"""Data of a sweep's report: a row for each model, heat maps of k and beta, CSV. No torch."""

from __future__ import annotations

import csv
import io
import itertools
from dataclasses import dataclass
from typing import Any

from pome.sweeping.grid import FINE_TUNED, describe_rank_choice
from pome.sweeping.trials import Outcome, Trial


@dataclass(frozen=True)
class HeatMap:
    """Trials that share layers, method, scale and power: a row for each way to choose k, a column for each beta."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Trial | None, ...], ...]  # None where no candidate was scored


def list_heat_maps(outcome: Outcome) -> list[HeatMap]:
    """One map for every layers, method, scale and power that were tried together, in the order of the grid."""
    grid = outcome.grid
    maps = []
    found: dict[tuple[Any, ...], Trial] = {}
    for trial in outcome.trials:
        if trial.candidate is not None and trial.score is not None:
            params = trial.candidate.params
            layers, choice = "+".join(params["layers"]), trial.candidate.rank_choice
            at = layers, params["method"], params.get("scale"), params.get("power"), choice, f"{params['beta']:g}"
            found[at] = trial
    betas = [f"{beta:g}" for beta in grid["beta"]]
    for layers in ("+".join(item) for item in grid["layers"]):
        for method, scale, power in itertools.product(grid["method"], [None, *grid["scale"]], [None, *grid["power"]]):
            choices = tuple(dict.fromkeys(describe_rank_choice({"method": method, **cut}) for cut in grid["cuts"]))
            start = layers, method, scale, power
            cells = tuple(tuple(found.get((*start, choice, beta)) for beta in betas) for choice in choices)
            if any(cell is not None for row in cells for cell in row):
                title = f"{layers}, scale {scale}" if scale else f"{layers}, {method}"
                title += f", power {power:g}" if power else ""
                maps.append(HeatMap(title, choices, tuple(betas), cells))
    return maps


def find_reference(outcome: Outcome) -> Trial | None:
    """The trial of the fine-tuned model."""
    return next((trial for trial in outcome.trials if trial.key == FINE_TUNED), None)


def list_scored(outcome: Outcome) -> list[Trial]:
    """The candidates that have a score, best first."""
    return [trial for trial in outcome.trials if trial.candidate and trial.score and trial.difference]


def measure_gain(trial: Trial, outcome: Outcome) -> float:
    """Gain of a model's score over the fine-tuned model's; negative where it is worse."""
    assert trial.difference is not None
    return -trial.difference.delta if outcome.minimize else trial.difference.delta


def find_largest_gain(outcome: Outcome) -> float:
    """The largest difference of a candidate to the fine-tuned model, in either direction."""
    return max((abs(measure_gain(trial, outcome)) for trial in list_scored(outcome)), default=0.0)


def measure_tone(trial: Trial, outcome: Outcome) -> float:
    """Tone of a score: 0 within noise of the fine-tuned model's, else its gain, from -1 to 1 of the largest."""
    gain, largest = measure_gain(trial, outcome), find_largest_gain(outcome)
    interval = trial.difference.interval if trial.difference else None
    if not largest or (interval and interval[0] <= 0.0 <= interval[1]):
        return 0.0
    return gain / largest


def show_number(value: float | None) -> str:
    """A score with five digits; a dash for None."""
    return "-" if value is None else f"{value:.5g}"


def show_interval(trial: Trial) -> str:
    """`-0.0094 to -0.0031`, or a dash."""
    interval = trial.difference.interval if trial.difference else None
    return f"{interval[0]:+.2g} to {interval[1]:+.2g}" if interval else "-"


def list_metrics(outcome: Outcome) -> list[str]:
    """Names of the further metrics of the scorer."""
    return list(dict.fromkeys(name for trial in outcome.trials if trial.score for name in trial.score.metrics))


def list_rows(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """A header, and a row of texts for each model, best first."""
    trains = any(trial.score is not None and trial.score.train is not None for trial in outcome.trials)
    metrics = list_metrics(outcome)
    header = ["model", *(["train"] if trains else []), "score", "difference", "95 % interval", *metrics]
    rows = []
    for trial in outcome.trials:
        score = trial.score
        if score is None:
            rows.append([trial.label, *(["-"] if trains else []), "failed", "-", "-", *["-"] * len(metrics)])
            continue
        delta = f"{trial.difference.delta:+.4g}" if trial.difference and trial.key != FINE_TUNED else "-"
        train = [show_number(score.train.value if score.train else None)] if trains else []
        interval = "-" if trial.key == FINE_TUNED else show_interval(trial)
        numbers = [show_number(score.metrics.get(name)) for name in metrics]
        rows.append([trial.label, *train, show_number(score.scored.value), delta, interval, *numbers])
    return header, rows


def make_csv(outcome: Outcome) -> str:
    """The table as CSV."""
    file = io.StringIO()
    header, rows = list_rows(outcome)
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return file.getvalue()
