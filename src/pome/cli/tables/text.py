"""Texts of sizes and of checkpoints' names, as people read them on the terminal."""

from __future__ import annotations

from pome.checkpoint.source import Checkpoint
from pome.errors import printable
from pome.errors import show_bytes as show_bytes


def name_side(side: Checkpoint) -> str:
    """The last part of a checkpoint's path or Hub id."""
    return printable(side.source.rstrip("/").rpartition("/")[2] or side.source)
