"""Files of reports: where they may go, and writing each whole or not at all. No torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.config.outputs import Reports
from pome.errors import OutputError, printable


def check_targets(reports: Reports, sides: Iterable[str | os.PathLike[str] | None]) -> None:
    """Refuse, before the long work, a report that could not or must not be written after it. Raises OutputError.

    `sides` are BASE, FT and OUT. No report goes into one of them, wherever links lead, nor into the folder of another
    checkpoint or output: a mistyped path would replace its weights or its config.
    """
    forbidden = {resolve_path(side): os.fspath(side) for side in sides if side is not None}
    taken: set[Path] = set()
    for path in reports.paths:
        shown, target = printable(path), resolve_path(path)
        inside = next((forbidden[place] for place in (target, *target.parents) if place in forbidden), None)
        if inside is not None:
            raise OutputError(f"{shown}: lies in {printable(inside)}, which is an input or OUT; choose another place")
        if target in taken:
            raise OutputError(f"{shown}: two reports would be written there; give each its own")
        taken.add(target)
        if not target.parent.is_dir():
            raise OutputError(f"{shown}: its folder does not exist; make it first")
        if target.exists() and (path == reports.plots) != target.is_dir():
            raise OutputError(
                f"{shown}: a {'folder; name the file' if target.is_dir() else 'file; name the folder'} to write"
            )
        if target.exists() and not target.is_dir() and not target.is_file():
            raise OutputError(f"{shown}: no regular file; name another to write")
        for folder in (target, target.parent):
            if folder.is_dir() and any(n.endswith(".safetensors") or n == MANIFEST_NAME for n in os.listdir(folder)):
                raise OutputError(f"{shown}: {printable(str(folder))} holds a checkpoint; choose another folder")
        try:
            with tempfile.TemporaryFile(dir=target if target.is_dir() else target.parent):
                pass
        except OSError as error:
            raise OutputError(f"{shown}: cannot be written: {error.strerror}") from None
    if reports.plots:
        from pome.reports.plots import load_matplotlib

        load_matplotlib()


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """A path of the user's with `~` and links followed."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def write_texts(reports: Reports, make_page: Callable[[], str], make_csv: Callable[[], str]) -> list[Path]:
    """Write the page and the table that were asked for, each whole or not at all. Raises OutputError."""
    made: list[Path] = []
    for path, make in ((reports.html, make_page), (reports.csv, make_csv)):
        if path is None:
            continue
        target = resolve_path(path)
        text, beside = make(), target.with_name(f".pome-{os.getpid()}.part")
        try:
            beside.write_text(text, encoding="utf-8", newline="")
            os.replace(beside, target)
        except OSError as error:
            raise OutputError(f"{printable(path)}: cannot be written: {error.strerror}") from None
        finally:
            beside.unlink(missing_ok=True)
        made.append(Path(os.path.expanduser(path)))
    return made
