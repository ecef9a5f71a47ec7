"""Output of `pome edit` before and after the work: the plan, the closing table, warnings."""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.cli.tables.estimate import describe_time
from pome.cli.tables.fitted import FittedTable
from pome.cli.tables.text import count_noun, name_side, show_bytes, show_seconds
from pome.config.spec import EditSpec
from pome.editing.session import Opened
from pome.errors import printable
from pome.inspection.suggest import Notice
from pome.manifest import KeptRecord, Manifest, TensorRecord, show_median
from pome.planning.estimate import Estimate
from pome.planning.units import fan_out_in
from pome.reports.edit_warnings import group_warnings


def describe_plan(opened: Opened) -> str:
    """A line of what becomes what, how many tensors and bytes; and the notices, a line each."""
    plan = opened.plan
    roles = dict.fromkeys(part.role for _, part in plan.matrices())
    edited = {unit.name for unit in plan.units if unit.parts}
    kept = plan.tensor_count - len(edited | set(plan.merged))  # a tensor may be edited in part, and merged in the rest
    merged = f", {len(plan.merged)} merged" if plan.merged else ""
    line = (
        f"{name_side(opened.base)} (pretrained) -> {name_side(opened.ft)} (fine-tuned)   "
        f"{len(edited)} of {plan.tensor_count} tensors to edit "
        f"({', '.join(roles)}){merged}, {kept} kept   "
        f"{show_bytes(plan.bytes_read)} to read, {show_bytes(plan.bytes_written)} to write"
    )
    return "\n".join([line, *describe_pair_notices(opened)])


def describe_needs(opened: Opened, spec: EditSpec, target: Path, overwrite: bool, cost: Estimate) -> list[str]:
    """What the edit of a dry run would need: device, memory, time and disk; and that OUT exists, if it does."""
    folder = next(place for place in target.parents if place.is_dir())
    free = shutil.disk_usage(folder).free
    device = "auto (chosen when the edit starts)" if spec.device == "auto" else spec.device
    place = printable(str(folder), 1000)
    lines = [
        f"device {device}, expected memory {show_bytes(opened.plan.memory)}",
        describe_time(cost),
        f"disk: {show_bytes(cost.bytes_copied)} needed (less where the file system can share blocks with the input), "
        f"{show_bytes(free)} free in {place}",
    ]
    return [*lines, *describe_existing(target, overwrite)]


def describe_existing(target: Path, overwrite: bool) -> list[str]:
    """That OUT exists, if it does, and what follows from it."""
    then = "it will be replaced" if overwrite else "it needs --overwrite to be replaced, or another OUT"
    return [f"{printable(str(target), 1000)} exists: {then}"] if target.exists() else []


def make_plan_table(opened: Opened) -> FittedTable:
    """The plan of `--dry-run`: a row for each role and shape, then what is kept and why."""
    # A kept matrix has its reason in the column of shapes.
    heads = ("role", "matrices", "shape", "dtype", "read", "write")
    table = FittedTable(*heads, texts=(2,), where="--json has them")
    rows: dict[tuple[str, str, str], list[int]] = {}
    for unit, part in opened.plan.matrices():
        shape = " x ".join(map(str, fan_out_in(unit, part)))
        dtype = unit.dtype if unit.dtype == unit.out_dtype else f"{unit.dtype} -> {unit.out_dtype}"
        row = rows.setdefault((part.role, shape, dtype), [0, 0, 0])
        share = len(unit.parts)
        for i, amount in enumerate((1, (unit.nbytes + unit.base_nbytes) // share, unit.out_nbytes // share)):
            row[i] += amount
    for (role, shape, dtype), (count, read, written) in rows.items():
        table.add_row(role, str(count), shape, dtype, show_bytes(read), show_bytes(written))
    for reason, count in Counter(kept.reason for kept in opened.plan.kept).items():
        table.add_row("kept", str(count), reason, "", "", "", style="dim")
    return table


def make_closing_table(manifest: Manifest) -> FittedTable:
    """A row for each role: how many matrices, and the medians of what was measured."""
    columns = {"departure": ("departure", ".3f"), "lost to rounding": ("rounding", ".2g")}
    methods = {record.method for record in manifest.tensors}
    if "equivalence" in methods:
        columns = {"spectral drift": ("spectral_drift", ".2g"), **columns}
    if "equalize" in methods:
        columns = {"rank": ("rank", ".0f"), "k": ("k", ".0f"), "energy kept": ("energy_kept", ".3f"), **columns}
    table = FittedTable("role", "matrices", *columns, "warnings", where="the manifest has them")
    by_role: dict[str, list[TensorRecord]] = {}
    for record in manifest.tensors:
        by_role.setdefault(record.role, []).append(record)
    for role, records in by_role.items():
        warned = sum(bool(record.warnings) for record in records)
        table.add_row(
            role,
            str(len(records)),
            *(show_median(records, name, form) for name, form in columns.values()),
            str(warned) if warned else "-",
        )
    return table


def describe_closing(manifest: Manifest, out: Path) -> list[str]:
    """A summary of OUT and of the time it took, and the command that verifies it."""
    size = show_bytes(sum(file.bytes for file in manifest.files.values()))
    count = count_noun(len(manifest.tensors), "matrix", "matrices")
    merged = f", {len(manifest.merged)} merged" if manifest.merged else ""
    return close(manifest, out, f"{size}, {count} edited{merged}, every other byte as in {manifest.template}")


def close(manifest: Manifest, out: Path, said: str) -> list[str]:
    """What is `said` of OUT, with how long it took, and the command that verifies it."""
    seconds = manifest.timing.get("total_seconds")
    took = f", in {show_seconds(seconds)}" if isinstance(seconds, float | int) else ""
    sides = [side.name(otherwise=side.source) for side in (manifest.base, manifest.fine_tuned)]
    command = shlex.join(["pome", "verify", str(out), "--base", sides[0], "--ft", sides[1]])
    return [
        f"{printable(str(out), 1000)}: {said}{took}",
        f"manifest: {printable(str(out / MANIFEST_NAME), 1000)}",
        "to verify it:",
        f"  {printable(command, 2000)}",
    ]


def describe_warnings(manifest: Manifest) -> list[str]:
    """Each kind of warning once: in how many matrices, the first of them, and the option that answers it."""
    return [describe_notice(notice, len(manifest.tensors)) for notice in group_warnings(manifest.tensors)]


def describe_notice(notice: Notice, total: int) -> str:
    """A warning about some of the matrices, as one message."""
    named = printable(notice.matrices[0])
    more = f" and {notice.count - 1} more" if notice.count > 1 else ""
    answer = f" Answer: {notice.option}" if notice.option else ""
    return f"warning: {notice.count} of {total}: {printable(notice.text, 400)}{answer} ({named}{more})"


def describe_pair_notices(opened: Opened) -> list[str]:
    """A line for each notice of a pair."""
    return [f"warning: {printable(notice, 2000)}" for notice in opened.notices]


def describe_left_out(not_copied: Mapping[str, str]) -> list[str]:
    """A line for each reason why files were not copied, with their names."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in not_copied.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - 20} more (the manifest names all)" if len(names) > 20 else ""
        lines.append(f"not copied: {', '.join(map(printable, names[:20]))}{more} ({printable(reason)})")
    return lines


def describe_kept(records: Sequence[KeptRecord]) -> list[str]:
    """How many selected tensors stayed as they were, by reason."""
    counts = Counter(kept.reason for kept in records)
    return [f"kept {count}: {printable(reason)}" for reason, count in counts.items()]
