"""Stage an output beside its final place, patch it, keep a journal, publish it with one rename.

The staging folder `OUT.pome-staging` holds
    lock        held while a run lives (flock, and who holds it for file systems whose locks lie)
    command     what is being made; another command's progress is never reused
    journal     one JSON line for each copied file and each finished unit, written after its bytes are synced
    output/     what becomes OUT
    publishing  the command, and the hash of the manifest by which the OUT that it made is known
    replaced/   the former OUT, for the moment of an overwrite

At every instant OUT is absent, whole as before, or whole and new.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pome.checkpoint.clone import Advance, can_share, copy_file, copy_range, hash_file, write_at
from pome.checkpoint.files import File, read_range
from pome.checkpoint.header import Header
from pome.checkpoint.lock import Lock, take_lock
from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.errors import OutputError, printable

STAGING_SUFFIX = ".pome-staging"
_PIECE = 8 << 20
_SPARE = 16 << 20  # room for journal, manifest and directories when free space is checked


def check_target(out: Path, inputs: list[Path], overwrite: bool) -> Path:
    """The absolute path of OUT, if an output may be made there. Raises OutputError; writes nothing."""
    target = Path(os.path.abspath(out.expanduser()))
    real = Path(os.path.realpath(target))
    for given in inputs:
        source = Path(os.path.realpath(given))
        if real == source or source in real.parents:
            raise OutputError(f"{printable(str(out))}: OUT lies inside {given}; choose a folder outside the inputs")
        if real in source.parents:
            raise OutputError(f"{printable(str(out))}: OUT holds {given}; choose a folder of its own")
    if out.suffix == ".safetensors":
        raise OutputError(f"{printable(str(out))}: OUT is a folder; give it a name without .safetensors")
    if target.is_symlink():
        raise OutputError(f"{printable(str(out))}: is a symbolic link; give the folder that it should be")
    if target.exists():
        if not overwrite and not is_published(target):
            raise _exists(out)
        here = Path(os.path.realpath("."))
        inside = real in (here, *here.parents)
        if not target.is_dir() or os.path.ismount(target) or inside:
            what = "the working folder or above it" if inside else "no folder of its own"
            raise OutputError(f"{printable(str(out))}: is {what} and is not replaced; choose another OUT")
    return target


def is_published(target: Path) -> bool:
    """Whether a run was stopped after OUT was in its place and before its staging folder was gone."""
    mark = _read_object(staging_folder(target) / "publishing")
    try:
        return mark is not None and mark["manifest"] == hash_file(target / MANIFEST_NAME, lambda _: None)[1]
    except OSError:
        return False


def finish_published(target: Path, command: dict[str, Any]) -> bool:
    """Clear up after a run of `command` that was stopped when OUT was in its place; False where there was none.

    Raises OutputError if OUT is so left by another command.
    """
    if not is_published(target):
        return False
    folder = staging_folder(target)
    with explain(folder):
        lock = take_lock(folder)
        try:
            mark = _read_object(folder / "publishing")
            if mark is None or mark["command"] != command:
                raise _exists(target)
            _clear(folder)
        finally:
            lock.release()
    return True


def staging_folder(target: Path) -> Path:
    """Where OUT is made, on the same file system."""
    return target.with_name(target.name + STAGING_SUFFIX)


def _exists(out: Path) -> OutputError:
    return OutputError(f"{printable(str(out))}: exists; choose another OUT or give --overwrite to replace it")


class Staging:
    """An output in the making; use as a context manager, which releases the lock and deletes nothing."""

    def __init__(
        self, target: Path, command: dict[str, Any], fresh: bool, suffix: str = STAGING_SUFFIX
    ) -> None:
        self.target = target
        self.folder = target.with_name(target.name + suffix)
        self.output = self.folder / "output"
        self._command = command
        self._fresh = fresh
        self._files: dict[str, int] = {}
        self._opening = threading.Lock()
        self._lock: Lock | None = None
        self._journal = -1
        self._sync_failed = False
        self.copied: set[str] = set()
        self.finished: dict[str, dict[str, Any]] = {}  # unit key -> what its journal line carries

    def __enter__(self) -> Staging:
        with explain(self.folder):
            made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            for folder in made:
                _sync_folder(folder.parent)
            self._lock = take_lock(self.folder)
            try:
                self._restore_replaced()
                self._open_progress()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (*self._files.values(), self._journal):
            if fd >= 0:
                os.close(fd)
        self._files.clear()
        self._journal = -1
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _restore_replaced(self) -> None:
        """Put the former OUT back, where the second of the two renames of an overwrite did not come to pass."""
        replaced = self.folder / "replaced"
        if replaced.exists() and not self.target.exists():
            os.rename(replaced, self.target)

    def _open_progress(self) -> None:
        stored = _read_object(self.folder / "command")
        if stored is not None and not self._fresh and self.output.is_dir() and stored != self._command:
            differing = [key for key in self._command if stored.get(key) != self._command[key]]
            raise OutputError(
                f"{_show(self.folder)}: holds the unfinished run of another command (it differs in "
                f"{', '.join(differing)}); finish that one, or give --fresh to drop its progress"
            )
        if stored != self._command or self._fresh or not self.output.is_dir():
            for name in ("command", "journal", "output", "replaced", "publishing"):
                _remove(self.folder / name)
            # Before anything new: a power cut must not leave the old journal with the new command.
            _sync_folder(self.folder)
            self.output.mkdir()
            _write_synced(self.folder / "command", json.dumps(self._command).encode())
        self._journal = os.open(self.folder / "journal", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _sync_folder(self.folder)
        self._replay()

    def _replay(self) -> None:
        """Read the journal up to its last whole line; what a crash left behind that is cut off."""
        with open(os.dup(self._journal), "rb") as file:
            good = 0
            for line in file:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if not isinstance(entry, dict) or not ("copied" in entry or "unit" in entry):
                    break
                good += len(line)
                if "copied" in entry:
                    self._note_copied(entry["copied"])
                else:
                    self.finished[entry["unit"]] = entry
        os.ftruncate(self._journal, good)
        os.lseek(self._journal, 0, os.SEEK_END)

    def _note_copied(self, name: str) -> None:
        """A file was copied; if for the second time, what its units had come to is gone with the first copy."""
        if name in self.copied:
            self.finished = {key: entry for key, entry in self.finished.items() if entry["file"] != name}
        self.copied.add(name)

    def check_space(self, needed: int, probe: Path | None) -> None:
        """Refuse early what cannot fit: OutputError, unless FT's bytes can be shared on this file system."""
        with explain(self.folder):
            free = shutil.disk_usage(self.folder).free
        if needed + _SPARE > free and not (probe and can_share(probe, self.folder)):
            raise OutputError(
                f"{_show(self.folder)}: {needed} bytes are needed and {free} are free there; make room or choose "
                "another OUT"
            )

    def copy_file(self, name: str, source: Path, advance: Advance) -> None:
        """Copy one file of FT into the output, unless an earlier run did."""
        with self._copying(name, source) as fds:
            if fds is not None:
                fd, copy = fds
                copy_file(fd, copy, os.fstat(fd).st_size, advance)
                # A script keeps its mode; a weight file that FT has read-only must stay writable for the patches.
                os.fchmod(copy, stat.S_IMODE(os.fstat(fd).st_mode) & 0o777 | 0o600)

    def write_file(self, name: str, source: File, advance: Advance) -> None:
        """Write into the output what a file of FT reads as, where no file on disk has just these bytes."""
        with self._copying(name, source.stored) as fds:
            if fds is not None:
                _pump(source, 0, fds[1], 0, source.size, advance)

    def lay_out(self, name: str, source: File, old: Header, raw: bytes, new: Header, advance: Advance) -> None:
        """Write a file with another layout: the new header, and every tensor whose dtype stays copied to its place."""
        with self._copying(name, source.stored) as fds:
            if fds is not None:
                fd, copy = fds
                write_at(copy, raw, 0)
                os.ftruncate(copy, new.file_size)
                for entry in new.tensors.values():
                    was = old.tensors[entry.name]
                    if was.dtype != entry.dtype:
                        continue
                    if source.path is None:
                        _pump(source, was.start, copy, entry.start, entry.nbytes, advance)
                    else:
                        copy_range(fd, was.start, copy, entry.start, entry.nbytes, advance)

    @contextlib.contextmanager
    def _copying(self, name: str, source: Path | None) -> Iterator[tuple[int, int] | None]:
        """(source, empty copy) open for the caller to fill, then synced and journalled; None if done already."""
        assert source is not None  # FT was opened whole
        target = self.output / name
        if name in self.copied and target.is_file():
            yield None
            return
        fd = _open_regular(source)
        try:
            with explain(target, f", copied from {_show(source)}"):
                target.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
                copy = os.open(target, flags, 0o666)
                try:
                    yield fd, copy
                    os.fsync(copy)
                finally:
                    os.close(copy)
                _sync_folder(target.parent)
                _append(self._journal, json.dumps({"copied": name}).encode() + b"\n")
                self._note_copied(name)
        finally:
            os.close(fd)

    def put_file(self, name: str, content: bytes) -> None:
        """Write a small file of our own making into the output."""
        with explain(self.output / name):
            _write_synced(self.output / name, content)

    def write(self, name: str, data: bytearray, offset: int) -> None:
        """Write bytes of one unit to their range of a weight file; they are safe only after `commit`."""
        with explain(self.output / name):
            write_at(self._open(name), data, offset)

    def commit(self, entries: list[dict[str, Any]]) -> None:
        """Sync all written bytes, then the journal lines that say they are there; each has `unit` and its `file`.

        After a sync that failed nothing is journalled any more: the system may have dropped the bytes, and the next
        sync would not tell.
        """
        if self._sync_failed:
            return
        self._sync_failed = True
        for name, fd in self._files.items():
            with explain(self.output / name):
                os.fdatasync(fd) if hasattr(os, "fdatasync") else os.fsync(fd)
        lines = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        with explain(self.folder / "journal"):
            _append(self._journal, lines)
        self._sync_failed = False

    def publish(self, manifest: bytes, overwrite: bool) -> None:
        """Sync everything, write the manifest last, and rename the whole to OUT."""
        if self.target.exists() and not overwrite:
            raise OutputError(
                f"{_show(self.target)}: appeared meanwhile; move it away or give --overwrite, then run again"
            )
        with explain(self.output):
            for fd in self._files.values():
                os.fsync(fd)
            _write_synced(self.output / MANIFEST_NAME, manifest)
            for root, _, _ in os.walk(self.output):
                _sync_folder(Path(root))
            mark = {"manifest": hashlib.sha256(manifest).hexdigest(), "command": self._command}
            _write_synced(self.folder / "publishing", json.dumps(mark).encode())
            _sync_folder(self.folder)
        with explain(self.target):
            if self.target.exists():
                os.rename(self.target, self.folder / "replaced")
            try:
                os.rename(self.output, self.target)
            except BaseException:
                self._restore_replaced()
                raise
            _sync_folder(self.target.parent)
        # OUT is whole from here on. What cannot be removed now is only litter, which the next run clears.
        _clear(self.folder)

    def clear_output(self) -> None:
        """Take the output's files away, and what the journal says of them; the folder and its command stay."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        with explain(self.folder):
            os.ftruncate(self._journal, 0)
            os.lseek(self._journal, 0, os.SEEK_SET)
            _remove(self.output)
            self.output.mkdir()
        self.copied.clear()
        self.finished.clear()

    def discard_if_empty(self) -> None:
        """Take away a staging folder that holds no progress, so that a refusal leaves nothing behind."""
        if not self.copied and not self.finished and not any(self.output.iterdir()):
            self.discard()

    def discard(self) -> None:
        """Take away the staging folder with all progress, where no run can go on from it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, name: str) -> int:
        with self._opening:  # workers of several devices write to one file
            if name not in self._files:
                self._files[name] = os.open(self.output / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            return self._files[name]


@contextlib.contextmanager
def explain(path: Path, origin: str = "") -> Iterator[None]:
    """Turn an OSError while writing into an OutputError that names the file, perhaps its origin, and the next step."""
    try:
        yield
    except OSError as error:
        steps = {
            errno.ENOSPC: "make room there, then run the same command again to go on",
            errno.EDQUOT: "raise the quota, then run the same command again to go on",
            errno.EFBIG: "raise the limit on file sizes (ulimit -f), then run the same command again to go on",
            errno.EROFS: "the file system is read-only; choose another OUT",
            errno.EACCES: "choose an OUT that you may write to",
            errno.EPERM: "choose an OUT that you may write to",
        }
        step = steps.get(error.errno or 0, "mend it, then run the same command again to go on")
        raise OutputError(f"{_show(path)}{origin}: {error.strerror or error}; {step}") from error


def _show(path: Path) -> str:
    return printable(str(path), 1000)


def _pump(source: File, start: int, target: int, at: int, count: int, advance: Advance) -> None:
    """Copy bytes that only reading `source` makes."""
    for done in range(0, count, _PIECE):
        piece = read_range(source, start + done, min(_PIECE, count - done), "the file")
        write_at(target, piece, at + done)
        advance(len(piece))


def _open_regular(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise OutputError(f"{_show(path)}: cannot be read: {error.strerror}; nothing is lost, try again") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OutputError(f"{_show(path)}: is no longer a regular file")
    return fd


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove the staging folder of a published output; what tells that it is published goes last."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if path.name != "publishing":
                _remove(path)
        shutil.rmtree(folder)


def _append(fd: int, data: bytes) -> None:
    view: Any = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.fsync(fd)


def _write_synced(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        write_at(fd, content, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def update_index(raw: bytes, size: int, gone: frozenset[str]) -> bytes:
    """The index for `size` bytes of data and without the tensors `gone`, all else as it was."""
    index = json.loads(raw)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in gone}
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = size
    return (json.dumps(index, indent=2) + "\n").encode()
