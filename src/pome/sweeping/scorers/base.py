"""Scores of models, and the protocols of the scorers that give them. No torch.

A scorer sees a model and not a candidate: it does not know what was edited. ScoreError says why there is no score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pome.config.options import read_float
from pome.errors import ScoreError, printable


@dataclass(frozen=True)
class Scored:
    """A weighted mean over examples, with the numbers that it is the mean of where the scorer gives them.

    examples: one number for each example. weights: one for each example, None where all are alike.
    """

    value: float
    examples: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Score:
    """Score of one model.

    scored: on the held-out examples. train: on the training data, where the choice is made by that. metrics: other
    numbers to be shown, by name.
    """

    scored: Scored
    train: Scored | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def deciding(self) -> Scored:
        """The score by which candidates are ranked."""
        return self.train or self.scored


class Scorer(Protocol):
    """Common part of all scorers. A method `prepare()`, if any, is called once before any model is loaded; it raises
    ScoreError where no model could have a score."""

    @property
    def minimize(self) -> bool:
        """Whether a lower score is the better one."""

    def describe(self) -> dict[str, Any]:
        """Settings that two sweeps must share for their scores to be comparable, in JSON's types."""


class FolderScorer(Scorer, Protocol):
    """Scorer of a checkpoint in a folder."""

    def score_folder(self, path: Path) -> Score:
        """The score of the checkpoint in the folder `path`. Raises ScoreError."""


class ModelScorer(Scorer, Protocol):
    """Scorer of a transformers model in memory."""

    def score_model(self, model: Any, tokenizer: Any) -> Score:
        """The score of a causal language model on its device, in eval mode. Raises ScoreError."""


def read_finite(value: Any, what: str) -> float:
    """A finite number from a value of JSON; `what` names it in the ScoreError that anything else raises."""
    number = read_float(value)
    if not math.isfinite(number):
        raise ScoreError(f"{printable(what)} is {printable(str(value))}, not a finite number")
    return number


def is_mean(value: float, examples: Sequence[float], weights: Sequence[float] | None) -> bool:
    """Whether `value` is the weighted mean of `examples`, to the digits that a program prints."""
    weights = weights or [1.0] * len(examples)
    if not examples or len(weights) != len(examples) or min(weights) < 0.0 or sum(weights) <= 0.0:
        return False
    mean = sum(w * x for w, x in zip(weights, examples, strict=True)) / sum(weights)
    return math.isclose(value, mean, rel_tol=1e-4, abs_tol=1e-9)
