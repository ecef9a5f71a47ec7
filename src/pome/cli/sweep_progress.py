"""Progress of a sweep: a line for each model that was scored, and on a terminal a bar of the candidates."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn

from pome.cli.progress import StageBars
from pome.cli.tables.text import name_side, show_bytes, show_clock, show_seconds, wrap_message
from pome.editing.session import Opened
from pome.errors import printable
from pome.reports.sweep_data import show_number
from pome.sweeping.trials import Listener, Trial


class SweepLines(Listener):
    """A line for every model that was scored, for logs and CI."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> SweepLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, opened: Opened, count: int, decomposition_bytes: int, copy_bytes: int, folder: Path) -> None:
        copy = f", a copy of {show_bytes(copy_bytes)} to score from" if copy_bytes else ""
        line = f"{name_side(opened.base)} -> {name_side(opened.ft)}   {count} models to score   "
        place = f"in {printable(str(folder))}: decompositions of up to {show_bytes(decomposition_bytes)}"
        self.say(line + place + copy)
        for notice in opened.notices:
            self.say(f"warning: {printable(notice, 2000)}")

    def tell(self, trial: Trial, number: int, count: int) -> None:
        said = f"no score: {trial.failed}" if trial.score is None else show_number(trial.score.scored.value)
        when = "by an earlier run" if trial.earlier else show_seconds(trial.seconds)
        self.say(f"[{number}/{count}] {printable(trial.label)}  {printable(said)}  {when}")

    def say(self, line: str) -> None:
        text = wrap_message(line, self.console.width) if self.console.is_terminal else line
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class SweepBar(SweepLines):
    """The same lines, and below them a live bar: how many are scored, the mean time of one, the time left, and the
    model that is being scored. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.seconds: list[float] = []  # of the models that this run scored
        self.left = 0
        self.bars = StageBars(
            SpinnerColumn(),
            TextColumn("scoring"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[mean]}", style="dim"),
            TextColumn("{task.fields[time]}", style="dim"),
            console=console,
            expand=True,
        )
        self.row = self.bars.add_task("scoring", total=None, mean="", time="")

    def __exit__(self, *_: object) -> None:
        self.finish()

    def start(self, label: str, number: int, count: int) -> None:
        self.bars.start()
        self.bars.subject = printable(label, 1000)
        self.left = count - number + 1
        self.bars.update(self.row, completed=number - 1, total=count)
        self._show_times()

    def tell(self, trial: Trial, number: int, count: int) -> None:
        super().tell(trial, number, count)
        if not trial.earlier:
            self.seconds.append(trial.seconds)
        self.left = count - number
        self.bars.update(self.row, completed=number, total=count)
        self._show_times()

    def finish(self) -> None:
        # The edit that writes the best has bars of its own.
        self.bars.subject = ""
        self.bars.update(self.row, visible=False)
        self.bars.stop()

    def _show_times(self) -> None:
        if self.seconds:
            mean = sum(self.seconds) / len(self.seconds)
            left = f"{show_clock(mean * self.left)} left" if self.left else ""
            self.bars.update(self.row, mean=f"{show_seconds(mean)} each", time=left)
