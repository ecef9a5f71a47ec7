"""Progress of a run, as told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pome.checkpoint.source import Checkpoint
    from pome.planning.units import Plan


class Progress:
    """Listener to a run: subclass it and override what you show. This class shows nothing.

    Tasks are `copy`, `compare` and `hash`, counted in bytes, and `edit` and `survey`, counted in units (2-D tensors, or
    single experts of a 3-D one). Calls come from the thread that started the run, but for `advance` of `hash`, which
    may come from another.
    """

    def begin(self, plan: Plan, ft: Checkpoint, devices: list[str], resumed: int) -> None:
        """The plan is made and nothing is written yet.

        `devices` are torch devices such as `cuda:0`. `resumed` counts the units that an earlier run finished.
        """

    def note(self, text: str) -> None:
        """A notice about the inputs, found by reading them."""

    def start(self, task: str, total: int, work: float = 0.0) -> None:
        """A task of `total` bytes (`copy`, `compare`, `hash`) or units (`edit`, `survey`) begins.

        `work` is the sum of `Unit.work` over what this run will do itself, for an estimate of the time left.
        """

    def advance(self, task: str, amount: int, nbytes: int = 0, note: str = "", work: float = 0.0) -> None:
        """`amount` more of the task is done, which moved `nbytes` bytes; `note` names what was worked on.

        `work` is the part of the task's work that it took: 0 for what an earlier run finished.
        """

    def finish(self, task: str) -> None:
        """The task is done."""


def advance_bytes(progress: Progress, task: str) -> Callable[[int], None]:
    """A callback that tells `progress` of so many more bytes of a task."""
    return lambda amount: progress.advance(task, amount, amount)
