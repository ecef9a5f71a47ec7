"""Texts of sizes and of checkpoints' names, as people read them on the terminal."""

from __future__ import annotations

from pome.checkpoint.source import Checkpoint
from pome.errors import printable


def show_bytes(count: float) -> str:
    """`2.9 GB`, in powers of ten as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def name_side(side: Checkpoint) -> str:
    """The last part of a checkpoint's path or Hub id."""
    return printable(side.source.rstrip("/").rpartition("/")[2] or side.source)
