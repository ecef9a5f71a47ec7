"""The tree of errors.

Every message is one line that says where (file, tensor), what is wrong and what to do next. The command line
prints it without a traceback and leaves with `exit_status`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = [
    "CheckpointError", "ClusterError", "HeaderError", "HubError", "NumericalError", "OutputError", "PairingError",
    "PomeError", "ScoreError", "SelectionError", "SpecError", "VerificationError",
]  # fmt: skip

# A command, which is typed as it stands; or an option of the command line, and no path.
FLAG = re.compile(r"`[^`]*`|(?<![^\s(])--([a-z]+(?:-[a-z]+)*)(?![\w/-]|\.\w)")


class PomeError(Exception):
    """Base of every error that pome raises on purpose.

    A message names options in one of two ways. `options` lists those that it calls by their names in Python and YAML
    (`rank_ratio`); the command line shows them as it knows them (`--rank-ratio`). Advice is written with the option of
    the command line (`--exclude`); `str(error)` shows the argument (`exclude`), `args[0]` the option. A command in
    backquotes stays as it is typed.
    """

    exit_status = 1

    def __init__(self, message: str = "", *, options: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.options = tuple(options)

    def __str__(self) -> str:
        return FLAG.sub(lambda found: found[1].replace("-", "_") if found[1] else found[0], super().__str__())


class SpecError(PomeError):
    """What the user asked for cannot be: an unknown key, a value out of range, options at odds."""

    exit_status = 2


class CheckpointError(PomeError):
    """A checkpoint cannot be opened or read: missing, truncated, malformed, pickled, quantized."""


class HeaderError(CheckpointError):
    """The header of a safetensors file breaks the format."""


class HubError(CheckpointError):
    """The Hub refused or did not answer."""


class SelectionError(PomeError):
    """The selection matches nothing that can be edited."""


class PairingError(PomeError):
    """BASE and FT do not fit together: another architecture, other shapes, another orientation."""


class NumericalError(PomeError):
    """A matrix cannot be edited: NaN or infinity on a side, or an edit that the output dtype cannot hold."""


class ScoreError(PomeError):
    """A model has no score: its scorer failed, took too long, or gave no finite number."""


class OutputError(PomeError):
    """OUT cannot be written: it exists, is in use, lies inside an input, or the disk refuses."""


class ClusterError(PomeError):
    """The nodes of a Ray cluster cannot do the work: none there, none that fits, or one that finds other files."""


class VerificationError(PomeError):
    """An output is not what its manifest says."""


def printable(text: str, limit: int = 200) -> str:
    """`text` fit for a one-line message: at most `limit` characters, none that a terminal acts on.

    Names of tensors and files come from checkpoints that nobody vetted; a control character or a
    bidirectional override in one would let it rewrite the line it is printed on.
    """
    if len(text) <= limit and text.isprintable():
        return text
    escaped = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text[: limit + 1]
    )
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


def show_bytes(count: float) -> str:
    """`2.9 GB`, in powers of ten as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
