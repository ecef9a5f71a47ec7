"""Ranking of the models of a sweep, and whether the best is better than the fine-tuned model beyond noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from pome.errors import ScoreError
from pome.sweeping.bootstrap import beats, compare
from pome.sweeping.scorers.base import Score
from pome.sweeping.trials import Trial


def rank_trials(trials: Sequence[Trial], reference: Score, minimize: bool) -> tuple[tuple[Trial, ...], bool]:
    """Candidates with a score, best first, then all other trials; and whether the first is better than `reference`.

    Each gets its difference to `reference`, the score of the fine-tuned model. Raises ScoreError when no candidate has
    a score.
    """
    sign = -1.0 if minimize else 1.0
    edited = [trial for trial in trials if trial.candidate is not None and trial.score is not None]
    if not edited:
        reasons = [trial.failed for trial in trials if trial.candidate is not None]
        raise ScoreError(
            f"no candidate has a score ({reasons[0]}); mend that and give --retry-failed to score them again"
        )
    edited.sort(key=lambda trial: -sign * cast(Score, trial.score).deciding.value)
    others = [trial for trial in trials if trial not in edited]
    # On training data the choice is made before the held-out examples are looked at, so the best is compared alone.
    compared = edited[:1] if reference.train is not None else edited
    rest = [*edited[len(compared) :], *(trial for trial in others if trial.score is not None)]
    first, second = (
        compare([cast(Score, trial.score).scored for trial in group], reference.scored) for group in (compared, rest)
    )
    differences = dict(zip([trial.key for trial in (*compared, *rest)], (*first, *second), strict=True))
    ranked = tuple(dataclasses.replace(trial, difference=differences.get(trial.key)) for trial in (*edited, *others))
    return ranked, beats(differences[ranked[0].key], minimize)
