"""What `pome edit` shows before and after the work: the plan, the closing table, warnings."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from pome.cli.tables.fitted import FittedTable
from pome.cli.tables.text import name_side, show_bytes
from pome.editing.session import Opened
from pome.errors import printable
from pome.manifest import KeptRecord, Manifest, TensorRecord
from pome.planning.units import fan_out_in


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


def make_plan_table(opened: Opened) -> FittedTable:
    """The plan of `--dry-run`: a row for each role and shape, then what is kept and why."""
    # What is kept has its reason in the place of a shape.
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
    """A row for each role: how many matrices, and the medians (the worst, for errors) of what was measured."""
    measured = ("energy kept", "||edit||/||delta||", "lost to rounding", "1-objective", "warnings")
    table = FittedTable("role", "matrices", "rank", "k", *measured, where="the manifest has them")
    by_role: dict[str, list[TensorRecord]] = {}
    for record in manifest.tensors:
        by_role.setdefault(record.role, []).append(record)
    for role, records in by_role.items():
        median: dict[str, float] = {
            name: statistics.median(getattr(record, name) for record in records)
            for name in ("rank", "k", "energy_kept", "rounding")
        }
        ratio = statistics.median(record.edit_norm / record.delta_norm for record in records)
        worst = max(1 - record.objective for record in records)
        warned = sum(bool(record.warnings) for record in records)
        table.add_row(
            role,
            str(len(records)),
            f"{median['rank']:.0f}",
            f"{median['k']:.0f}",
            f"{median['energy_kept']:.3f}",
            f"{ratio:.3f}",
            f"{median['rounding']:.2g}",
            f"{max(worst, 0):.0e}",
            str(warned) if warned else "-",
        )
    return table


def describe_warnings(manifest: Manifest) -> list[str]:
    """Each kind of warning once, with how many matrices have it and the first of them."""
    found: dict[str, list[str]] = {}
    for record in manifest.tensors:
        for warning in record.warnings:
            found.setdefault(warning, []).append(record.name)
    lines = []
    for warning, names in list(found.items())[:10]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"warning: {printable(names[0])}{more}: {warning}")
    if len(found) > 10:
        lines.append(f"warning: {len(found) - 10} more kinds; the manifest lists all")
    return lines


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
