"""Trials and outcome of a sweep, as data. No torch."""

from __future__ import annotations

import dataclasses
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pome.editing.session import Opened
from pome.manifest import Manifest
from pome.sweeping.grid import Candidate
from pome.sweeping.scorers.base import Score

if TYPE_CHECKING:
    from pome.sweeping.bootstrap import MeanDifference


@dataclass(frozen=True)
class Trial:
    """One model and its score, or why it has none. `candidate` is None for the two models that are not edited."""

    key: str
    label: str
    candidate: Candidate | None
    score: Score | None
    failed: str | None
    seconds: float
    earlier: bool = False  # scored by an earlier run
    difference: MeanDifference | None = None

    def to_mapping(self) -> dict[str, Any]:
        """As in `--json` and in the manifest; the same in every run."""
        found: dict[str, Any] = {"params": self.candidate.params if self.candidate else None, "model": self.label}
        if self.score is None:
            return {**found, "score": None, "failed": self.failed}
        found |= {"score": self.score.scored.value, "metrics": self.score.metrics}
        if self.score.train is not None:
            found["train_score"] = self.score.train.value
        if self.difference is not None:
            found |= dataclasses.asdict(self.difference)
        return found


@dataclass(frozen=True)
class Outcome:
    """Outcome of a sweep: all trials, the candidates best first and the two models that are not edited at the end."""

    trials: tuple[Trial, ...]
    best: Trial | None
    beats: bool
    minimize: bool
    scorer: dict[str, Any]
    grid: dict[str, Any]
    manifest: Manifest | None  # of OUT, where it was written
    peak_bytes: int

    def describe(self) -> dict[str, Any]:
        """The record for the manifest: nothing in it differs between two runs of the same sweep."""
        return {
            "scorer": self.scorer,
            "grid": self.grid,
            "minimize": self.minimize,
            "beats_fine_tuned": self.beats,
            "best": self.best.to_mapping() if self.best else None,
            "candidates": [trial.to_mapping() for trial in self.trials],
        }

    def to_json(self) -> dict[str, Any]:
        seconds = {trial.label: round(trial.seconds, 3) for trial in self.trials}
        return {
            **self.describe(),
            "written": self.manifest is not None,
            "peak_bytes": self.peak_bytes,
            "seconds": seconds,
        }


class Listener:
    """Listener to a sweep: subclass it and override what you show."""

    def begin(self, opened: Opened, count: int, decomposition_bytes: int, copy_bytes: int, folder: Path) -> None:
        """`count` models will be scored; so much disk goes to decompositions and to the scratch copy, in `folder`."""

    def start(self, label: str, number: int, count: int) -> None:
        """A model is about to be made and scored, the `number`-th of `count`."""

    def tell(self, trial: Trial, number: int, count: int) -> None:
        """A model was scored, or could not be."""

    def finish(self) -> None:
        """Every model was scored."""


def measure_peak() -> int:
    """Resident memory of this process at its most, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
