"""A terminal: what a person sees of a command, by a terminal emulator (pyte) on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

import pyte

# What differs from run to run or from machine to machine: durations, rates, free disk, memory, tiny errors.
VARYING = (
    (r"(?m)^device (?!auto|cpu).*$", "device NAME"),
    (r" *\b\d+:\d\d:\d\d\b", " 0:00:00"),
    (r" *\b[\d.]+ [kMGT]?B/s", ""),
    (r" *\b[\d.]+ (s|ms|min|h)\b", " 0 s"),
    (r"((?:done|failed) +[\d-]+) +[\d.]+", r"\1  0.0"),
    (r"\u2501+", "\u2501" * 20),  # a bar takes what width the numbers leave
    (r"\b[\d.]+ [MGT]B free", "0 GB free"),
    (r"(memory) [\d.]+ [MG]B", r"\1 0 MB"),
    (r" *\b\d(\.\d+)?e-\d\d\b", " 0e-00"),
)


def show_in_terminal(
    arguments: list[str], folder: Path, columns: int, lines: int, environment: Mapping[str, str]
) -> tuple[int, str]:
    """(exit status, text on the screen and above it) of `pome ARGUMENTS` in a terminal of this size.

    What differs from run to run is put in one form.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    known = {key: value for key, value in environment.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "pome", *arguments],
        cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env={**known, "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    screen = pyte.HistoryScreen(columns, lines, history=10_000, ratio=1e-9)
    stream = pyte.ByteStream(screen)
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux: every writer has closed its end
            break
        if not data:
            break
        stream.feed(data)
    os.close(ours)
    above = ["".join(row[x].data for x in range(columns)) for row in screen.history.top]
    text = "\n".join(line.rstrip() for line in [*above, *screen.display]).rstrip() + "\n"
    text = text.replace(str(folder), "FOLDER")
    for pattern, one_form in VARYING:
        text = re.sub(pattern, one_form, text)
    return process.wait(), text
