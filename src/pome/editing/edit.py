"""POME edit of a checkpoint: open, plan, stage, edit unit by unit, publish. The only loop over units that writes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pome.checkpoint.leftovers import ADAPTER_CONFIG
from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.config.spec import EditSpec
from pome.editing.run import Run
from pome.editing.run_rates import RunClock
from pome.editing.session import Source, describe_command, open_pair
from pome.editing.ties import check_copies
from pome.manifest import Manifest, read_manifest
from pome.output.card import make_card, read_ft_card
from pome.output.commits import Commits
from pome.output.copying import copy_files, count_space
from pome.output.progress import Progress, advance_bytes
from pome.output.staging import SCRATCH, Staging
from pome.output.target import check_target, finish_published
from pome.output.watermark import Watermark
from pome.planning.units import Unit

if TYPE_CHECKING:
    from pome.editing.remote import RemoteEdit
    from pome.editing.unit import FindCache


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
    """POME edit of a fine-tuned checkpoint (arXiv 2510.06627), written to a folder; returns its manifest.

    Every selected matrix W_ft (m x n) becomes W_base + alpha U_k V_k^T, U_k and V_k the k leading singular directions
    of W_ft - W_base. Every other byte is FT's.

    Args:
        base: the pretrained checkpoint: a folder, one `.safetensors` file, or `org/name[@revision]` on the Hub.
        ft: the fine-tuned checkpoint, as `base`, or a PEFT LoRA adapter of `base`.
        out: the folder to make. It appears whole or not at all, in one rename.
        spec: which matrices, and how k, alpha and the dtype are chosen; `EditSpec()` if None.
        progress: is told what happens; a subclass of `Progress`.
        overwrite: replace `out` if it exists, in the moment in which the new one is whole.
        fresh: drop what an interrupted call left in `OUT.pome-staging`; otherwise the same call goes on from there.
        card: write a model card in the place of FT's README.md.

    Raises:
        SpecError: options at odds with each other.
        CheckpointError, PairingError, SelectionError: an input that cannot be read, two that do not fit together, a
            selection that nothing matches. Nothing is written.
        NumericalError: NaN or infinity in a selected matrix, or an edit that the dtype cannot hold.
        OutputError: `out` exists, lies in an input, is being made by another run, or the disk refuses.
        KeyboardInterrupt: interrupted, after the progress so far is safe.
    """
    return edit_pair(base, ft, out, spec or EditSpec(), progress, overwrite=overwrite, fresh=fresh, card=card)


def edit_pair(
    base: Source,
    ft: Source,
    out: Source,
    spec: EditSpec,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    card: bool = False,
    find_cache: FindCache | None = None,
    sweep: Mapping[str, Any] | None = None,
) -> Manifest:
    """The edit behind `edit` and `sweep`.

    `find_cache` returns the cache of a matrix's decompositions, `sweep` is the manifest's record of how the options
    were chosen; the rest is as in `edit`.
    """
    begun = time.perf_counter()
    with open_pair(base, ft, spec, whole=True) as opened:
        target = check_target(Path(os.fspath(out)), opened.list_inputs(), overwrite)
        run = _Edit(opened, spec, progress or Progress(), begun, card, find_cache, sweep)
        return run.make(target, overwrite, fresh)


@dataclasses.dataclass
class _Edit(Run):
    """The state of one edit between its stages."""

    find_cache: FindCache | None
    sweep: Mapping[str, Any] | None
    remote: RemoteEdit | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.devices: list[str] = []
        self.clock = RunClock(self.spec, self.begun)

    def make(self, target: Path, overwrite: bool, fresh: bool) -> Manifest:
        with self.clock.time("start"):
            from pome.editing.unit import list_devices

        remote = self.spec.engine == "ray" and self.spec.out_format != "adapter"  # which takes seconds
        if not remote:
            self.devices = list_devices(self.spec.device)
        command = {**describe_command(self.opened, self.spec), "card": self.card}
        if not overwrite and finish_published(target, command):
            return read_manifest(target / MANIFEST_NAME)
        self.check_base()
        whole = False  # whether this run does all of the work, so that rates follow from its times
        with Staging(target, command, fresh) as staging, contextlib.ExitStack() as stack:
            try:
                staging.check_space(*count_space(self.opened.template, staging))
                if remote:
                    from pome.editing.remote import RemoteEdit

                    self.remote = stack.enter_context(RemoteEdit(self.opened, self.spec, staging, self.find_cache))
                    self.devices = self.remote.devices
            except BaseException:
                staging.discard_if_empty()
                raise
            self.progress.begin(self.opened.plan, self.opened.ft, self.devices, len(staging.finished))
            with self.resumable(staging, len(self.opened.plan.units)):
                with self.hashes.of_inputs():
                    if self.spec.out_format == "adapter":
                        self._edit_adapter(staging, self.devices[0])
                    else:
                        whole = not remote and not staging.copied and not staging.finished
                        with self.clock.time("copy"):
                            copy_files(self.opened.template, staging, self.progress)
                        spread = self.remote is not None and self.remote.is_spread
                        with self.hashes.of_output(staging, spread) as watermark, self.clock.time("edit"):
                            self._edit(staging, watermark)
                    manifest = self.describe(self.opened.plan, staging)
                manifest = dataclasses.replace(manifest, sweep=dict(self.sweep) if self.sweep is not None else None)
                card = make_card(manifest, read_ft_card(self.opened.ft)) if self.card else None
                started = {} if self.remote is None else {"engine_start_seconds": round(self.remote.start_seconds, 3)}
                manifest = self.publish(staging, manifest, card, overwrite, **started)
                if whole and staging.cores is not None and self.find_cache is None:
                    self.clock.leave(self.opened.count_files(), self.devices, staging.cores)
        return manifest

    def _edit_adapter(self, staging: Staging, device: str) -> None:
        """Write the edited adapter anew. It takes seconds, so an interrupted run begins again."""
        from pome.editing.lora_rewrite import edit_loras, write_adapter

        opened = self.opened
        self.progress.start("copy", sum(file.size for file in opened.template.side_files))
        for file in opened.template.side_files:
            if file.name != ADAPTER_CONFIG:
                staging.copy_file(file.name, file.path, advance_bytes(self.progress, "copy"))
        self.progress.finish("copy")
        self.progress.start("edit", len(opened.plan.units), sum(unit.work for unit in opened.plan.units))
        begun = time.perf_counter()

        def edit_each() -> Iterator[Any]:
            for lora in edit_loras(opened.plan, opened.ft, self.spec, device):
                yield lora
                nbytes, work = (sum(amounts) for amounts in zip(*((u.nbytes, u.work) for u in lora.units), strict=True))
                self.progress.advance("edit", len(lora.units), int(nbytes), lora.low.key, work)

        scratch = staging.folder / SCRATCH
        staging.finished |= {unit.key: {"tensors": [], "kept": []} for unit in opened.plan.units}
        for lora in write_adapter(edit_each(), opened.plan.loras, opened.ft, staging.output, scratch):
            entry = staging.finished[lora.units[0].key]  # which another LoRA of the same stored tensor may share
            entry["tensors"] += [record.to_mapping() for record in lora.tensors]
            entry["kept"] += [dataclasses.asdict(record) for record in lora.kept]
        self.kernel_seconds = time.perf_counter() - begun
        self.progress.finish("edit")

    def _edit(self, staging: Staging, watermark: Watermark) -> None:
        """Every unit that no earlier run finished, journalled in groups."""
        from pome.editing.lora_merge import Data, make_patch, read_unit
        from pome.editing.unit import Patch
        from pome.editing.workers import keep_split, map_on_devices

        opened = self.opened
        units = opened.plan.units
        todo = [unit for unit in units if unit.key not in staging.finished]
        self.progress.start("edit", len(units), sum(unit.work for unit in todo))
        self.progress.advance("edit", len(units) - len(todo))
        commits = Commits(staging)

        def read(unit: Unit) -> Data:
            return read_unit(unit, opened.ft, opened.base)

        def work(unit: Unit, data: Data, device: str) -> Patch:
            check_copies(unit, opened.template.weights)
            patch = make_patch(unit, data, self.spec, device, self.find_cache)
            for file, start in unit.places:
                if patch.data is not None:
                    staging.write(file, patch.data, start)
                watermark.mark_written(file, start)
            return dataclasses.replace(patch, data=None)

        cores = keep_split(staging, self.progress)
        remote = self.remote
        patches = remote.map(todo) if remote is not None else map_on_devices(todo, self.devices, cores, read, work)
        try:
            for patch in patches:
                self.kernel_seconds += patch.kernel_seconds
                self.clock.tally.add(patch.unit, patch.kernel_seconds)
                unit = patch.unit
                for file, start in unit.places if remote is not None else ():
                    watermark.mark_written(file, start)
                commits.add(
                    {
                        "unit": unit.key,
                        "file": unit.file,
                        "copies": [copy.file for copy in unit.copies],
                        "tensors": [record.to_mapping() for record in patch.tensors],
                        "kept": [dataclasses.asdict(record) for record in patch.kept],
                    }
                )
                self.progress.advance("edit", 1, unit.nbytes + unit.base_nbytes, unit.name, unit.work)
        finally:
            patches.close()
            commits.flush()
            for note in remote.describe_losses() if remote is not None else ():
                self.progress.note(note)
        self.progress.finish("edit")
