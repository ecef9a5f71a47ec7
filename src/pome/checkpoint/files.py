"""Files and folders of a checkpoint on disk, and the protocols `File` and `Listing` that a source implements."""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pome.checkpoint.header import MAX_HEADER_BYTES, Header, read_header_with
from pome.errors import CheckpointError, printable

CHANGED = "changed while being read; wait until nothing writes there, then run the same command again with --fresh"


class File(Protocol):
    """One weight file, open for reading at any offset."""

    @property
    def where(self) -> str:
        """Its path or address, for messages."""

    @property
    def path(self) -> Path | None:
        """The file on this machine that has exactly these bytes, if there is one."""

    @property
    def stored(self) -> Path | None:
        """The file on this machine that these bytes come from, if there is one."""

    @property
    def size(self) -> int: ...

    @property
    def sha256(self) -> str | None:
        """Its hash, where that is known without reading it."""

    @property
    def identity(self) -> list[Any]:
        """Identity of the file, in JSON's types: another file has another one, and so has this one after a change."""

    def read_into(self, view: memoryview, at: int) -> int:
        """Fill `view` from offset `at`, perhaps not all of it; the number of bytes read, 0 at the end. OSError."""

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file is no longer what was opened."""

    def close(self) -> None: ...


class Listing(Protocol):
    """The files of one checkpoint, by name."""

    @property
    def label(self) -> str:
        """Its name in messages."""

    @property
    def folder(self) -> Path | None: ...

    @property
    def revision(self) -> str | None:
        """The Hub commit, for a checkpoint from there."""

    @property
    def names(self) -> list[str]:
        """The names at the top, sorted."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Files of the checkpoint that were not fetched, and why."""

    def read(self, name: str) -> bytes:
        """A small file, whole."""

    def open(self, name: str) -> File: ...

    def holds(self, name: str) -> bool:
        """Whether it has a file of this name, which may lie in a folder below. CheckpointError if that leads out."""

    def find_weights_below(self) -> list[str]:
        """Folders below the top that hold `.safetensors` files."""

    def find_newer(self, names: Sequence[str], than: Sequence[str]) -> list[str]:
        """The files among `names` that were written later than all of `than`, where that can be known."""


class LocalFile:
    """A file on disk, read with `pread`: any number of threads, no mmap, no page of it kept."""

    sha256 = None

    def __init__(self, path: Path) -> None:
        self.path = self.stored = path
        self.where = str(path)
        # O_NONBLOCK: opening a FIFO in place of a file must fail, not wait for a writer.
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        info = os.fstat(self.fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(self.fd)
            raise CheckpointError(f"{printable(str(path), 500)}: not a regular file")
        self.size = info.st_size
        self._identity = _identify(info)

    @property
    def identity(self) -> list[Any]:
        # Not the device and inode: both may change when a cluster mounts its disks again.
        return [str(self.path.resolve()), *self._identity[2:]]

    def read_into(self, view: memoryview, at: int) -> int:
        return os.preadv(self.fd, [view], at)

    def check_unchanged(self) -> None:
        try:
            now = _identify(os.fstat(self.fd)), _identify(os.stat(self.path))
        except OSError as error:
            raise CheckpointError(f"{self.where}: went away while being read: {error.strerror}") from None
        if now != (self._identity, self._identity):
            raise CheckpointError(f"{self.where}: {CHANGED}")

    def close(self) -> None:
        os.close(self.fd)


def _identify(info: os.stat_result) -> tuple[int, int, int, int]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


class LocalListing:
    """A folder on disk."""

    def __init__(self, folder: Path, revision: str | None = None) -> None:
        self.folder = folder
        self.label = printable(str(folder), 500)
        self.revision = revision
        self.names = sorted(entry.name for entry in os.scandir(folder))
        self.left_out: Mapping[str, str] = {}

    def read(self, name: str) -> bytes:
        file = self.open(name)
        try:
            return bytes(read_range(file, 0, min(file.size, MAX_HEADER_BYTES + 1), "the file"))
        finally:
            file.close()

    def open(self, name: str) -> LocalFile:
        return LocalFile(self.folder / name)

    def holds(self, name: str) -> bool:
        path = self.folder / name
        above, top = path.parent.resolve(), self.folder.resolve()
        if top not in (above, *above.parents):
            raise CheckpointError(f"{self.label}/{printable(name)}: leads out of the folder; copy the checkpoint again")
        return path.is_file() or path.is_symlink()

    def find_weights_below(self) -> list[str]:
        found = {
            path.parent for pattern in ("*/*.safetensors", "*/*/*.safetensors") for path in self.folder.glob(pattern)
        }
        return sorted(str(path.relative_to(self.folder)) for path in found)

    def find_newer(self, names: Sequence[str], than: Sequence[str]) -> list[str]:
        last = max((os.stat(self.folder / name).st_mtime_ns for name in than), default=0)
        return [name for name in names if os.stat(self.folder / name).st_mtime_ns > last]


def read_range(file: File, start: int, nbytes: int, what: str) -> bytearray:
    """`nbytes` bytes of a file from offset `start`; CheckpointError, naming `what`, if they cannot all be had."""
    buffer = bytearray(nbytes)
    view = memoryview(buffer)
    done = 0
    while done < nbytes:
        try:
            got = file.read_into(view[done : done + (1 << 30)], start + done)
        except OSError as error:
            raise CheckpointError(
                f"{file.where}: {what}: read error at byte {start + done}: {error.strerror or error}; "
                "check the disk or the network, then run the same command again"
            ) from None
        if got == 0:
            raise CheckpointError(
                f"{file.where}: {what}: the file ends {nbytes - done} bytes too early; it changed while being read"
            )
        done += got
    return buffer


def read_header(file: File) -> Header:
    """The table of a weight file; nothing else of it is read. Raises HeaderError."""
    return read_header_with(functools.partial(read_range, file, what="header"), file.size, file.where)


def read_json(listing: Listing, name: str) -> Mapping[str, Any]:
    """A JSON object beside the weights, such as `config.json`. Raises CheckpointError if it is anything else."""
    where = f"{listing.label}/{name}"
    try:
        value = json.loads(listing.read(name))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else printable(str(error))
        raise CheckpointError(f"{where}: not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: not a JSON object")
    return value
