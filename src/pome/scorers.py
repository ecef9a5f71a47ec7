"""Options to a scorer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pome.errors import SpecError
from pome.evaluate import CommandScorer, FolderScorer, ModelScorer
from pome.language import HarnessScorer, LossScorer


def make_scorer(
    *,
    score_cmd: str | None = None,
    loss: str | None = None,
    lm_eval: str | Sequence[str] | None = None,
    train_data: str | None = None,
    minimize: bool = False,
    score_timeout: float | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> FolderScorer | ModelScorer:
    """The scorer of the options by name; exactly one of the first three must be given. Raises SpecError."""
    given = [name for name, value in (("score_cmd", score_cmd), ("loss", loss), ("lm_eval", lm_eval)) if value]
    if len(given) != 1:
        said = f"{' and '.join(given)} exclude each other" if given else "nothing to score with"
        raise SpecError(f"{said}; give one of score_cmd, loss and lm_eval")
    for name, value, needs in (
        ("minimize", minimize, "score_cmd"),
        ("score_timeout", score_timeout, "score_cmd"),
        ("train_data", train_data, "loss"),
        ("limit", limit, "lm_eval"),
    ):
        if value and given != [needs]:
            raise SpecError(f"{name}: goes with {needs}, not with {given[0]}")
    for name, count in (("batch_size", batch_size), ("limit", limit)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise SpecError(f"{name}: {count!r} is not a whole number of at least 1")
    if score_cmd:
        if score_timeout is not None and not (isinstance(score_timeout, (int, float)) and score_timeout > 0):
            raise SpecError(f"score_timeout: {score_timeout!r} is not a number of seconds above 0")
        return CommandScorer(score_cmd, minimize, score_timeout)
    if loss:
        train = Path(train_data).expanduser() if train_data else None
        return LossScorer(Path(loss).expanduser(), train, batch_size)
    names = [lm_eval] if isinstance(lm_eval, str) else list(lm_eval or ())
    tasks = tuple(task.strip() for name in names for task in name.split(",") if task.strip())
    return HarnessScorer(tasks, batch_size, limit)
