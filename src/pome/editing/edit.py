"""The main job: open, plan, stage, edit unit by unit, publish. The only loop over units."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pome
from pome.checkpoint.sidefiles import MANIFEST_NAME, SideFile
from pome.checkpoint.source import ADAPTER_CONFIG, Checkpoint
from pome.config.spec import EditSpec
from pome.editing.session import (
    Opened,
    Progress,
    Source,
    copy_files,
    count_space,
    count_up,
    describe_command,
    open_pair,
)
from pome.engines.local import map_units
from pome.errors import CheckpointError, NumericalError
from pome.manifest import FORMAT_VERSION, FileRecord, KeptRecord, Manifest, SideRecord, TensorRecord, read_manifest
from pome.output.card import CARD_NAME, make_card
from pome.output.clone import hash_file
from pome.output.staging import Staging
from pome.output.target import check_target, finish_published
from pome.output.watermark import Watermark
from pome.planning.units import Unit

if TYPE_CHECKING:
    from pome.editing.unit import FindCache

# Finished units are synced and journalled in groups: what a crash loses is at most this much work.
COMMIT_SECONDS = 5.0
COMMIT_UNITS = 512


def edit(
    base: Source,
    ft: Source,
    out: Source,
    spec: EditSpec | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    card: bool = False,
    caches: FindCache | None = None,
    sweep: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write to the folder `out` the checkpoint `ft` with the selected matrices edited; returns its manifest.

    `out` appears whole or not at all. What an interrupted call finished lies in `OUT.pome-staging`, and the same call
    goes on from there; `fresh` drops it. `card` puts a model card in the place of `ft`'s README.md. `caches` gives
    decompositions that are known already, `sweep` is what the manifest says of how the options were chosen. Raises
    PomeError for bad input or a machine that fails; KeyboardInterrupt, after progress is safe, when interrupted.
    """
    spec = spec or EditSpec()
    begun = time.perf_counter()
    with open_pair(base, ft, spec, whole=True) as opened:
        target = check_target(Path(os.fspath(out)), opened.list_inputs(), overwrite)
        run = _Run(opened, spec, progress or Progress(), begun, card, caches, sweep)
        return run.make(target, overwrite, fresh)


