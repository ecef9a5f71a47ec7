"""Comparison of an output's bytes with those of its inputs, outside the edited matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from pome.checkpoint.files import File, read_range
from pome.checkpoint.hashing import hash_file
from pome.checkpoint.source import Checkpoint
from pome.errors import printable
from pome.manifest import FileRecord, SideRecord
from pome.planning.units import Plan

CHUNK = 8 << 20

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Difference:
    """One thing in an output that is not as its manifest or its inputs say.

    file: its name below the output. tensor: its name, where one tensor is meant. what: in words.
    """

    file: str
    tensor: str | None
    what: str


def check_input(side: Checkpoint, record: SideRecord, advance: Advance) -> Iterator[Difference]:
    """Check that an input given for comparison is the one that the manifest was made from."""
    for name, weights in side.files.items():
        file = weights.file
        sha256 = file.sha256 or (hash_file(file.stored, advance)[1] if file.stored else None)
        known = record.files.get(name)
        if known is None or sha256 != known.sha256:
            yield Difference(
                weights.file.where, None, f"not the file of {printable(record.source)} that the output was made from"
            )


def compare_headers(made: Checkpoint, template: Checkpoint, kept: bool) -> Iterator[Difference]:
    """Check that headers are FT's (BASE's where an adapter was merged): whole if `kept`, else their metadata."""
    for name, weights in made.files.items():
        theirs = template.files.get(name)
        if theirs is None:
            continue  # its tensors are reported one by one
        if kept:
            size = weights.header.data_start
            same = theirs.header.data_start == size and same_bytes(weights.file, 0, theirs.file, 0, size)
        else:
            same = weights.header.metadata == theirs.header.metadata
        if not same:
            yield Difference(name, None, f"its header is not that of {template.source}")


def compare_side_files(
    files: Mapping[str, FileRecord],
    beside: Mapping[str, Path] | None,
    recorded: Mapping[str, FileRecord],
    written: AbstractSet[str],
    advance: Advance,
) -> Iterator[Difference]:
    """Every one of `files` but those `written` by the run has the bytes of the input's file that it was copied from.

    `beside` says where those lie now; without it, as of an input on the Hub, what was `recorded` of them counts.
    """
    for name, record in files.items():
        if name in written:
            continue
        if beside is None:
            theirs = recorded.get(name)
        else:
            theirs = FileRecord(*hash_file(beside[name], advance)) if name in beside else None
        if theirs is None:
            yield Difference(name, None, "no input has such a file")
        elif theirs != record:
            yield Difference(name, None, "its bytes are not those of the file that it is a copy of")
    for name in sorted(set(recorded if beside is None else beside) - files.keys() - written):
        yield Difference(name, None, "missing, though an input has it")


def compare_untouched(
    made: Checkpoint, tuned: Checkpoint, edited: set[str], found: list[Difference], advance: Advance
) -> int:
    """Check that every tensor outside `edited` has FT's place, dtype, shape and bytes; the number of bytes compared."""
    compared = 0
    for name, (file, entry) in tuned.tensors.items():
        if name not in made.tensors or made.tensors[name][0] != file:
            found.append(Difference(file, name, "missing, or in another file than in FT"))
            continue
        mine = made.tensors[name][1]
        if mine.shape != entry.shape or (name not in edited and mine.dtype != entry.dtype):
            stored = f"{mine.dtype} {list(mine.shape)}, in FT {entry.dtype} {list(entry.shape)}"
            found.append(Difference(file, name, stored))
        elif name not in edited:
            compared += entry.nbytes
            if not same_bytes(made.files[file].file, mine.start, tuned.files[file].file, entry.start, entry.nbytes):
                found.append(Difference(file, name, "its bytes are not FT's, and it was not edited"))
            advance(entry.nbytes)
    for name in sorted(made.tensors.keys() - tuned.tensors.keys() - edited):
        found.append(Difference(made.tensors[name][0], name, "FT has no such tensor"))
    return compared


def compare_other_rows(made: Checkpoint, tuned: Checkpoint, plan: Plan, found: list[Difference]) -> int:
    """Check that the rows of resized embeddings that BASE lacks are FT's; the number of bytes compared."""
    compared = 0
    for unit in plan.units:
        rest = tuned.tensors[unit.name][1].end - unit.start - unit.nbytes
        if unit.expert is not None or rest == 0:
            continue
        ends = unit.out_start + unit.out_nbytes, unit.start + unit.nbytes
        compared += rest
        if not same_bytes(made.files[unit.file].file, ends[0], tuned.files[unit.file].file, ends[1], rest):
            found.append(Difference(unit.file, unit.name, "its rows beyond BASE's are not FT's"))
    return compared


def same_bytes(a: File, a_start: int, b: File, b_start: int, nbytes: int) -> bool:
    for at in range(0, nbytes, CHUNK):
        count = min(CHUNK, nbytes - at)
        if read_range(a, a_start + at, count, "tensor") != read_range(b, b_start + at, count, "tensor"):
            return False
    return True
