"""Progress of an edit or a survey: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from pome.checkpoint.source import Checkpoint
from pome.cli.tables.text import show_bytes, show_clock, show_seconds, wrap_message
from pome.errors import printable
from pome.output.progress import Progress
from pome.planning.units import Plan

VERBS = {"copy": "copying", "compare": "comparing", "edit": "editing", "hash": "hashing", "survey": "inspecting"}
COUNTED = ("edit", "survey")  # tasks counted in units, not in bytes
PLAIN_SECONDS = 10.0  # between two plain lines: often enough for a log, seldom enough to read it
SETTLED = 0.5  # seconds after which a speed says something
BRIEF = 0.1  # of a whole stage: a file that was hashed while matrices were edited is reported in a moment


@dataclass
class Stage:
    """What is known of one task: amounts in bytes or units, bytes moved, and work as `Unit.work` counts it."""

    task: str
    total: int
    work: float
    begun: float
    done: int = 0
    moved: int = 0
    worked: float = 0.0
    ended: float | None = None

    def spend(self, now: float) -> float:
        """Seconds since it began, until it ended."""
        return (now if self.ended is None else self.ended) - self.begun

    def describe_amount(self) -> str:
        """`12/32` for units, `1.2 GB of 2.9 GB` for bytes."""
        if self.task in COUNTED:
            return f"{self.done}/{self.total}"
        if self.done == self.total:
            return show_bytes(self.total)
        return f"{show_bytes(self.done)} of {show_bytes(self.total)}"

    def describe_speed(self, now: float) -> str:
        """Bytes a second, on the mean of the stage; empty while too little is known."""
        spent = self.spend(now)
        fresh = spent < (SETTLED if self.ended is None else BRIEF)
        return "" if fresh or not self.moved else f"{show_bytes(self.moved / spent)}/s"

    def estimate_left(self, now: float) -> float | None:
        """Seconds until the end: by the work that is done where it is known, else by the amount."""
        part = self.worked / self.work if self.work else self.done / self.total if self.total else 0.0
        return self.spend(now) * (1.0 - part) / part if 0.0 < part < 1.0 else None


class ShownProgress(Progress):
    """Progress that a person reads: the common part of both ways to show it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stages: dict[str, Stage] = {}
        self.running: str | None = None
        self.stopping = False

    def begin(self, plan: Plan, ft: Checkpoint, devices: list[str], resumed: int) -> None:
        if resumed:
            self.say(f"going on: {resumed} of {len(plan.units)} units were finished by an earlier run")
        self.say(f"device {', '.join(devices)}")

    def note(self, text: str) -> None:
        self.say(text)

    def start(self, task: str, total: int, work: float = 0.0) -> None:
        self.running = task
        self.stages[task] = Stage(task, total, work, time.monotonic())

    def advance(self, task: str, amount: int, nbytes: int = 0, note: str = "", work: float = 0.0) -> None:
        stage = self.stages[task]
        stage.done += amount
        stage.moved += nbytes
        stage.worked += work

    def finish(self, task: str) -> None:
        self.running = None
        self.stages[task].ended = time.monotonic()

    def acknowledge_interrupt(self) -> None:
        """Say at once that Ctrl-C was heard; what is being worked on is finished first."""
        if not self.stopping:
            self.stopping = True
            self.say("stopping after this matrix" if self.running in COUNTED else "stopping")

    def say(self, line: str) -> None:
        text = wrap_message(line, self.console.width) if self.console.is_terminal else line
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class LineProgress(ShownProgress):
    """Plain lines for logs and CI."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.said = 0.0

    def start(self, task: str, total: int, work: float = 0.0) -> None:
        super().start(task, total, work)
        self.said = self.stages[task].begun

    def advance(self, task: str, amount: int, nbytes: int = 0, note: str = "", work: float = 0.0) -> None:
        super().advance(task, amount, nbytes, note, work)
        now = time.monotonic()
        if now - self.said >= PLAIN_SECONDS:
            self.said = now
            self.say(self._describe(self.stages[task], now))

    def finish(self, task: str) -> None:
        super().finish(task)
        stage = self.stages[task]
        amount = f"{stage.total} units" if task in COUNTED else show_bytes(stage.total)
        if task == "copy" and not stage.done and stage.total:
            self.say(f"{VERBS[task]} {amount}: done by an earlier run")
        else:
            self.say(f"{VERBS[task]} {amount}: done in {show_seconds(stage.spend(time.monotonic()))}")

    def _describe(self, stage: Stage, now: float) -> str:
        left = stage.estimate_left(now) if stage.spend(now) > SETTLED else None
        words = [stage.describe_speed(now), "" if left is None else f"{show_seconds(left)} left"]
        return "  ".join([f"{VERBS[stage.task]} {stage.describe_amount()}", *filter(None, words)])


class StageColumn(ProgressColumn):
    """One text of a stage, as a method of BarProgress gives it."""

    def __init__(self, describe: str, justify: str = "left") -> None:
        super().__init__()
        self.describe, self.justify = describe, justify

    def render(self, task: Task) -> Text:
        bars: BarProgress = task.fields["owner"]
        said: str = getattr(bars, self.describe)(bars.stages[task.fields["name"]])
        return Text(said, style="dim" if self.justify == "right" else "", no_wrap=True)


class StageBars(Bars):
    """Bars, and below them the name of what is worked on, on a line of its own."""

    subject = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.subject:
            yield Text(shorten_name(self.subject, self.console.width), style="dim", no_wrap=True)


class BarProgress(ShownProgress):
    """Live bars on a terminal, from the first task on: before it the Hub's client may show its own.

    Use as a context manager.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.rows: dict[str, TaskID] = {}
        self.bars = StageBars(
            SpinnerColumn(finished_text="\u2713"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            StageColumn("_describe_amount"),
            StageColumn("_describe_speed", "right"),
            StageColumn("_describe_time", "right"),
            console=console,
            expand=True,
        )

    def __enter__(self) -> BarProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.subject = ""
        self.bars.stop()

    def start(self, task: str, total: int, work: float = 0.0) -> None:
        super().start(task, total, work)
        self.bars.start()
        self.rows[task] = self.bars.add_task(VERBS[task], total=total, owner=self, name=task)

    def advance(self, task: str, amount: int, nbytes: int = 0, note: str = "", work: float = 0.0) -> None:
        super().advance(task, amount, nbytes, note, work)
        if note:
            self.bars.subject = printable(note, 1000)
        self.bars.update(self.rows[task], advance=amount)

    def finish(self, task: str) -> None:
        super().finish(task)
        self.bars.subject = ""
        # An earlier run may have done a part, of which this one reports nothing.
        self.bars.update(self.rows[task], completed=self.stages[task].total)
        self.bars.stop_task(self.rows[task])

    def _describe_amount(self, stage: Stage) -> str:
        return stage.describe_amount() if stage.ended is None or stage.task in COUNTED else show_bytes(stage.total)

    def _describe_speed(self, stage: Stage) -> str:
        return stage.describe_speed(time.monotonic())

    def _describe_time(self, stage: Stage) -> str:
        now = time.monotonic()
        if stage.ended is not None:
            return (
                "earlier run"
                if stage.task == "copy" and not stage.done and stage.total
                else show_seconds(stage.spend(now))
            )
        left = stage.estimate_left(now)
        return "" if left is None else f"{show_clock(left)} left"


def shorten_name(name: str, width: int) -> str:
    """A name in one line: of a longer one the end, which tells tensors apart."""
    return name if len(name) <= width else "\u2026" + name[-(width - 1) :]
