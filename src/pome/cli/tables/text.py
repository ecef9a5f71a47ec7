"""Texts for people: names of checkpoints, durations, numbers with their nouns, lines that wrap on words."""

from __future__ import annotations

import re
import shlex
import textwrap

from pome.checkpoint.source import Checkpoint
from pome.errors import printable
from pome.errors import show_bytes as show_bytes

# A number and its unit stay on one line.
TOGETHER = re.compile(r"(?<=\d) (?=(?:B|kB|MB|GB|TB|s|min|h|%)(?:\W|$))")
COMMAND = re.compile(r" +pome ")  # a line that can be copied
HANG, NARROW = "  ", 40  # indentation of the later lines of a message, where the width allows it


def name_side(side: Checkpoint) -> str:
    """The last part of a checkpoint's path or Hub id."""
    return printable(side.source.rstrip("/").rpartition("/")[2] or side.source)


def show_seconds(seconds: float) -> str:
    """A duration: `2.1 s`, `3 min 20 s`, `1 h 5 min`."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def show_clock(seconds: float) -> str:
    """A duration as a clock shows it: `0:03:20`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def count_noun(count: int, one: str, many: str = "") -> str:
    """A number with its noun: `1 matrix`, `2 matrices`."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def wrap_message(text: str, width: int) -> str:
    """A message in lines of at most `width` columns, broken between words alone.

    What is longer than a line (a path, the name of a tensor, a number) has a line of its own and stays whole. A command
    goes on after a backslash, so that it can be copied from the screen.
    """
    return "\n".join(
        _wrap_command(line, width) if COMMAND.match(line) else _wrap(line, width) for line in text.split("\n")
    )


def _wrap(line: str, width: int) -> str:
    hang = HANG if width >= NARROW else ""
    start = line[: len(line) - len(line.lstrip())]
    pieces = textwrap.wrap(
        TOGETHER.sub("\u00a0", line), width, subsequent_indent=start + hang, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(pieces).replace("\u00a0", " ")


def _wrap_command(line: str, width: int) -> str:
    start = line[: len(line) - len(line.lstrip())]
    lines = [start]
    for word in map(shlex.quote, shlex.split(line)):
        if lines[-1].strip() and len(f"{lines[-1]}{word} \\") > width:
            lines.append(start + HANG)
        lines[-1] += f"{word} "
    return " \\\n".join(each.rstrip() for each in lines)


def wrap_name(name: str, width: int) -> str:
    """A name in lines of at most `width` columns, broken after `.`, `_`, `/` or between words, and elsewhere only if
    one piece alone is too long."""
    lines = [""]
    for piece in re.split(r"(?<=[._/ ])", name):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        while len(piece.rstrip()) > width:
            lines[-1], piece = piece[:width], piece[width:]
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines if line)
