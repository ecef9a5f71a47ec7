"""SHA-256 of an edit's inputs and output, computed on threads beside the edit."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pome.checkpoint.hashing import hash_file
from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.editing.session import Opened
from pome.errors import CheckpointError
from pome.manifest import FileRecord, SideRecord
from pome.output.progress import Progress, advance_bytes
from pome.output.staging import Staging
from pome.output.watermark import Watermark

Hash = tuple[int, str]  # bytes, SHA-256 in hex
_THREADS = "pome-hash"


class Hashes:
    """The hashes of one edit. Inputs are hashed beside the kernel, which leaves a core or a disk idle often enough.
    The output is hashed behind the edit, up to the first range that is still to be written."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self._cancelled = threading.Event()
        self._inputs: list[dict[str, Future[Hash]]] = []  # of BASE and FT
        self._output: dict[str, Future[Hash]] = {}

    @contextlib.contextmanager
    def of_inputs(self) -> Iterator[None]:
        """Hash what was read or copied of BASE and FT on one thread; at the end of the block all are hashed."""
        with ThreadPoolExecutor(1, thread_name_prefix=_THREADS) as pool, self._cancelling():
            self._inputs = [
                {name: pool.submit(self._hash, path) for name, path in paths.items()}
                for paths in self.opened.find_read()
            ]
            yield

    def describe_inputs(self) -> tuple[SideRecord, SideRecord]:
        """The records of BASE and FT; waits for their hashes. Raises CheckpointError."""
        records = []
        for side, futures in zip((self.opened.base, self.opened.ft), self._inputs, strict=True):
            weights = side.files.items()
            files = {name: FileRecord(w.file.size, w.file.sha256) for name, w in weights if w.file.sha256 is not None}
            files |= {name: FileRecord(*future.result()) for name, future in futures.items()}
            records.append(SideRecord(side.source, side.revision, files))
        return records[0], records[1]

    @contextlib.contextmanager
    def of_output(self, staging: Staging, whole_files: bool = False) -> Iterator[Watermark]:
        """Hash the weight files of the output while they are edited; what is not done by then goes on after it.

        With `whole_files` a file is opened only when all of it is final. A network file system shows what other
        machines have written to those who open the file after that.
        """
        units = self.opened.plan.units
        watermark = Watermark(place for unit in units if unit.key not in staging.finished for place in unit.places)
        pool = ThreadPoolExecutor(1, thread_name_prefix=_THREADS)

        def hash_behind(name: str) -> Hash:
            wait = functools.partial(watermark.wait, name)
            if whole_files:
                wait(sys.maxsize)
            return self._hash(staging.output / name, wait=wait)

        self._output = {
            name: pool.submit(hash_behind, name)
            for name in dict.fromkeys(file for unit in units for file, _ in unit.places)
        }
        try:
            yield watermark
        except BaseException:
            watermark.abandon()
            raise
        finally:
            pool.shutdown(wait=False)

    def describe_output(self, staging: Staging, progress: Progress) -> dict[str, FileRecord]:
        """The records of all files of the output but the manifest; hashes the files that are not hashed yet."""
        names = sorted(str(p.relative_to(staging.output)) for p in staging.output.rglob("*") if p.is_file())
        names = [name for name in names if name != MANIFEST_NAME]
        progress.start("hash", sum((staging.output / name).stat().st_size for name in names))
        advance = advance_bytes(progress, "hash")

        def find_hash(name: str) -> Hash:
            if name not in self._output:
                return self._hash(staging.output / name, advance)
            size, digest = self._output[name].result()
            advance(size)
            return size, digest

        with ThreadPoolExecutor(2, thread_name_prefix=_THREADS) as pool, self._cancelling():
            files = {name: FileRecord(*made) for name, made in zip(names, pool.map(find_hash, names), strict=True)}
        progress.finish("hash")
        return files

    @contextlib.contextmanager
    def _cancelling(self) -> Iterator[None]:
        """An error or Ctrl-C inside ends all hashing, so that no pool keeps the process waiting for it."""
        try:
            yield
        except BaseException:
            self._cancelled.set()
            raise

    def _hash(
        self, path: Path, advance: Callable[[int], None] = lambda _: None, wait: Callable[[int], None] | None = None
    ) -> Hash:
        def go_on(count: int) -> None:
            if self._cancelled.is_set():
                raise CheckpointError("hashing was cancelled")
            advance(count)

        try:
            return hash_file(path, go_on, wait)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}; run the same command again") from None
