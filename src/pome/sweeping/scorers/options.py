"""Options to a scorer. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from pome.config.spec import check_count, check_switch, check_text, read_float, show
from pome.errors import SpecError
from pome.sweeping.scorers.base import FolderScorer, ModelScorer
from pome.sweeping.scorers.command import CommandScorer
from pome.sweeping.scorers.language import HarnessScorer, LossScorer

# What each option but the scorers themselves goes with.
NEEDS = {
    "minimize": ("score_cmd",),
    "score_timeout": ("score_cmd",),
    "train_data": ("loss",),
    "batch_size": ("loss", "lm_eval"),
    "limit": ("lm_eval",),
}
BATCH_SIZE = 8


def make_scorer(
    *,
    score_cmd: str | None = None,
    loss: str | os.PathLike[str] | None = None,
    lm_eval: str | Sequence[str] | None = None,
    train_data: str | os.PathLike[str] | None = None,
    minimize: bool = False,
    score_timeout: float | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
) -> FolderScorer | ModelScorer:
    """The scorer of the options by name; exactly one of the first three must be given. Raises SpecError."""
    scorers = {"score_cmd": score_cmd, "loss": loss, "lm_eval": lm_eval}
    given = [name for name, value in scorers.items() if value is not None]
    if len(given) != 1:
        said = f"{' and '.join(given)} exclude each other" if given else "nothing to score with"
        raise SpecError(f"{said}; give one of score_cmd, loss and lm_eval")
    options = {
        "minimize": check_switch("minimize", minimize) or None, "score_timeout": score_timeout,
        "train_data": train_data, "batch_size": batch_size, "limit": limit,
    }  # fmt: skip
    for name, value in options.items():
        if value is not None and given[0] not in NEEDS[name]:
            raise SpecError(f"{name}: goes with {' and '.join(NEEDS[name])}, not with {given[0]}")
    for name, count in (("batch_size", batch_size), ("limit", limit)):
        if count is not None:
            check_count(name, count)
    batch_size = batch_size or BATCH_SIZE
    if score_cmd is not None:
        if score_timeout is not None and not 0 < read_float(score_timeout) < math.inf:
            raise SpecError(f"score_timeout: {show(score_timeout)} is not a number of seconds above 0")
        return CommandScorer(check_text("score_cmd", score_cmd), minimize, score_timeout)
    if loss is not None:
        train = None if train_data is None else _read_path("train_data", train_data)
        return LossScorer(_read_path("loss", loss), train, batch_size)
    names = [lm_eval] if isinstance(lm_eval, str) else lm_eval
    if not isinstance(names, (list, tuple)):
        raise SpecError(f"lm_eval: {show(names)} is not a text or a list of texts")
    tasks = tuple(task.strip() for name in names for task in check_text("lm_eval", name).split(",") if task.strip())
    if not tasks:
        raise SpecError("lm_eval: names no task")
    return HarnessScorer(tasks, batch_size, limit)


def _read_path(key: str, value: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(check_text(key, os.fspath(value) if isinstance(value, os.PathLike) else value)))
