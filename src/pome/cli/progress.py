"""Progress of a command: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from pome.checkpoint.source import Checkpoint
from pome.cli.tables.text import name_side, show_bytes
from pome.editing.session import Opened
from pome.errors import printable
from pome.output.progress import Progress
from pome.planning.units import Plan
from pome.reports.sweep_data import show_number
from pome.sweeping.trials import Listener, Trial

VERBS = {"copy": "copying", "edit": "editing", "hash": "hashing", "survey": "inspecting"}
COUNTED = ("edit", "survey")  # tasks counted in units, not in bytes
PLAIN_SECONDS = 10.0  # between two plain lines: often enough for a log, seldom enough to read it


class LineProgress(Progress):
    """Plain lines for logs and CI."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.totals: dict[str, int] = {}
        self.done: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.begun: dict[str, float] = {}
        self.said = 0.0

    def begin(self, plan: Plan, ft: Checkpoint, devices: list[str], resumed: int) -> None:
        if resumed:
            self.say(f"going on: {resumed} of {len(plan.units)} units were finished by an earlier run")
        self.say(f"device {', '.join(devices)}")

    def note(self, text: str) -> None:
        self.say(text)

    def start(self, task: str, total: int) -> None:
        self.totals[task] = total
        self.begun[task] = self.said = time.monotonic()

    def advance(self, task: str, amount: int, nbytes: int = 0, note: str = "") -> None:
        self.done[task] += amount
        self.moved[task] += nbytes
        now = time.monotonic()
        if now - self.said >= PLAIN_SECONDS:
            self.said = now
            self.say(self._describe(task, now))

    def finish(self, task: str) -> None:
        total = self.totals[task]
        amount = f"{total} units" if task in COUNTED else show_bytes(total)
        self.say(f"{VERBS[task]} {amount}: done in {time.monotonic() - self.begun[task]:.1f} s")

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _describe(self, task: str, now: float) -> str:
        count, total = self.done[task], self.totals[task]
        spent = now - self.begun[task]
        amount = f"{count}/{total}" if task in COUNTED else f"{show_bytes(count)} of {show_bytes(total)}"
        rate = f"  {show_bytes(self.moved[task] / spent)}/s" if spent > 0.5 else ""
        left = f"  {spent / count * (total - count):.0f} s left" if 0 < count < total and spent > 0.5 else ""
        return f"{VERBS[task]} {amount}{rate}{left}"


class SweepLines(Listener):
    """A line for every model scored, on a terminal and in a log: a score may take an hour, and none is like another."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, opened: Opened, count: int, basis_bytes: int, copy_bytes: int, folder: Path) -> None:
        copy = f", a copy of {show_bytes(copy_bytes)} to score from" if copy_bytes else ""
        line = f"{name_side(opened.base)} -> {name_side(opened.ft)}   {count} models to score   "
        place = f"in {printable(str(folder))}: decompositions of up to {show_bytes(basis_bytes)}"
        self._say(line + place + copy)
        for notice in opened.notices:
            self._say(f"warning: {printable(notice, 2000)}")

    def tell(self, trial: Trial, number: int, count: int) -> None:
        said = f"no score: {trial.failed}" if trial.score is None else show_number(trial.score.scored.value)
        when = "by an earlier run" if trial.earlier else f"{trial.seconds:.1f} s"
        self._say(f"[{number}/{count}] {printable(trial.label)}  {printable(said)}  {when}")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Amount(ProgressColumn):
    """`12/32` for units, `1.2 GB` for bytes."""

    def render(self, task: Task) -> Text:
        if task.fields["units"]:
            return MofNCompleteColumn().render(task)
        return Text(f"{show_bytes(task.completed)} of {show_bytes(task.total or 0)}")


class _Rate(ProgressColumn):
    """Bytes a second since the task began."""

    def render(self, task: Task) -> Text:
        moved = task.fields["moved"]
        return Text(f"{show_bytes(moved / task.elapsed)}/s" if task.elapsed and moved else "", style="dim")


class BarProgress(Progress):
    """Live bars on a terminal, from the first task on: before it the Hub's client may show its own. Use as a context
    manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.tasks: dict[str, TaskID] = {}
        self.bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            _Amount(),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
        )

    def __enter__(self) -> BarProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def begin(self, plan: Plan, ft: Checkpoint, devices: list[str], resumed: int) -> None:
        if resumed:
            self.console.print(f"going on: {resumed} of {len(plan.units)} units were finished by an earlier run")

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, task: str, total: int) -> None:
        self.bars.start()
        self.tasks[task] = self.bars.add_task(VERBS[task], total=total, note="", moved=0, units=task in COUNTED)

    def advance(self, task: str, amount: int, nbytes: int = 0, note: str = "") -> None:
        row = self.tasks[task]
        moved = self.bars.tasks[row].fields["moved"] + nbytes
        self.bars.update(row, advance=amount, moved=moved, note=printable(note, 60))

    def finish(self, task: str) -> None:
        self.bars.update(self.tasks[task], note="")
