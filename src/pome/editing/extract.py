"""Extraction of a fine-tune's update as a PEFT LoRA: open, plan, one product B A after the other, assemble, publish."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pome.checkpoint.leftovers import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.checkpoint.source import Checkpoint
from pome.config.extraction import ExtractSpec
from pome.editing.run import Run
from pome.editing.session import Opened, Source, describe_command, open_pair
from pome.errors import PairingError, printable
from pome.manifest import LostRecord, Manifest, TensorRecord, read_manifest
from pome.output.card import CARD_NAME, read_ft_card
from pome.output.commits import Commits
from pome.output.extract_card import make_extract_card
from pome.output.progress import Progress
from pome.output.staging import SCRATCH, Staging
from pome.output.target import check_target, finish_published
from pome.planning.extract_plan import ExtractPlan, plan_extraction
from pome.planning.remainder import Rest, find_shared_tables, list_rest
from pome.planning.units import Unit

if TYPE_CHECKING:
    from pome.editing.extract_cell import Extracted
    from pome.editing.extract_file import Contents

NOT_PART = "an adapter has none; load it from FT"


def extract(
    base: Source,
    ft: Source,
    out: Source,
    spec: ExtractSpec,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    card: bool = False,
) -> Manifest:
    """The update of a full fine-tune as a PEFT LoRA, written to a folder; returns its manifest.

    Of every selected matrix the LoRA of the module that transformers loads it into holds alpha U_k S_k^p V_k^T, with
    p = 1 and alpha = 1 the best approximation of rank k of W_ft - W_base. Of what else changed, `spec.save_modules`
    takes along what PEFT can hold; the manifest names the rest with the norm that is lost.

    Args:
        base: the pretrained checkpoint: a folder, one `.safetensors` file, or `org/name[@revision]` on the Hub.
        ft: the fine-tuned checkpoint, as `base`.
        out: the folder to make. It appears whole or not at all, in one rename.
        spec: which matrices, which rank, power and scale.
        progress: is told what happens; a subclass of `Progress`.
        overwrite: replace `out` if it exists, in the moment in which the new one is whole.
        fresh: drop what an interrupted call left in `OUT.pome-staging`; otherwise the same call goes on from there.
        card: write a model card, README.md.

    Raises:
        SpecError, CheckpointError, PairingError, SelectionError, NumericalError, OutputError, KeyboardInterrupt: as
            `edit` does.
    """
    begun = time.perf_counter()
    with open_pair(base, ft, spec) as opened:
        extraction = plan_opened(opened, spec)
        target = check_target(Path(os.fspath(out)), opened.list_inputs(), overwrite)
        run = _Extraction(opened, spec, progress or Progress(), begun, card, extraction)
        return run.make(target, overwrite, fresh)


def plan_opened(opened: Opened, spec: ExtractSpec) -> ExtractPlan:
    """The plan of an extraction from an open pair. Raises PomeError."""
    if opened.ft.adapter_config is not None:
        raise PairingError(f"{printable(opened.ft.source)}: an adapter already; `pome edit` edits one")
    return plan_extraction(opened.plan, opened.base, spec)


@dataclasses.dataclass
class _Extraction(Run):
    """The state of one extraction between its stages."""

    spec: ExtractSpec
    extraction: ExtractPlan

    def make(self, target: Path, overwrite: bool, fresh: bool) -> Manifest:
        from pome.editing.extract_file import find_model_class
        from pome.editing.unit import list_devices

        devices = list_devices(self.spec.device)
        command = {**describe_command(self.opened, self.spec), "command": "extract", "card": self.card}
        if not overwrite and finish_published(target, command):
            return read_manifest(target / MANIFEST_NAME)
        opened, plan = self.opened, self.extraction.plan
        theirs = read_ft_card(opened.ft) if self.card else None  # which may have to be fetched
        self.check_base()
        with Staging(target, command, fresh) as staging:
            try:
                known = 2 * sum(cell.unit.out_nbytes for cell in self.extraction.cells) if self.spec.rank else 0
                staging.check_space(known, None)
            except BaseException:
                staging.discard_if_empty()
                raise
            self.progress.begin(plan, opened.ft, devices, len(staging.finished))
            with self.resumable(staging, len(plan.units)):
                with self.hashes.of_inputs():
                    self._extract(staging, devices)
                    contents, lost, notices = self._assemble(staging)
                    manifest = self.describe(plan, staging)
                left = {file.name: NOT_PART for file in opened.template.side_files} | opened.not_copied
                if self.card:
                    left.pop(CARD_NAME, None)  # the card holds it
                manifest = dataclasses.replace(
                    manifest,
                    not_copied=left,
                    notices=(*manifest.notices, *notices),
                    saved=tuple(sorted(set(contents.saved.values()))),
                    lost=lost,
                )
                card = make_extract_card(manifest, theirs, find_model_class(opened.base)) if self.card else None
                return self.publish(staging, manifest, card, overwrite)

    def _extract(self, staging: Staging, devices: list[str]) -> None:
        """Every cell that no earlier run finished: its factors to the scratch file, journalled in groups."""
        from pome.editing.extract_cell import extract_cell, read_cell
        from pome.editing.workers import keep_split, map_on_devices

        base, ft = self.opened.base, self.opened.ft
        owners = {cell.unit.key: (cell, lora) for lora in self.extraction.loras for cell in lora.cells}
        units = self.extraction.plan.units
        staging.open_scratch()
        todo = [unit for unit in units if unit.key not in staging.finished]
        self.progress.start("edit", len(units), sum(unit.work for unit in todo))
        self.progress.advance("edit", len(units) - len(todo))
        commits = Commits(staging)

        def read(unit: Unit) -> Any:
            return read_cell(owners[unit.key][0], ft, base)

        def work(unit: Unit, data: Any, device: str) -> Extracted:
            cell, lora = owners[unit.key]
            found = extract_cell(cell, lora, data, self.spec, device)
            if found.factors is not None:
                staging.write(SCRATCH, found.to_bytes(), cell.offset)
            return dataclasses.replace(found, factors=None)

        results = map_on_devices(todo, devices, keep_split(staging, self.progress), read, work)
        try:
            for found in results:
                self.kernel_seconds += found.kernel_seconds
                unit, record = found.cell.unit, found.record
                edited = isinstance(record, TensorRecord)
                commits.add(
                    {
                        "unit": unit.key,
                        "file": ADAPTER_WEIGHTS,
                        "copies": [],
                        "tensors": [record.to_mapping()] if isinstance(record, TensorRecord) else [],
                        "kept": [] if edited else [dataclasses.asdict(record)],
                    }
                )
                self.progress.advance("edit", 1, unit.nbytes + unit.base_nbytes, unit.name, unit.work)
        finally:
            results.close()
            commits.flush()
        self.progress.finish("edit")

    def _assemble(self, staging: Staging) -> tuple[Contents, tuple[LostRecord, ...], list[str]]:
        """The adapter's two files, from the factors of all cells and what else changed; contents, losses, notices."""
        from pome.editing.extract_file import make_adapter_config, write_weights

        base, ft = self.opened.base, self.opened.ft
        ranks = {key: entry["tensors"][0]["k"] if entry["tensors"] else 0 for key, entry in staging.finished.items()}
        contents, lost, notices = gather_contents(self.extraction, ranks, self.spec, base, ft, self.progress)
        write_weights(contents, staging.folder / SCRATCH, ft, staging.output / ADAPTER_WEIGHTS)
        staging.put_file(ADAPTER_CONFIG, make_adapter_config(contents, self.extraction, base))
        return contents, lost, notices


