"""Texts for people: names of checkpoints, durations, numbers with their nouns, lines that wrap on words."""

from __future__ import annotations

import re
import textwrap

from pome.checkpoint.source import Checkpoint
from pome.errors import printable
from pome.errors import show_bytes as show_bytes

# A number and its unit stay on one line.
TOGETHER = re.compile(r"(?<=\d) (?=(?:B|kB|MB|GB|TB|s|min|h|%)(?:\W|$))")
CONTINUED = " \\"
HANG = "  "  # what the later lines of a message begin with


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
    lines = []
    for line in text.split("\n"):
        joined = TOGETHER.sub("\u00a0", line)
        indent = HANG if line[:1] != " " else line[: len(line) - len(line.lstrip())] + HANG
        more = CONTINUED if line.lstrip().startswith("pome ") else ""
        pieces = textwrap.wrap(
            joined, max(1, width - len(more)), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
            replace_whitespace=False, drop_whitespace=True,
        )  # fmt: skip
        whole = [piece.replace("\u00a0", " ") for piece in pieces] or [""]
        lines += [*(f"{piece}{more}" for piece in whole[:-1]), whole[-1]]
    return "\n".join(lines)


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
