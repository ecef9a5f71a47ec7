"""Scorer from its options. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pome.config.options import (
    SCORER,
    Option,
    Range,
    check_count,
    check_number,
    check_switch,
    check_text,
    documented,
    show,
)
from pome.errors import SpecError
from pome.sweeping.scorers.base import FolderScorer, ModelScorer
from pome.sweeping.scorers.command import CommandScorer
from pome.sweeping.scorers.language import HarnessScorer, LossScorer

# The scorers that each further option goes with.
NEEDS = {
    "minimize": ("score_cmd",),
    "score_timeout": ("score_cmd",),
    "train_data": ("loss",),
    "batch_size": ("loss", "lm_eval"),
    "limit": ("lm_eval",),
}
BATCH_SIZE = 8
SECONDS = Range(0, above=True, unit="seconds")


@documented
def make_scorer(
    *,
    score_cmd: Annotated[
        str | None,
        Option(
            "Scores by its last number, or by JSON with score.",
            more="The shell runs it on a checkpoint folder. JSON may also have `examples` (one number for each "
            "example, whose mean the score is), `weights`, and `metrics` (other numbers to show).",
            metavar="'CMD {model}'", group=SCORER,
        ),
    ] = None,
    loss: Annotated[
        str | os.PathLike[str] | None,
        Option(
            "Mean token loss of prompt/completion or text.",
            more='Records are `{"prompt", "completion"}`, of which the completion\'s tokens count, or `{"text"}`; '
            "transformers runs the model.",
            metavar="FILE.jsonl", group=SCORER,
        ),
    ] = None,
    lm_eval: Annotated[
        str | Sequence[str] | None,
        Option(
            "Scores by tasks of lm-eval, or files of tasks.",
            more="The score is the mean over the tasks.", metavar="TASKS", group=SCORER,
        ),
    ] = None,
    train_data: Annotated[
        str | os.PathLike[str] | None,
        Option(
            "Choose by the loss on this; --loss judges the best.",
            more="The paper's A.3.", metavar="FILE.jsonl", group=SCORER,
        ),
    ] = None,
    minimize: Annotated[bool, Option("Of --score-cmd, less is better.", group=SCORER)] = False,
    score_timeout: Annotated[
        float | None,
        Option(
            "Of one --score-cmd; after it the candidate has failed.",
            metavar="SECONDS", group=SCORER, range=SECONDS, everyday=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        Option(
            "Records scored at once, at most.",
            metavar="N", group=SCORER, everyday=False, instead={"sweep": {"default": str(BATCH_SIZE)}},
        ),
    ] = None,
    limit: Annotated[
        int | None, Option("Examples of each --lm-eval task.", metavar="N", group=SCORER, everyday=False)
    ] = None,
) -> FolderScorer | ModelScorer:  # fmt: skip
    """The scorer of the options by name; exactly one of the first three must be given. Raises SpecError."""
    scorers = {"score_cmd": score_cmd, "loss": loss, "lm_eval": lm_eval}
    given = [name for name, value in scorers.items() if value is not None]
    if len(given) != 1:
        said = f"{' and '.join(given)} exclude each other" if given else "nothing to score with"
        raise SpecError(f"{said}; give one of score_cmd, loss and lm_eval", options=scorers)
    options = {
        "minimize": check_switch("minimize", minimize) or None, "score_timeout": score_timeout,
        "train_data": train_data, "batch_size": batch_size, "limit": limit,
    }  # fmt: skip
    for name, value in options.items():
        if value is not None and given[0] not in NEEDS[name]:
            said = f"{name}: goes with {' and '.join(NEEDS[name])}, not with {given[0]}"
            raise SpecError(said, options=[name, *scorers])
    for name, count in (("batch_size", batch_size), ("limit", limit)):
        if count is not None:
            check_count(name, count)
    batch_size = batch_size or BATCH_SIZE
    if score_cmd is not None:
        if score_timeout is not None:
            check_number("score_timeout", score_timeout, SECONDS)
        return CommandScorer(check_text("score_cmd", score_cmd), minimize, score_timeout)
    if loss is not None:
        train = None if train_data is None else _read_path("train_data", train_data)
        return LossScorer(_read_path("loss", loss), train, batch_size)
    names = [lm_eval] if isinstance(lm_eval, str) else lm_eval
    if not isinstance(names, (list, tuple)):
        raise SpecError(f"lm_eval: {show(names)} is not a text or a list of texts", options=["lm_eval"])
    tasks = tuple(task.strip() for name in names for task in check_text("lm_eval", name).split(",") if task.strip())
    if not tasks:
        raise SpecError("lm_eval: names no task", options=["lm_eval"])
    return HarnessScorer(tasks, batch_size, limit)


def _read_path(key: str, value: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(check_text(key, os.fspath(value) if isinstance(value, os.PathLike) else value)))
