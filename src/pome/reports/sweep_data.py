"""Data of a sweep's report: a row for each model, heat maps of k and beta, CSV. No torch."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pome.sweeping.grid import describe_rank_choice
from pome.sweeping.trials import Outcome, Trial


@dataclass(frozen=True)
class HeatMap:
    """Scores of the candidates that share layers, scale and power: a row a way to choose k, a column a beta."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]  # None where no candidate was scored


def list_heat_maps(outcome: Outcome) -> list[HeatMap]:
    """One map for every layers, scale and power that were tried together, in the order of the grid."""
    grid = outcome.grid
    maps = []
    found: dict[tuple[str, str, float, str, str], float] = {}
    for trial in outcome.trials:
        if trial.candidate is not None and trial.score is not None:
            params = trial.candidate.params
            layers, choice = "+".join(params["layers"]), trial.candidate.rank_choice
            at = layers, params["scale"], params["power"], choice, f"{params['beta']:g}"
            found[at] = trial.score.scored.value
    rank_choices = list(dict.fromkeys(describe_rank_choice(options) for options in grid["cuts"]))
    betas = [f"{beta:g}" for beta in grid["beta"]]
    for layers in ("+".join(item) for item in grid["layers"]):
        for scale, power in itertools.product(grid["scale"], grid["power"]):
            cells = tuple(tuple(found.get((layers, scale, power, k, beta)) for beta in betas) for k in rank_choices)
            if any(cell is not None for row in cells for cell in row):
                title = f"{layers}, scale {scale}" + (f", power {power:g}" if power else "")
                maps.append(HeatMap(title, tuple(rank_choices), tuple(betas), cells))
    return maps


def list_scores(outcome: Outcome) -> list[float]:
    """The scores of all candidates that have one."""
    return [trial.score.scored.value for trial in outcome.trials if trial.candidate and trial.score]


def rank_score(value: float, values: Sequence[float], minimize: bool) -> float:
    """Where a score stands among all, from 0, the worst, to 1, the best."""
    low, high = min(values), max(values)
    if low == high:
        return 0.5
    place = (value - low) / (high - low)
    return 1.0 - place if minimize else place


def show_number(value: float | None) -> str:
    """A score with five digits; a dash for None."""
    return "-" if value is None else f"{value:.5g}"


def show_interval(trial: Trial) -> str:
    """`-0.0094 to -0.0031`, or a dash."""
    interval = trial.difference.interval if trial.difference else None
    return f"{interval[0]:+.2g} to {interval[1]:+.2g}" if interval else "-"


def list_metrics(outcome: Outcome) -> list[str]:
    """Names of what the scorer told beside the score."""
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
        delta = f"{trial.difference.delta:+.4g}" if trial.difference and trial.key != "fine-tuned" else "-"
        train = [show_number(score.train.value if score.train else None)] if trains else []
        interval = "-" if trial.key == "fine-tuned" else show_interval(trial)
        numbers = [show_number(score.metrics.get(name)) for name in metrics]
        rows.append([trial.label, *train, show_number(score.scored.value), delta, interval, *numbers])
    return header, rows


def make_csv(outcome: Outcome) -> str:
    """The table as CSV."""
    file = io.StringIO()
    header, rows = list_rows(outcome)
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return file.getvalue()