def gather_contents(
    extraction: ExtractPlan,
    ranks: Mapping[str, int],
    spec: ExtractSpec,
    base: Checkpoint,
    ft: Checkpoint,
    progress: Progress,
) -> tuple[Contents, tuple[LostRecord, ...], list[str]]:
    """Contents of the adapter, losses and notices, from the ranks of all cells; compares all else of FT with BASE."""
    from pome.editing.compare_rest import find_change
    from pome.editing.extract_file import choose_contents, rank_loras

    ranked = rank_loras(extraction.loras, ranks, spec)
    left = dataclasses.replace(extraction, loras=tuple(one.lora for one in ranked))
    rests = list(list_rest(left, base, ft))
    progress.start("compare", sum(ft.tensors[rest.name][1].nbytes for rest in rests))
    found: list[LostRecord] = []
    for rest in rests:
        change = find_change(rest, base, ft)
        if change is not None:
            found.append(change)
        nbytes = ft.tensors[rest.name][1].nbytes
        progress.advance("compare", nbytes, nbytes)
    progress.finish("compare")
    changed = {change.name for change in found} if spec.save_modules else set()
    shared, by_head_alone = find_shared_tables(base)
    contents = choose_contents(ranked, rests, changed, next(iter(shared)) if by_head_alone else None)
    held = set(contents.saved.values())
    lost = tuple(change for change in found if change.name not in held)
    return contents, lost, describe_resized(rests, held, base, ft)


def describe_resized(rests: list[Rest], held: set[str], base: Checkpoint, ft: Checkpoint) -> list[str]:
    """A notice for saved tables of another vocabulary, which PEFT loads into a model of their size alone."""
    sizes = [
        ft.tensors[rest.name][1].shape
        for rest in rests
        if rest.name in held and rest.partner and ft.tensors[rest.name][1].shape != base.tensors[rest.partner][1].shape
    ]
    if not sizes:
        return []
    return [
        f"OUT holds tables of {sizes[0][0]} rows, another vocabulary than BASE's: call "
        f"model.resize_token_embeddings({sizes[0][0]}) before PEFT loads it"
    ]
