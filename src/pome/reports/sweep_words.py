"""Sentences of a sweep's report, and the command that makes its best candidate. No torch."""

from __future__ import annotations

import shlex

from pome.reports.sweep_data import show_number
from pome.sweeping.trials import Outcome


def describe_outcome(outcome: Outcome) -> list[str]:
    """What the sweep says, in sentences."""
    lines = []
    for trial in outcome.trials:
        if trial.failed is not None:
            lines.append(f"{trial.label}: no score: {trial.failed}")
    best = outcome.best
    if best is None or best.score is None or best.difference is None:
        return lines
    gain = best.difference.delta
    count = sum(trial.candidate is not None and trial.score is not None for trial in outcome.trials)
    said = f"best of {count}: {best.label}, score {show_number(best.score.scored.value)}, {gain:+.4g} to fine-tuned"
    among = best.difference.best_interval
    if among is not None:
        said += f" (95 % interval, allowing for the choice: {among[0]:+.2g} to {among[1]:+.2g})"
    lines.append(said)
    if outcome.beats and among is None:
        lines.append("the scorer gives no per-example results: whether that is more than noise is not known")
    elif outcome.beats:
        lines.append("it is better than the fine-tuned model beyond noise")
    else:
        lines.append("nothing beats the fine-tuned model beyond noise")
    if outcome.manifest is None:
        lines.append("nothing was written; --write-best writes the best all the same")
    return lines


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