class _Run:
    """The state of one run between its stages."""

    def __init__(
        self,
        opened: Opened,
        spec: EditSpec,
        progress: Progress,
        begun: float,
        card: bool,
        caches: FindCache | None,
        sweep: Mapping[str, Any] | None,
    ) -> None:
        self.opened = opened
        self.spec = spec
        self.progress = progress
        self.begun = begun
        self.card = card
        self.caches = caches
        self.sweep = sweep
        self.kernel_seconds = 0.0
        self.output_hashes: dict[str, Future[tuple[int, str]]] = {}
        self.cancelled = threading.Event()

    def make(self, target: Path, overwrite: bool, fresh: bool) -> Manifest:
        from pome.editing.unit import list_devices

        devices = list_devices(self.spec.device)
        command = {**describe_command(self.opened, self.spec), "card": self.card}
        if not overwrite and finish_published(target, command):
            return read_manifest(target / MANIFEST_NAME)
        with Staging(target, command, fresh) as staging:
            try:
                staging.check_space(*count_space(self.opened, staging))
            except BaseException:
                staging.discard_if_empty()
                raise
            self.progress.begin(self.opened.plan, self.opened.ft, devices, len(staging.finished))
            try:
                # Inputs are hashed beside the kernel: it leaves a core or a disk idle often enough to hide it. The
                # output is hashed behind it, up to the first range that is still to be written.
                with self._hashing_inputs() as hashes:
                    if self.spec.out_format == "adapter":
                        self._edit_adapter(staging, devices[0])
                    else:
                        copy_files(self.opened, staging, self.progress)
                        with self._hashing_output(staging) as watermark:
                            self._edit(staging, devices, watermark)
                    base, fine_tuned = self._join_hashes(hashes)
                self.opened.check_unchanged()
                manifest = self._describe(staging, base, fine_tuned)
                if self.card:
                    # Before the hashes, which are of what is there.
                    staging.put_file(CARD_NAME, make_card(manifest, self._read_ft_card()).encode())
                manifest = self._add_hashes(staging, manifest)
                staging.publish(manifest.to_json().encode(), overwrite)
            except NumericalError:
                # The same command would fail again, and what the message advises is another command.
                staging.discard()
                raise
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted; {len(staging.finished)} of {len(self.opened.plan.units)} units are safe in "
                    f"{staging.folder}; run the same command again to go on, or remove that folder"
                ) from None
        return manifest

    def _edit_adapter(self, staging: Staging, device: str) -> None:
        """Write the edited adapter anew. It takes seconds, so an interrupted run begins again."""
        from pome.editing.lora_rewrite import edit_loras, write_adapter

        opened = self.opened
        self.progress.start("copy", sum(file.size for file in opened.side_files))
        for file in opened.side_files:
            if file.name != ADAPTER_CONFIG:
                staging.copy_file(file.name, file.path, count_up(self.progress, "copy"))
        self.progress.finish("copy")
        self.progress.start("edit", len(opened.plan.units))
        begun = time.perf_counter()

        def edit_each() -> Iterator[Any]:
            for lora in edit_loras(opened.plan, opened.ft, self.spec, device):
                yield lora
                self.progress.advance("edit", len(lora.units), sum(unit.nbytes for unit in lora.units), lora.low.key)

        for lora in write_adapter(edit_each(), opened.ft, staging.output, staging.folder / "factors"):
            entry = {
                "tensors": [record.to_mapping() for record in lora.tensors],
                "kept": [dataclasses.asdict(record) for record in lora.kept],
            }
            staging.finished |= dict.fromkeys((unit.key for unit in lora.units), {"tensors": [], "kept": []})
            staging.finished[lora.units[0].key] = entry
        self.kernel_seconds = time.perf_counter() - begun
        self.progress.finish("edit")

    def _edit(self, staging: Staging, devices: list[str], watermark: Watermark) -> None:
        """Every unit that no earlier run finished, journalled in groups."""
        from pome.editing.lora_merge import Data, make_patch, read_unit
        from pome.editing.unit import Patch

        opened = self.opened
        units = opened.plan.units
        todo = [unit for unit in units if unit.key not in staging.finished]
        self.progress.start("edit", len(units))
        self.progress.advance("edit", len(units) - len(todo))
        pending: list[dict[str, Any]] = []
        last = time.monotonic()

        def read(unit: Unit) -> Data:
            return read_unit(unit, opened.ft, opened.base)

        def work(unit: Unit, data: Data, device: str) -> Patch:
            patch = make_patch(unit, data, self.spec, device, self.caches)
            if patch.data is not None:
                staging.write(unit.file, patch.data, unit.out_start)
            watermark.mark_written(unit.file, unit.out_start)
            return dataclasses.replace(patch, data=None)

        def commit() -> None:
            if pending:
                staging.commit(pending)
                staging.finished.update((entry["unit"], entry) for entry in pending)
                pending.clear()

        patches = map_units(todo, devices, read, work)
        try:
            for patch in patches:
                self.kernel_seconds += patch.kernel_seconds
                pending.append(
                    {
                        "unit": patch.unit.key,
                        "file": patch.unit.file,
                        "tensors": [record.to_mapping() for record in patch.tensors],
                        "kept": [dataclasses.asdict(record) for record in patch.kept],
                    }
                )
                self.progress.advance("edit", 1, patch.unit.nbytes + patch.unit.base_nbytes, patch.unit.name)
                if len(pending) >= COMMIT_UNITS or time.monotonic() - last > COMMIT_SECONDS:
                    commit()
                    last = time.monotonic()
        finally:
            # On an error or Ctrl-C too: what is done stays done.
            patches.close()  # type: ignore[attr-defined]
            commit()
        self.progress.finish("edit")

    @contextlib.contextmanager
    def _hashing_output(self, staging: Staging) -> Iterator[Watermark]:
        """Hash the weight files of the output while they are edited; what is not done by then goes on after it."""
        todo = [unit for unit in self.opened.plan.units if unit.key not in staging.finished]
        watermark = Watermark((unit.file, unit.out_start) for unit in todo)
        pool = ThreadPoolExecutor(1, thread_name_prefix="pome-hash")
        self.output_hashes = {
            name: pool.submit(self._hash, staging.output / name, wait=functools.partial(watermark.wait, name))
            for name in dict.fromkeys(unit.file for unit in self.opened.plan.units)
        }
        try:
            yield watermark
        except BaseException:
            watermark.abandon()
            raise
        finally:
            pool.shutdown(wait=False)

    @contextlib.contextmanager
    def _hashing_inputs(self) -> Iterator[list[dict[str, Future[tuple[int, str]]]]]:
        """Futures of (bytes, SHA-256) for BASE's and FT's files, worked on by one thread beside the edit."""
        opened = self.opened
        with ThreadPoolExecutor(1, thread_name_prefix="pome-hash") as pool:

            def submit(side: Checkpoint, extra: list[SideFile]) -> dict[str, Future[tuple[int, str]]]:
                paths = {name: weights.file.stored for name, weights in side.files.items() if weights.file.stored}
                paths |= {path.name: path for path in side.companions}
                paths |= {file.name: file.path for file in extra}
                return {name: pool.submit(self._hash, path) for name, path in paths.items()}

            theirs = [
                # What goes along is hashed with the side that it comes from.
                [file for file in opened.side_files if side.folder and file.path.is_relative_to(side.folder)]
                for side in (opened.base, opened.ft)
            ]
            with self._cancelling():
                yield [submit(opened.base, theirs[0]), submit(opened.ft, theirs[1])]

    def _join_hashes(self, hashes: list[dict[str, Future[tuple[int, str]]]]) -> tuple[SideRecord, SideRecord]:
        records = []
        for side, futures in zip((self.opened.base, self.opened.ft), hashes, strict=True):
            weights = side.files.items()
            files = {name: FileRecord(w.file.size, w.file.sha256) for name, w in weights if w.file.sha256 is not None}
            files |= {name: FileRecord(*future.result()) for name, future in futures.items()}
            records.append(SideRecord(side.source, side.revision, files))
        return records[0], records[1]

    def _describe(self, staging: Staging, base: SideRecord, fine_tuned: SideRecord) -> Manifest:
        """The manifest but for the hashes of the output, matrices in the order of the plan."""
        plan = self.opened.plan
        entries = [staging.finished[unit.key] for unit in plan.units]
        tensors = [item for entry in entries for item in entry["tensors"]]
        kept = list(plan.kept)
        kept += [KeptRecord(**item) for entry in entries for item in entry["kept"]]
        return Manifest(
            format_version=FORMAT_VERSION,
            pome_version=pome.__version__,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            base=base,
            fine_tuned=fine_tuned,
            spec=self.spec.to_mapping(),
            tensors=tuple(map(TensorRecord.from_mapping, tensors)),
            kept=tuple(kept),
            merged=plan.merged,
            not_copied=self.opened.not_copied,
            files={},
            sweep=dict(self.sweep) if self.sweep is not None else None,
        )

    def _read_ft_card(self) -> str | None:
        folder = self.opened.ft.folder
        if folder is None or not (folder / CARD_NAME).is_file():
            return None
        return (folder / CARD_NAME).read_text("utf-8", "replace")

    def _add_hashes(self, staging: Staging, manifest: Manifest) -> Manifest:
        """The manifest with what was written, and how long all of it took."""
        names = sorted(str(p.relative_to(staging.output)) for p in staging.output.rglob("*") if p.is_file())
        names = [name for name in names if name != MANIFEST_NAME]
        self.progress.start("hash", sum((staging.output / name).stat().st_size for name in names))
        advance = count_up(self.progress, "hash")

        def find_hash(name: str) -> tuple[int, str]:
            if name not in self.output_hashes:
                return self._hash(staging.output / name, advance)
            size, digest = self.output_hashes[name].result()
            advance(size)
            return size, digest

        with ThreadPoolExecutor(2, thread_name_prefix="pome-hash") as pool, self._cancelling():
            files = {name: FileRecord(*made) for name, made in zip(names, pool.map(find_hash, names), strict=True)}
        self.progress.finish("hash")
        timing: dict[str, float | str] = {
            "total_seconds": round(time.perf_counter() - self.begun, 3),
            "kernel_seconds": round(self.kernel_seconds, 3),
        }
        return dataclasses.replace(manifest, files=files, timing=timing).sealed()

    @contextlib.contextmanager
    def _cancelling(self) -> Iterator[None]:
        """An error or Ctrl-C inside ends all hashing, so that no pool keeps the process waiting for it."""
        try:
            yield
        except BaseException:
            self.cancelled.set()
            raise

    def _hash(
        self, path: Path, advance: Callable[[int], None] = lambda _: None, wait: Callable[[int], None] | None = None
    ) -> tuple[int, str]:
        def go_on(count: int) -> None:
            if self.cancelled.is_set():
                raise CheckpointError("hashing was cancelled")
            advance(count)

        try:
            return hash_file(path, go_on, wait)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}; run the same command again") from None
