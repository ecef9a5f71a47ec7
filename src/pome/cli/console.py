"""Streams of the command line: what people read on stderr, the one document on stdout, errors as messages."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pome.config.options import as_flag
from pome.errors import OutputError, PomeError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from pome.output.progress import Progress

LOG_WIDTH = 140


def make_console(quiet: bool) -> Console:
    """Everything for people goes to stderr; stdout is for `--json`."""
    from rich.console import Console

    # The stream itself and not whatever sys.stderr is later: a scorer's own lines go elsewhere.
    console = Console(file=sys.stderr, quiet=quiet)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = LOG_WIDTH  # a log has no width of its own, and tables should not fold to a terminal's 80
    # The Hub's library, not loaded yet, draws bars of its own and tells of each request that it repeats.
    if quiet or not console.is_terminal:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if quiet:
        os.environ["HF_HUB_VERBOSITY"] = "error"
    return console


@contextlib.contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """Bars on a terminal, plain lines in a log, nothing for --quiet; an interrupt is acknowledged at once."""
    from pome.cli.interrupts import acknowledge_interrupts
    from pome.cli.progress import BarProgress, LineProgress
    from pome.output.progress import Progress

    if console.quiet:
        yield Progress()
    elif console.is_terminal:
        with BarProgress(console) as bars, acknowledge_interrupts(bars.acknowledge_interrupt):
            yield bars
    else:
        lines = LineProgress(console)
        with acknowledge_interrupts(lines.acknowledge_interrupt):
            yield lines


def print_lines(console: Console, lines: Iterable[str], limit: int = 2000) -> None:
    """Lines without markup or colour for numbers: on a terminal wrapped between words, in a log one line each."""
    from pome.cli.tables.text import wrap_message

    for line in lines:
        text = "\n".join(printable(piece, limit) for piece in line.split("\n"))
        shown = wrap_message(text, console.width) if console.is_terminal else text
        console.print(shown, highlight=False, markup=False, soft_wrap=True)


def write_document(document: Iterable[str], done: str = "") -> None:
    """The one document of `--json`; `done` says what stands all the same if it cannot be written."""
    try:
        sys.stdout.writelines(document)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{done}the document of --json could not be written: {error.strerror}") from None


def complain(message: str) -> None:
    """One error as a message on stderr: on a terminal wrapped between words, elsewhere one line."""
    from pome.cli.tables.text import wrap_message

    text = f"error: {message}"
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            text = wrap_message(text, shutil.get_terminal_size().columns)
        print(text, file=sys.stderr, flush=True)


def describe_error(error: BaseException) -> str:
    """One error as a message for people, whatever raised it."""
    if isinstance(error, MemoryError):
        return "out of memory; use a machine with more, or --exclude the largest matrices (see --dry-run)"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return str(error)


def name_options(error: PomeError) -> str:
    """The message of an error, with the options that it speaks of named as on the command line.

    What stands in quotes is the user's text and stays.
    """
    message = str(error.args[0])
    if not error.options:
        return message
    names = "|".join(map(re.escape, sorted(error.options, key=len, reverse=True)))
    pieces = re.split(r"""('[^']*'|"[^"]*"|`[^`]*`)""", message)
    pieces[::2] = [
        re.sub(rf"(?<![\w-])({names})(?![\w-])", lambda match: as_flag(match[1]), text) for text in pieces[::2]
    ]
    return "".join(pieces)
