"""Sentences of a sweep's report, and the command that makes its best candidate. No torch."""

from __future__ import annotations

import math
import shlex
from typing import Any

from pome.config.spec import EDIT_OPTIONS
from pome.reports.sweep_data import find_reference, list_scored, measure_gain, show_number
from pome.sweeping.scorers.command import CommandScorer
from pome.sweeping.scorers.language import HarnessScorer, LossScorer
from pome.sweeping.trials import Outcome

# Options of which a sweep takes numbers, with the least and the largest that each may be.
NUMBERS = {
    name: (option.range.low, option.range.high) if option.range else (1, math.inf)
    for name, option in EDIT_OPTIONS.items()
    if option.axis and option.plain_type in (int, float)
}


def describe_outcome(outcome: Outcome) -> list[str]:
    """The verdict, what it rests on, what to do next, and the models that have no score, in sentences."""
    return [describe_verdict(outcome), *describe_details(outcome), *describe_failures(outcome)]


def describe_verdict(outcome: Outcome) -> str:
    """The verdict of the sweep, in one sentence."""
    best = outcome.best
    if best is None or best.difference is None:
        return "No candidate has a score"
    if outcome.beats and best.difference.best_interval is None:
        return f"{best.label} scores better than the fine-tuned model; whether by more than noise is not known"
    if outcome.beats:
        return f"{best.label} is better than the fine-tuned model beyond noise"
    if all(measure_gain(trial, outcome) < 0.0 for trial in list_scored(outcome)):
        return "Every candidate scores worse than the fine-tuned model"
    return "Nothing beats the fine-tuned model beyond noise"


def describe_details(outcome: Outcome) -> list[str]:
    """The best candidate with its numbers, where the grid should go on, and whether OUT was written."""
    best = outcome.best
    if best is None or best.score is None or best.difference is None:
        return []
    count, gain, among = len(list_scored(outcome)), best.difference.delta, best.difference.best_interval
    said = f"Best of {count}: {best.label}, score {show_number(best.score.scored.value)}, {gain:+.4g} to fine-tuned"
    if among is not None:
        said += f" (95 % interval, allowing for the choice: {among[0]:+.2g} to {among[1]:+.2g})"
    else:
        said += " (the scorer gives no per-example results, so that no interval is known)"
    lines = [said]
    if advice := advise_grid(outcome):
        lines.append(f"The best stands at the edge of the grid: try {advice}.")
    if outcome.manifest is None:
        lines.append("Nothing was written; --write-best writes the best all the same.")
    return lines


def describe_failures(outcome: Outcome) -> list[str]:
    """A line for each model that has no score."""
    return [f"{trial.label}: no score: {trial.failed}" for trial in outcome.trials if trial.failed is not None]


def advise_grid(outcome: Outcome) -> str:
    """Advice on values to try next where the best candidate has the first or last of those tried; else nothing."""
    assert outcome.best is not None and outcome.best.candidate is not None
    if len({measure_gain(trial, outcome) for trial in list_scored(outcome)}) < 2:
        return ""  # no value is better than another
    tried: dict[str, list[Any]] = {name: outcome.grid[name] for name in ("beta", "power")}
    for options in outcome.grid["cuts"]:
        for name, value in options.items():
            tried.setdefault(name, []).append(value)
    advice = []
    for name, value in outcome.best.candidate.params.items():
        values = tried.get(name, [])
        if name not in NUMBERS or len(values) < 2:
            continue
        option = f"--{name.replace('_', '-')}"
        least, most = NUMBERS[name]
        if value == max(values) and value < most:
            advice.append(f"{option} above {value:g}")
        elif value == min(values) and value > least:
            advice.append(f"{option} below {value:g}")
    return " and ".join(advice)


def describe_scorer(scorer: object, outcome: Outcome) -> list[tuple[str, str]]:
    """(label, text) of the scorer: its data, its number of examples, and which way is better."""
    known: list[tuple[str, str]] = []
    if isinstance(scorer, CommandScorer):
        known = [("scorer", f"command: {scorer.command}")]
    elif isinstance(scorer, LossScorer):
        known = [("scorer", "mean loss of a token, in nats"), ("data", str(scorer.file))]
        if scorer.train_data:
            known.append(("chosen by", f"the same loss on {scorer.train_data}"))
    elif isinstance(scorer, HarnessScorer):
        limit = f", {scorer.limit} examples of each at most" if scorer.limit else ""
        known = [("scorer", "lm-eval, mean over tasks"), ("data", f"{', '.join(scorer.tasks)}{limit}")]
    reference = find_reference(outcome)
    examples = reference.score.scored.examples if reference and reference.score else None
    count = f"{len(examples)}" if examples else "not told by the scorer, so that noise is not known"
    value = show_number(reference.score.scored.value if reference and reference.score else None)
    better = "lower" if outcome.minimize else "higher"
    return [*known, ("examples", count), ("fine-tuned scores", f"{value} ({better} is better)")]


def make_command(outcome: Outcome, base: str, ft: str, out: str) -> str:
    """The `pome edit` that makes the best candidate; empty where no candidate has a score."""
    best = outcome.best
    if best is None or best.candidate is None:
        return ""
    words = ["pome", "edit", base, ft, out]
    for name, value in best.candidate.params.items():
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", str(item)]
    return shlex.join(words)
