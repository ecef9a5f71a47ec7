"""Staging folder of an output: copied and patched beside its final place, journalled, published with one rename.

The staging folder `OUT.pome-staging` holds
    lock        held while a run lives (flock, and who holds it for file systems whose locks lie)
    command     what is being made; another command's progress is never reused
    journal     one JSON line for each copied file and each finished unit, written after its bytes are synced, and one
                for the number of cores that units are split over
    output/     what becomes OUT
    factors     what an adapter's tensors are assembled from
    publishing  the command, and the hash of the manifest by which the OUT that it made is known
    replaced/   the former OUT, for the moment of an overwrite

At every instant OUT is absent, whole as before, or whole and new.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from pome.checkpoint.files import File
from pome.checkpoint.header import Header
from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.errors import OutputError, show_bytes
from pome.output.clone import Advance, can_share, copy_file, copy_range, write_at
from pome.output.durable import (
    append_synced,
    as_output_error,
    clear_staging,
    open_regular,
    pump,
    read_object,
    remove,
    set_mode,
    show_path,
    sync_file,
    sync_folder,
    write_synced,
)
from pome.output.lock import LOCK_NAME, Lock, take_lock
from pome.output.target import STAGING_SUFFIX
from pome.output.weight_files import WeightFiles

SCRATCH = "factors"  # beside the output: factors of adapters, until their ranks are all known
_SPARE = 16 << 20  # room for journal, manifest and directories when free space is checked


class Staging:
    """An output in the making; use as a context manager, which releases the lock and deletes nothing."""

    def __init__(self, target: Path, command: dict[str, Any], fresh: bool, suffix: str = STAGING_SUFFIX) -> None:
        self.target = target
        self.folder = target.with_name(target.name + suffix)
        self.output = self.folder / "output"
        self._command = command
        self._fresh = fresh
        self._files, self._scratch = WeightFiles(self.output), WeightFiles(self.folder)
        self._lock: Lock | None = None
        self._journal = -1
        self._sync_failed = False
        self.notices: list[str] = []  # what the file system cannot do
        self.cores: int | None = None  # of the split that finished units were made with
        self.copied: dict[str, int] = {}  # name -> bytes
        self.finished: dict[str, dict[str, Any]] = {}  # unit key -> what its journal line carries

    def __enter__(self) -> Staging:
        with as_output_error(self.folder):
            made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            for folder in made:
                sync_folder(folder.parent)
            self._lock = take_lock(self.folder)
            try:
                self._restore_replaced()
                self._open_progress()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        self._scratch.close()
        if self._journal >= 0:
            os.close(self._journal)
        self._journal = -1
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _restore_replaced(self) -> None:
        """Put the former OUT back, where the second of the two renames of an overwrite did not come to pass."""
        replaced = self.folder / "replaced"
        # After the second rename there is no output here, and `replaced` may be half removed.
        if replaced.exists() and self.output.exists() and not self.target.exists():
            os.rename(replaced, self.target)

    def _open_progress(self) -> None:
        stored = read_object(self.folder / "command")
        if stored is not None and not self._fresh and self.output.is_dir() and stored != self._command:
            differing = [key for key in self._command if stored.get(key) != self._command[key]]
            raise OutputError(
                f"{show_path(self.folder)}: holds the unfinished run of another command (it differs in "
                f"{', '.join(differing)}); finish that one, or give --fresh to drop its progress"
            )
        if stored != self._command or self._fresh or not self.output.is_dir():
            # All of it speaks of other inputs, a sweep's decompositions and scores too. First what vouches for it.
            remove(self.folder / "command")
            for path in list(self.folder.iterdir()):
                if path.name != LOCK_NAME:
                    remove(path)
            # Before anything new: a power cut must not leave the old journal with the new command.
            sync_folder(self.folder)
            self.output.mkdir()
            write_synced(self.folder / "command", json.dumps(self._command).encode())
        self._journal = os.open(self.folder / "journal", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._note_refusals(sync_folder(self.folder))
        self._replay()

    def _note_refusals(self, syncs_folders: bool) -> None:
        """Note which requests the file system refuses: found at the start, so that the manifests of all runs agree."""
        where = f"{show_path(self.target.parent)}: the file system"
        if not syncs_folders:
            self.notices.append(f"{where} does not sync folders; after a power cut OUT may be missing or incomplete")
        if not sync_file(self._journal):
            self.notices.append(f"{where} does not sync files; after a power cut OUT may be incomplete")
        if not set_mode(self._journal, stat.S_IMODE(os.fstat(self._journal).st_mode)):
            self.notices.append(f"{where} keeps no permissions; those of FT's files are not set in OUT")

    def _replay(self) -> None:
        """Read the journal up to its last whole line, and truncate what a crash left behind it."""
        with open(os.dup(self._journal), "rb") as file:
            good = 0
            for line in file:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if not _is_entry(entry):
                    break
                good += len(line)
                if "copied" in entry:
                    self._note_copied(entry["copied"], entry["bytes"])
                elif "cores" in entry:
                    self.cores = entry["cores"]
                else:
                    self.finished[entry["unit"]] = entry
        os.ftruncate(self._journal, good)
        os.lseek(self._journal, 0, os.SEEK_END)

    def _note_copied(self, name: str, size: int) -> None:
        """Record that a file was copied. A second copy discards the units that were written into the first."""
        if name in self.copied:
            self.finished = {
                key: entry for key, entry in self.finished.items() if name not in (entry["file"], *entry["copies"])
            }
        self.copied[name] = size

    def check_space(self, needed: int, probe: Path | None) -> None:
        """Refuse early what cannot fit: OutputError, unless FT's bytes can be shared on this file system."""
        with as_output_error(self.folder):
            free = shutil.disk_usage(self.folder).free
        if needed + _SPARE > free and not (probe and can_share(probe, self.folder)):
            raise OutputError(
                f"{show_path(self.folder)}: {show_bytes(needed)} are needed and {show_bytes(free)} are free there; "
                "make room or choose another OUT"
            )

    def copy_file(self, name: str, source: Path, advance: Advance) -> None:
        """Copy one file of FT into the output, unless an earlier run did."""
        with self._copying(name, source) as fds:
            if fds is not None:
                fd, copy = fds
                copy_file(fd, copy, os.fstat(fd).st_size, advance)
                # A script keeps its mode; a weight file that FT has read-only must stay writable for the patches.
                set_mode(copy, stat.S_IMODE(os.fstat(fd).st_mode) & 0o777 | 0o600)

    def write_file(self, name: str, source: File, advance: Advance) -> None:
        """Write into the output the bytes that a file of FT reads as, where no file on disk has exactly these."""
        with self._copying(name, source.stored) as fds:
            if fds is not None:
                pump(source, 0, fds[1], 0, source.size, advance)

    def lay_out(self, name: str, source: File, old: Header, raw: bytes, new: Header, advance: Advance) -> None:
        """Write a file with another layout: the new header, and every tensor whose dtype stays copied to its place."""
        with self._copying(name, source.stored) as fds:
            if fds is not None:
                fd, copy = fds
                write_at(copy, raw, 0)
                os.ftruncate(copy, new.file_size)
                for entry in new.tensors.values():
                    was = old.tensors.get(entry.name)  # None: a tensor that the source lacks, written by its unit
                    if was is None or was.dtype != entry.dtype:
                        continue
                    if source.path is None:
                        pump(source, was.start, copy, entry.start, entry.nbytes, advance)
                    else:
                        copy_range(fd, was.start, copy, entry.start, entry.nbytes, advance)

    @contextlib.contextmanager
    def _copying(self, name: str, source: Path | None) -> Iterator[tuple[int, int] | None]:
        """(source, empty copy) open for the caller to fill, then synced and journalled; None if done already."""
        assert source is not None  # FT was opened whole
        target = self.output / name
        if name in self.copied and target.is_file() and target.stat().st_size == self.copied[name]:
            yield None
            return
        fd = open_regular(source)
        try:
            with as_output_error(target, f", copied from {show_path(source)}"):
                target.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
                copy = os.open(target, flags, 0o666)
                try:
                    yield fd, copy
                    sync_file(copy)
                    size = os.fstat(copy).st_size
                finally:
                    os.close(copy)
                sync_folder(target.parent)
                append_synced(self._journal, json.dumps({"copied": name, "bytes": size}).encode() + b"\n")
                self._note_copied(name, size)
        finally:
            os.close(fd)

    def keep_cores(self, cores: int) -> int:
        """The number of cores that this output's units are split over: the first run's, journalled; else `cores`.

        The number of threads decides the last bits of a matrix, and all matrices shall come out as in one run.
        """
        if self.cores is None:
            with as_output_error(self.folder / "journal"):
                append_synced(self._journal, json.dumps({"cores": cores}).encode() + b"\n")
            self.cores = cores
        return self.cores

    def put_file(self, name: str, content: bytes) -> None:
        """Write a small file of our own making into the output."""
        with as_output_error(self.output / name):
            write_synced(self.output / name, content)

    def write(self, name: str, data: bytearray, offset: int) -> None:
        """Write bytes of one unit to their range of a weight file; they are safe only after `commit`."""
        (self._scratch if name == SCRATCH else self._files).write(name, data, offset)

    def open_scratch(self) -> None:
        """Make the scratch file, which `write` takes too. Without it what the journal says of its bytes is void."""
        path = self.folder / SCRATCH
        if not path.is_file():
            self.finished.clear()
            with as_output_error(path):
                path.touch()

    def commit(self, entries: list[dict[str, Any]]) -> None:
        """Sync all written bytes, then the journal lines that say they are there; each has `unit` and its `file`.

        After a sync that failed nothing is journalled any more: the system may have dropped the bytes, and the next
        sync would not tell.
        """
        if self._sync_failed:
            return
        self._sync_failed = True
        self._scratch.sync()
        self._files.sync()
        lines = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        with as_output_error(self.folder / "journal"):
            append_synced(self._journal, lines)
        self._sync_failed = False

    def publish(self, manifest: bytes, overwrite: bool) -> None:
        """Sync everything, write the manifest last, and rename the whole to OUT."""
        if self.target.exists() and not overwrite:
            raise OutputError(
                f"{show_path(self.target)}: appeared meanwhile; move it away or give --overwrite, then run again"
            )
        with as_output_error(self.output):
            self._files.sync(data_only=False)
            write_synced(self.output / MANIFEST_NAME, manifest)
            for root, _, _ in os.walk(self.output):
                sync_folder(Path(root))
            mark = {"manifest": hashlib.sha256(manifest).hexdigest(), "command": self._command}
            write_synced(self.folder / "publishing", json.dumps(mark).encode())
            sync_folder(self.folder)
        with as_output_error(self.target):
            if self.target.exists():
                os.rename(self.target, self.folder / "replaced")
            try:
                os.rename(self.output, self.target)
            except BaseException:
                self._restore_replaced()
                raise
            sync_folder(self.target.parent)
        # OUT is whole from here on. What cannot be removed now is only litter, which the next run clears.
        clear_staging(self.folder)

    def clear_output(self) -> None:
        """Remove the output's files and their journal lines; the folder and its command stay."""
        self._files.close()
        self._scratch.close()
        with as_output_error(self.folder):
            os.ftruncate(self._journal, 0)
            os.lseek(self._journal, 0, os.SEEK_SET)
            remove(self.output)
            self.output.mkdir()
        self.cores = None
        self.copied.clear()
        self.finished.clear()

    def discard_if_empty(self) -> None:
        """Remove a staging folder that holds no progress, so that a refusal leaves nothing behind."""
        if not self.copied and not self.finished and not any(self.output.iterdir()):
            self.discard()

    def discard(self) -> None:
        """Remove the staging folder with all progress, where no run can go on from it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_entry(entry: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a journal line is one that this class or the run writes."""
    if not isinstance(entry, dict):
        return False
    if "copied" in entry:
        return isinstance(entry["copied"], str) and isinstance(entry.get("bytes"), int)
    if "cores" in entry:
        return type(entry["cores"]) is int and entry["cores"] > 0
    texts = entry.get("unit"), entry.get("file")
    lists = entry.get("tensors"), entry.get("kept"), entry.get("copies")
    return all(isinstance(t, str) for t in texts) and all(isinstance(items, list) for items in lists)


def update_index(raw: bytes, size: int, gone: frozenset[str], added: Mapping[str, str]) -> bytes:
    """The index for `size` bytes of data, without the tensors `gone` and with those `added` (name -> file)."""
    index = json.loads(raw)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in gone} | dict(added)
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = size
    return (json.dumps(index, indent=2) + "\n").encode()
