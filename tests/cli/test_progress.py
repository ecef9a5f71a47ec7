"""Progress of an edit and of a sweep on a terminal of 80 columns, by a clock of the test's own."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import pome.cli.progress
from pome.cli.progress import BarProgress, LineProgress, Stage
from pome.cli.sweep_progress import SweepBar
from pome.sweeping.scorers.base import Score, Scored
from pome.sweeping.trials import Trial

NAME = "model.layers.11.mlp.experts.down_proj.weight"


class Clock:
    """A clock that stands until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pome.cli.progress, "time", made)
    return made


def make_terminal(width: int = 80, height: int = 24) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)


def show(bars: Any, width: int = 80) -> list[str]:
    """What the live part of the screen shows now, line by line."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(bars.get_renderable())
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


PLAN: Any = SimpleNamespace(units=range(4))
FT: Any = None


def test_a_finished_stage_keeps_its_speed_and_time(clock: Clock) -> None:
    with BarProgress(make_terminal()) as bars:
        bars.start("copy", 8_000_000)
        clock.now += 2.0
        bars.advance("copy", 8_000_000, 8_000_000)
        bars.finish("copy")
        (line,) = show(bars.bars)
        assert line.split()[-6:] == ["8.0", "MB", "4.0", "MB/s", "2.0", "s"] and line.startswith("\u2713 copying")
        clock.now += 500.0
        assert show(bars.bars)[0].split()[-6:] == line.split()[-6:]


def test_a_stage_of_a_moment_has_no_speed(clock: Clock) -> None:
    with BarProgress(make_terminal()) as bars:
        bars.start("hash", 8_000_000)
        clock.now += 0.01
        bars.advance("hash", 8_000_000, 8_000_000)
        bars.finish("hash")
        assert "/s" not in show(bars.bars)[0]


def test_a_resumed_copy_is_said_to_be_an_earlier_run_s_and_does_not_spin(clock: Clock) -> None:
    with BarProgress(make_terminal()) as bars:
        bars.begin(PLAN, FT, ["cuda:0"], 3)
        bars.start("copy", 8_000_000)
        bars.finish("copy")
        (line,) = show(bars.bars)
        assert line.startswith("\u2713 copying") and line.endswith("8.0 MB  earlier run")
        screen = bars.console.file
        assert isinstance(screen, io.StringIO)
        assert "going on: 3 of 4 units were finished by an earlier run" in screen.getvalue()
        assert "device cuda:0" in screen.getvalue()


def test_the_name_has_a_line_of_its_own_and_no_line_is_wider_than_the_terminal(clock: Clock) -> None:
    with BarProgress(make_terminal()) as bars:
        bars.start("edit", 32, 32.0)
        clock.now += 123.0
        bars.advance("edit", 12, 1_234_000_000, NAME, 12.0)
        for width in (80, 60):
            stage, name = show(bars.bars, width)
            assert name == NAME and len(stage) <= width
            assert stage.split()[-5:] == ["12/32", "10.0", "MB/s", "0:03:25", "left"]
        bars.advance("edit", 1, 0, "x." * 100 + "end", 1.0)
        assert show(bars.bars, 80)[1] == "\u2026" + ("x." * 100 + "end")[-79:]


def test_time_left_goes_by_the_work_and_not_by_the_count(clock: Clock) -> None:
    stage = Stage("edit", total=11, work=100.0, begun=0.0)
    stage.done, stage.worked = 10, 10.0  # ten small matrices; a large one is left
    assert stage.estimate_left(1.0) == pytest.approx(9.0)
    resumed = Stage("edit", total=20, work=100.0, begun=0.0)
    resumed.done = 10  # by an earlier run
    assert resumed.estimate_left(1.0) is None
    resumed.done, resumed.worked = 11, 25.0
    assert resumed.estimate_left(2.0) == pytest.approx(6.0)


def test_lines_of_a_log_are_whole_and_say_what_is_left(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=40)
    lines = LineProgress(console)
    lines.begin(PLAN, FT, ["cuda:0", "cuda:1"], 1)
    lines.start("edit", 4, 30.0)
    lines.advance("edit", 1)
    clock.now += 10.0
    lines.advance("edit", 1, 50_000_000, NAME, 10.0)
    clock.now += 20.0
    lines.finish("edit")
    lines.acknowledge_interrupt()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "going on: 1 of 4 units were finished by an earlier run",
        "device cuda:0, cuda:1",
        "editing 2/4  5.0 MB/s  20.0 s left",
        "editing 4 units: done in 30.0 s",
        "stopping",
    ]


def test_an_interrupt_is_acknowledged_once() -> None:
    console = Console(file=io.StringIO(), width=80)
    lines = LineProgress(console)
    lines.start("edit", 4)
    lines.acknowledge_interrupt()
    lines.acknowledge_interrupt()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "stopping after this matrix\n"


def test_a_sweep_shows_what_is_scored_the_mean_time_and_what_is_left() -> None:
    with SweepBar(make_terminal()) as bar:
        bar.start("fine-tuned", 1, 5)
        assert show(bar.bars)[1] == "fine-tuned"
        for number, (label, seconds, earlier) in enumerate([("fine-tuned", 9.0, True), ("base", 20.0, False)], 1):
            bar.tell(Trial(label, label, None, Score(Scored(0.5)), None, seconds, earlier), number, 5)
        bar.start("up K=0.5 frobenius beta=1", 3, 5)
        line, label = show(bar.bars)
        assert label == "up K=0.5 frobenius beta=1"
        assert line.split()[-5:] == ["2/5", "20.0", "s", "each", "0:01:00"] or line.split()[-6:] == [
            "2/5", "20.0", "s", "each", "0:01:00", "left"
        ]  # fmt: skip
        screen = bar.console.file
        assert isinstance(screen, io.StringIO)
        assert "[1/5] fine-tuned  0.5  by an earlier run" in screen.getvalue()
        assert "[2/5] base  0.5  20.0 s" in screen.getvalue()
        bar.finish()
        assert show(bar.bars) == []
