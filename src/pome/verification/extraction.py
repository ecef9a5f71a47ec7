"""Verification of an extracted adapter against BASE and FT: config, LoRAs computed again, tensors held whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pome.checkpoint.leftovers import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.checkpoint.source import Checkpoint
from pome.config.extraction import ExtractSpec
from pome.editing.extract import gather_contents
from pome.manifest import Manifest
from pome.output.card import CARD_NAME
from pome.output.progress import Progress
from pome.planning.extract_plan import Cell, ExtractPlan, name_factors, plan_extraction
from pome.planning.split import count_cores
from pome.planning.units import Plan
from pome.verification.comparison import Advance, Difference, compare_side_files, same_bytes
from pome.verification.recomputation import EDITS_AGREE, NUMBERS_AGREE, SAMPLE, compare_record

if TYPE_CHECKING:
    from torch import Tensor

    from pome.editing.extract_file import Contents, Ranked


def check_extraction(
    made: Checkpoint,
    base: Checkpoint,
    ft: Checkpoint,
    plan: Plan,
    manifest: Manifest,
    spec: ExtractSpec,
    full: bool,
    found: list[Difference],
    advance: Advance,
) -> tuple[int, int]:
    """(bytes compared, matrices recomputed). A sample of the matrices is extracted again, all of them with `full`."""
    extraction = plan_extraction(plan, base, spec)
    records = {(record.name, record.part): record for record in manifest.tensors}
    kept = {(item.name, item.part) for item in manifest.kept}
    planned = {(cell.unit.name, cell.unit.label(cell.unit.parts[0])): cell for cell in extraction.cells}
    for name, part in sorted(records.keys() - planned.keys(), key=str):
        found.append(Difference(MANIFEST_NAME, name, f"{part or 'the matrix'} is not one that these inputs select"))
    for name, part in sorted(planned.keys() - records.keys() - kept, key=str):
        found.append(Difference(MANIFEST_NAME, name, f"{part or 'the matrix'} was selected, but has no record"))
    found += compare_side_files(manifest.files, {}, {}, {ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD_NAME}, advance)
    if found:
        return 0, 0
    ranks = {cell.unit.key: records[key].k or 0 if key in records else 0 for key, cell in planned.items()}
    contents, compared = _check_contents(made, base, ft, extraction, ranks, manifest, spec, found, advance)
    if found:
        return compared, 0
    return compared, _recompute(made, base, ft, contents, extraction, manifest, spec, full, found, advance)


def _check_contents(
    made: Checkpoint,
    base: Checkpoint,
    ft: Checkpoint,
    extraction: ExtractPlan,
    ranks: Mapping[str, int],
    manifest: Manifest,
    spec: ExtractSpec,
    found: list[Difference],
    advance: Advance,
) -> tuple[Contents, int]:
    """The config, the tensors' names, the whole ones' bytes, and what the manifest says is lost; bytes compared."""
    from pome.editing.extract_file import make_adapter_config

    contents, lost, _ = gather_contents(extraction, ranks, spec, base, ft, Progress())
    if made.adapter_config != json.loads(make_adapter_config(contents, extraction, base)):
        found.append(Difference(ADAPTER_CONFIG, None, "is not the config of this adapter"))
    factors = {name for _, a, b in name_factors(contents.loras) for name in (a, b)}
    for name in sorted(made.tensors.keys() ^ (factors | contents.saved.keys())):
        said = "no LoRA and no saved tensor of these inputs" if name in made.tensors else "missing"
        found.append(Difference(ADAPTER_WEIGHTS, name, said))
    compared = 0
    for key, name in contents.saved.items():
        (_, mine), (_, theirs) = made.tensors.get(key, (None, None)), ft.tensors[name]
        if mine is None:
            continue
        files = made.files[ADAPTER_WEIGHTS].file, ft.files[ft.tensors[name][0]].file
        whole = (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        if not whole or not same_bytes(files[0], mine.start, files[1], theirs.start, theirs.nbytes):
            found.append(Difference(ADAPTER_WEIGHTS, key, "its bytes are not FT's"))
        compared += theirs.nbytes
        advance(theirs.nbytes)
    recorded, seen = ({item.name: item for item in items} for items in (manifest.lost, lost))
    for name in sorted(recorded.keys() ^ seen.keys()):
        found.append(Difference(MANIFEST_NAME, name, "is lost by the manifest, or by these inputs, but not by both"))
    for name in sorted(recorded.keys() & seen.keys()):
        if not math.isclose(recorded[name].norm, seen[name].norm, rel_tol=NUMBERS_AGREE):
            what = f"lost norm {recorded[name].norm}, computed again {seen[name].norm}"
            found.append(Difference(MANIFEST_NAME, name, what))
    if set(manifest.saved) != set(contents.saved.values()):
        found.append(Difference(MANIFEST_NAME, None, "saved is not what the adapter holds whole"))
    return contents, compared


def _recompute(
    made: Checkpoint,
    base: Checkpoint,
    ft: Checkpoint,
    contents: Contents,
    extraction: ExtractPlan,
    manifest: Manifest,
    spec: ExtractSpec,
    full: bool,
    found: list[Difference],
    advance: Advance,
) -> int:
    """The number of matrices extracted again, each compared with its record and its product in the file."""
    from pome.editing.extract_cell import extract_cell, read_cell
    from pome.editing.workers import use_threads
    from pome.manifest import TensorRecord

    cells = extraction.cells
    chosen = {cell.unit.key for cell in cells[:: 1 if full else max(1, math.ceil(len(cells) / SAMPLE))]}
    records = {(record.name, record.part): record for record in manifest.tensors}
    ranked = {one.lora.name: one for one in contents.ranked}
    names = {lora.name: (a, b) for lora, a, b in name_factors(contents.loras)}
    count, cores = 0, count_cores()
    for lora in extraction.loras:
        for cell in lora.cells:
            if cell.unit.key not in chosen:
                continue
            with use_threads(cell.unit.count_threads(cores)):  # as an extraction on this machine does
                again = extract_cell(cell, lora, read_cell(cell, ft, base), spec, "cpu")
            if isinstance(again.record, TensorRecord):
                fresh = again.record
                what = compare_record(records.get((fresh.name, fresh.part)), fresh)
                if what:
                    found.append(Difference(MANIFEST_NAME, fresh.name, f"{fresh.part or 'record'}: {what}"))
                elif again.factors is not None:
                    B, A = _read_factors(made, ranked[lora.name], cell, *names[lora.name])
                    tolerance = (EDITS_AGREE + 2 * fresh.rounding) * fresh.edit_norm
                    b, a = (factor.double() for factor in again.factors)
                    if not float((B @ A - b @ a).norm()) <= tolerance:
                        found.append(
                            Difference(ADAPTER_WEIGHTS, names[lora.name][0], "is not the LoRA of these inputs")
                        )
                count += 1
            advance(cell.unit.nbytes)
    return count


def _read_factors(made: Checkpoint, one: Ranked, cell: Cell, a: str, b: str) -> tuple[Tensor, Tensor]:
    """B and A of a cell, in float64, as they are in the file."""
    import torch

    from pome.editing.unit import TORCH_DTYPES

    def load(name: str) -> Tensor:
        _, entry = made.tensors[name]
        data = made.read(name, entry.start, entry.nbytes)
        return torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype]).reshape(entry.shape)

    lora, at = one.lora, cell.unit.expert or 0
    B, A = load(b), load(a)
    B = B.reshape(B.shape[0], one.rank, lora.experts)[:, :, at]
    return B.double(), A.reshape(lora.experts, one.rank, -1)[at].double()
