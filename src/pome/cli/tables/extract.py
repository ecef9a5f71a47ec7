"""Output of `pome extract` before and after the work: the plan, the closing table, the losses."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from pome.checkpoint.leftovers import ADAPTER_WEIGHTS
from pome.cli.console import print_lines
from pome.cli.tables.edit import (
    close,
    describe_existing,
    describe_kept,
    describe_left_out,
    describe_pair_notices,
    describe_warnings,
)
from pome.cli.tables.fitted import FittedTable
from pome.cli.tables.text import count_noun, name_side, show_bytes
from pome.config.extraction import ExtractSpec
from pome.editing.session import Opened
from pome.errors import printable
from pome.manifest import Manifest, show_median
from pome.output.extract_card import find_energy, group_lost, sum_energy_by_role
from pome.planning.extract_plan import ExtractPlan

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 5  # the largest losses


def describe_extraction(opened: Opened, extraction: ExtractPlan) -> str:
    """A line of what becomes what, how many LoRAs and bytes; and the notices, a line each."""
    plan = extraction.plan
    roles = dict.fromkeys(role for _, part in plan.matrices() for role in part.role.split("+"))
    line = (
        f"{name_side(opened.base)} (pretrained) -> {name_side(opened.ft)} (fine-tuned)   "
        f"{count_noun(len(extraction.loras), 'LoRA')} of {count_noun(len(plan.units), 'matrix', 'matrices')} "
        f"({', '.join(roles)})   {show_bytes(plan.bytes_read)} to read"
    )
    return "\n".join([line, *describe_pair_notices(opened)])


def make_lora_table(extraction: ExtractPlan) -> FittedTable:
    """The plan of `--dry-run`: a row for each role and shape, then what no LoRA holds and why."""
    table = FittedTable("role", "matrices", "shape", "dtype", "rank at most", texts=(2,), where="--json has them")
    rows: Counter[tuple[str, str, str, int]] = Counter()
    for cell in extraction.cells:
        unit = cell.unit
        rows[unit.parts[0].role, " x ".join(map(str, unit.shape)), unit.out_dtype, cell.most] += 1
    for (role, shape, dtype, most), count in rows.items():
        table.add_row(role, str(count), shape, dtype, str(most))
    for reason, count in Counter(kept.reason for kept in extraction.kept).items():
        table.add_row("kept", str(count), reason, "", "", style="dim")
    return table


def describe_needs(extraction: ExtractPlan, spec: ExtractSpec, target: Path, overwrite: bool) -> list[str]:
    """What the extraction of a dry run would need; what is known only when all of FT is read; and that OUT exists."""
    plan = extraction.plan
    device = "auto (chosen when the extraction starts)" if spec.device == "auto" else spec.device
    folder = next(place for place in target.parents if place.is_dir())
    free = f"{show_bytes(shutil.disk_usage(folder).free)} free in {printable(str(folder), 1000)}"
    most = "" if spec.rank_rule == "fixed" else "at most "
    return [
        f"device {device}, expected memory {show_bytes(plan.memory)}",
        f"LoRAs: {most}{show_bytes(plan.bytes_written)}, and as much again while they are made; {free}",
        "What else differs between BASE and FT is found when all of FT is read.",
        *describe_existing(target, overwrite),
    ]


def report_extraction(manifest: Manifest, out: Path, console: Console) -> None:
    """Show what the adapter holds, what is lost, and what OUT is now."""
    if manifest.tensors:
        console.print(make_closing_table(manifest))
    lines = [*describe_kept(manifest.kept), *describe_left_out(manifest.not_copied)]
    lines += [*describe_warnings(manifest), *describe_lost(manifest)]
    if manifest.saved:
        lines.append(f"saved whole: {count_noun(len(manifest.saved), 'tensor')} of FT (modules_to_save)")
    print_lines(console, [*lines, *describe_closing(manifest, out)])


def make_closing_table(manifest: Manifest) -> FittedTable:
    """A row for each role: how many matrices, their ranks, the energy kept over all of them, and the largest loss."""
    heads = ("role", "matrices", "k", "energy kept", "least", "of", "lost to rounding")
    table = FittedTable(*heads, texts=(5,), where="the manifest has them")
    for role, energy in sum_energy_by_role(manifest).items():
        table.add_row(
            role,
            str(len(energy.records)),
            show_median(energy.records, "k", ".0f"),
            f"{energy.kept:.3f}",
            f"{find_energy(energy.least):.3f}",
            printable(energy.least.title),
            show_median(energy.records, "rounding", ".2g"),
        )
    return table


def describe_lost(manifest: Manifest) -> list[str]:
    """Changes that are not in the adapter: by reason, how much of each, and the largest."""
    lines = []
    for lost in group_lost(manifest):
        count = len(lost.records)
        named = ", ".join(f"{printable(r.name)} {r.norm:.3g} ({r.share:.2g} of BASE's)" for r in lost.records[:SHOWN])
        more = f" and {count - SHOWN} more (the manifest names all)" if count > SHOWN else ""
        lines.append(
            f"warning: lost: {count_noun(count, 'tensor')} changed by a norm of {lost.norm:.3g} and "
            f"{'is' if count == 1 else 'are'} not in the adapter: {printable(lost.reason, 400)} ({named}{more})"
        )
    return lines


def describe_closing(manifest: Manifest, out: Path) -> list[str]:
    """What OUT is now beside FT, how long it took, and the command that verifies it."""
    size = manifest.files[ADAPTER_WEIGHTS].bytes
    weights = [file.bytes for name, file in manifest.fine_tuned.files.items() if name.endswith(".safetensors")]
    beside = f", {size / sum(weights):.1%} of FT's {show_bytes(sum(weights))}" if sum(weights) else ""
    count = count_noun(len(manifest.tensors), "matrix", "matrices")
    notes = [f"note: {printable(notice, 2000)}" for notice in manifest.notices if notice.startswith("OUT ")]
    return [*notes, *close(manifest, out, f"{show_bytes(size)}{beside}, {count}")]
