"""The main job: open, plan, stage, edit unit by unit, publish. The only loop over units."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pome
from pome.card import CARD_NAME, make_card
from pome.checkpoint.clone import hash_file
from pome.checkpoint.output import Staging, check_target, finish_published, update_index
from pome.checkpoint.sidefiles import MANIFEST_NAME, SideFile, list_adapted_side_files, list_side_files
from pome.checkpoint.source import ADAPTER_CONFIG, Checkpoint, open_checkpoint
from pome.engines.local import map_units
from pome.errors import CheckpointError, NumericalError, PairingError, printable
from pome.manifest import FORMAT_VERSION, FileRecord, KeptRecord, Manifest, SideRecord, TensorRecord, read_manifest
from pome.plan import Plan, Unit, check_overrides, make_plan
from pome.spec import EditSpec

Source = str | os.PathLike[str]

# Finished units are synced and journalled in groups: what a crash loses is at most this much work.
COMMIT_SECONDS = 5.0
COMMIT_UNITS = 512


class Progress:
    """What a run tells while it works. Tasks are `copy`, `edit` and `hash`; subclass and override what you show."""

    def begin(self, plan: Plan, ft: Checkpoint, devices: list[str], resumed: int) -> None:
        """The plan stands, nothing is written yet; `resumed` units were finished by an earlier run."""

    def start(self, task: str, total: int) -> None:
        """A task of `total` bytes (`copy`, `hash`) or units (`edit`) begins."""

    def advance(self, task: str, amount: int, nbytes: int = 0, note: str = "") -> None:
        """`amount` more of the task is done, which moved `nbytes` bytes; `note` says what was worked on."""

    def finish(self, task: str) -> None:
        """The task is done."""


@dataclass(frozen=True)
class Opened:
    """Both sides open, the plan made, and the files that go along."""

    base: Checkpoint
    ft: Checkpoint
    plan: Plan
    side_files: list[SideFile]
    not_copied: dict[str, str]
    template: Checkpoint  # whose weight files the output begins as: FT, or BASE where FT is an adapter merged into it


@contextlib.contextmanager
def open_pair(base: Source, ft: Source, spec: EditSpec, *, whole: bool = False) -> Iterator[Opened]:
    """Open BASE and FT and plan the edit: headers, configs and file names only. Raises PomeError.

    `whole` fetches all files of an FT on the Hub, which writing an output needs and planning does not; of BASE too
    where FT is an adapter.
    """
    with contextlib.ExitStack() as stack:
        tuned = open_checkpoint(ft, whole=whole, dequantize=spec.dequantize)
        stack.callback(tuned.close)
        merges = tuned.adapter_config is not None and spec.out_format == "full"
        pretrained = open_checkpoint(base, whole=whole and merges, dequantize=spec.dequantize)
        stack.callback(pretrained.close)
        sides = [pretrained, tuned]
        identities = [[weights.file.identity for weights in side.files.values()] for side in sides]
        if identities[0] == identities[1]:
            raise PairingError(
                f"{printable(sides[1].source)}: BASE and FT are the same files; give the pretrained checkpoint first, "
                "then the one that was trained from it"
            )
        plan = make_plan(sides[0], sides[1], spec)
        check_overrides(plan, spec)
        beside = list_adapted_side_files(*sides) if merges else list_side_files(tuned)
        yield Opened(pretrained, tuned, plan, *beside, pretrained if merges else tuned)


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
) -> Manifest:
    """Write to the folder `out` the checkpoint `ft` with the selected matrices edited; returns its manifest.

    `out` appears whole or not at all. What an interrupted call finished lies in `OUT.pome-staging`, and the same call
    goes on from there; `fresh` drops it. `card` puts a model card in the place of `ft`'s README.md. Raises PomeError
    for bad input or a machine that fails; KeyboardInterrupt, after progress is safe, when interrupted.
    """
    spec = spec or EditSpec()
    begun = time.perf_counter()
    with open_pair(base, ft, spec, whole=True) as opened:
        inputs = [Path(os.fspath(source)).expanduser() for source in (base, ft)]
        target = check_target(Path(os.fspath(out)), inputs, overwrite)
        return _Run(opened, spec, progress or Progress(), begun, card).make(target, overwrite, fresh)


class _Run:
    """The state of one run between its stages."""

    def __init__(self, opened: Opened, spec: EditSpec, progress: Progress, begun: float, card: bool) -> None:
        self.opened = opened
        self.spec = spec
        self.progress = progress
        self.begun = begun
        self.card = card
        self.kernel_seconds = 0.0
        self.cancelled = threading.Event()

    def make(self, target: Path, overwrite: bool, fresh: bool) -> Manifest:
        from pome.patch import list_devices

        devices = list_devices(self.spec.device)
        command = {**describe_command(self.opened, self.spec), "card": self.card}
        if not overwrite and finish_published(target, command):
            return read_manifest(target / MANIFEST_NAME)
        with Staging(target, command, fresh) as staging:
            try:
                staging.check_space(*self._count_space(staging))
            except BaseException:
                staging.discard_if_empty()
                raise
            self.progress.begin(self.opened.plan, self.opened.ft, devices, len(staging.finished))
            try:
                # Inputs are hashed beside the kernel: it leaves a core or a disk idle often enough to hide it.
                with self._hashing_inputs() as hashes:
                    if self.spec.out_format == "adapter":
                        self._edit_adapter(staging, devices[0])
                    else:
                        self._copy(staging)
                        self._edit(staging, devices)
                    base, fine_tuned = self._join_hashes(hashes)
                for side in (self.opened.base, self.opened.ft):
                    side.check_unchanged()
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

    def _count_space(self, staging: Staging) -> tuple[int, Path | None]:
        """Bytes still to be copied, and a file to try sharing with."""
        layouts = self.opened.plan.layouts
        sizes = {name: file.header.file_size for name, file in self.opened.template.files.items()}
        sizes |= {name: header.file_size for name, (_, header) in layouts.items()}
        sizes |= {file.name: file.size for file in self.opened.side_files}
        shared = None if layouts else next(iter(self.opened.template.files.values())).file.path
        return sum(size for name, size in sizes.items() if name not in staging.copied), shared

    def _edit_adapter(self, staging: Staging, device: str) -> None:
        """Write the edited adapter anew. It takes seconds, so an interrupted run begins again."""
        from pome.adapt import edit_loras, write_adapter

        opened = self.opened
        self.progress.start("copy", sum(file.size for file in opened.side_files))
        for file in opened.side_files:
            if file.name != ADAPTER_CONFIG:
                staging.copy_file(file.name, file.path, self._advance("copy"))
        self.progress.finish("copy")
        self.progress.start("edit", len(opened.plan.units))
        begun = time.perf_counter()

        def edit_each() -> Iterator[Any]:
            for lora in edit_loras(opened.plan, opened.ft, self.spec, device):
                yield lora
                self.progress.advance("edit", len(lora.units), sum(unit.nbytes for unit in lora.units), lora.low.key)

        for lora in write_adapter(edit_each(), opened.ft, staging.output, staging.folder / "factors"):
            entry = {
                "tensors": [dataclasses.asdict(record) for record in lora.tensors],
                "kept": [dataclasses.asdict(record) for record in lora.kept],
            }
            staging.finished |= dict.fromkeys((unit.key for unit in lora.units), {"tensors": [], "kept": []})
            staging.finished[lora.units[0].key] = entry
        self.kernel_seconds = time.perf_counter() - begun
        self.progress.finish("edit")

    def _copy(self, staging: Staging) -> None:
        """Fill the staging folder with FT's files (BASE's where FT is an adapter).

        They are cloned as they are, or laid out anew where a dtype changes.
        """
        opened, layouts = self.opened, self.opened.plan.layouts
        source = opened.template
        total = sum(file.header.file_size for file in source.files.values())
        self.progress.start("copy", total + sum(file.size for file in opened.side_files))
        for name, weights in source.files.items():
            advance = self._advance("copy")
            if source.dequantized and not weights.header.tensors:
                continue  # a shard of scales alone, which no index would name
            if name in layouts:
                raw, header = layouts[name]
                staging.lay_out(name, weights.file, weights.header, raw, header, advance)
            elif weights.file.path is None:
                staging.write_file(name, weights.file, advance)
            else:
                staging.copy_file(name, weights.file.path, advance)
        for file in opened.side_files:
            if file.name == "config.json" and source.dequantized:
                config = {key: value for key, value in (source.config or {}).items() if key != "quantization_config"}
                staging.put_file(file.name, (json.dumps(config, indent=2) + "\n").encode())
            else:
                staging.copy_file(file.name, file.path, self._advance("copy"))
        if source.index is not None and source.folder is not None:
            index = source.folder / source.index
            if layouts or source.dequantized:
                headers = {name: weights.header for name, weights in source.files.items()}
                headers |= {name: header for name, (_, header) in layouts.items()}
                size = sum(header.file_size - header.data_start for header in headers.values())
                staging.put_file(source.index, update_index(index.read_bytes(), size, source.dequantized))
            else:
                staging.copy_file(source.index, index, self._advance("copy"))
        self.progress.finish("copy")

    def _edit(self, staging: Staging, devices: list[str]) -> None:
        """Every unit that no earlier run finished, journalled in groups."""
        from pome.merge import Data, make_patch, read_unit
        from pome.patch import Patch

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
            patch = make_patch(unit, data, self.spec, device)
            if patch.data is not None:
                staging.write(unit.file, patch.data, unit.out_start)
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
                        "tensors": [dataclasses.asdict(record) for record in patch.tensors],
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
    def _hashing_inputs(self) -> Iterator[list[dict[str, Future[tuple[int, str]]]]]:
        """Futures of (bytes, SHA-256) for BASE's and FT's files, worked on by one thread beside the edit."""
        opened = self.opened
        with ThreadPoolExecutor(1, thread_name_prefix="pome-hash") as pool:

            def submit(side: Checkpoint, extra: list[SideFile]) -> dict[str, Future[tuple[int, str]]]:
                paths = {name: weights.file.stored for name, weights in side.files.items() if weights.file.stored}
                if side.index is not None and side.folder is not None:
                    paths[side.index] = side.folder / side.index
                paths |= {file.name: file.path for file in extra}
                return {name: pool.submit(self._hash, path, self._stop_if_cancelled) for name, path in paths.items()}

            config = []
            added = opened.side_files
            if opened.template is opened.base:
                # What goes along is hashed with the side that it comes from.
                added = [file for file in added if opened.ft.folder and file.path.is_relative_to(opened.ft.folder)]
                config = [file for file in opened.side_files if file not in added]
            elif opened.base.folder is not None and (opened.base.folder / "config.json").is_file():
                config = [SideFile("config.json", opened.base.folder / "config.json", 0)]
            try:
                yield [submit(opened.base, config), submit(opened.ft, added)]
            finally:
                self.cancelled.set()
                pool.shutdown(cancel_futures=True)

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
        kept = [KeptRecord(item.name, item.part, item.reason) for item in plan.kept]
        kept += [KeptRecord(**item) for entry in entries for item in entry["kept"]]
        return Manifest(
            format_version=FORMAT_VERSION,
            pome_version=pome.__version__,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            base=base,
            fine_tuned=fine_tuned,
            spec=self.spec.to_mapping(),
            tensors=tuple(
                TensorRecord(**{**t, "shape": tuple(t["shape"]), "warnings": tuple(t["warnings"])}) for t in tensors
            ),
            kept=tuple(kept),
            merged=plan.merged,
            not_copied=self.opened.not_copied,
            files={},
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
        with ThreadPoolExecutor(2, thread_name_prefix="pome-hash") as pool:
            made = pool.map(lambda name: self._hash(staging.output / name, self._advance("hash")), names)
            files = {name: FileRecord(*record) for name, record in zip(names, made, strict=True)}
        self.progress.finish("hash")
        timing: dict[str, float | str] = {
            "total_seconds": round(time.perf_counter() - self.begun, 3),
            "kernel_seconds": round(self.kernel_seconds, 3),
        }
        return dataclasses.replace(manifest, files=files, timing=timing).sealed()

    def _hash(self, path: Path, advance: Callable[[int], None]) -> tuple[int, str]:
        try:
            return hash_file(path, advance)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}; run the same command again") from None

    def _stop_if_cancelled(self, _: int) -> None:
        if self.cancelled.is_set():
            raise CheckpointError("hashing was cancelled")

    def _advance(self, task: str) -> Callable[[int], None]:
        return lambda amount: self.progress.advance(task, amount, amount)


def describe_command(opened: Opened, spec: EditSpec) -> dict[str, Any]:
    """What makes two runs the same run: the options, the inputs as they are now, and the versions that fix the bits."""
    command: dict[str, Any] = {"pome": pome.__version__, "torch": importlib.metadata.version("torch")}
    command |= spec.to_mapping()
    for name, side in (("base", opened.base), ("fine_tuned", opened.ft)):
        command[name] = [weights.file.identity for weights in side.files.values()]
    command["side_files"] = [[file.name, file.size] for file in opened.side_files]
    return command
