"""What a person reads before and after the work: plans, closing tables, surveys, sweeps, batches."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from pome.checkpoint.source import Checkpoint
from pome.editing.session import Opened
from pome.errors import printable
from pome.manifest import KeptRecord, Manifest, TensorRecord
from pome.planning.units import fan_out_in
from pome.reports.sheet import Sheet, shade, summarise_places, summarise_roles
from pome.reports.sweep import list_heat_maps, list_rows, show_number
from pome.sweeping.trials import Outcome

SURVEY_COLUMNS = {
    "relative_norm": "‖Δ‖/‖W‖",
    "stable_rank": "stable rank",
    "energy_50": "energy .5",
    "above_noise": "above noise",
    "noise_share": "noise",
    "k_ratio": "k ratio",
    "k_energy": "k energy",
    "k_gavish-donoho": "k g.-donoho",
    "k_effective": "k effective",
    "align_right": "aligned",
    "drift": "drift",
    "rounding": "lost",
}
EDIT_COLUMNS = {
    "rank": "rank",
    "k": "k",
    "energy_kept": "energy kept",
    "alpha": "alpha",
    "edit_ratio": "||edit||/||delta||",
    "rounding": "lost to rounding",
}
NAME_WIDTH = 24  # a name folds to no less: folded names are hard to read
# From the worst score to the best, in colours that every terminal has; the number stands in each cell anyway.
SHADES = ("dim", "default", "cyan", "cyan bold", "black on cyan", "black on bright_cyan bold")


class Columns:
    """A table that fits its place without a number cut or folded, which would be read as another number.

    Only the columns of `texts` give way, by folding; then columns are left out whole, from the last on, and a line
    says which, and where they can be found.
    """

    def __init__(self, *heads: str, texts: tuple[int, ...] = (0,), lefts: tuple[int, ...] = (0,), where: str) -> None:
        self.heads, self.texts, self.lefts, self.where = tuple(map(printable, heads)), texts, lefts, where
        self.rows: list[tuple[list[Text], str | None]] = []

    def add_row(self, *cells: str | Text, style: str | None = None) -> None:
        self.rows.append(([cell if isinstance(cell, Text) else Text(printable(cell, 300)) for cell in cells], style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [max([len(head), *(cells[i].cell_len for cells, _ in self.rows)]) for i, head in enumerate(self.heads)]
        least = [min(width, NAME_WIDTH) if i in self.texts else width for i, width in enumerate(widths)]
        count = len(least)
        while count > 1 and sum(least[:count]) + 2 * (count - 1) > options.max_width:
            count -= 1
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, head in enumerate(self.heads[:count]):
            table.add_column(
                Text(head), justify="left" if i in self.lefts else "right", overflow="fold", min_width=least[i],
                no_wrap=i not in self.texts,
            )  # fmt: skip
        for cells, style in self.rows:
            table.add_row(*cells[:count], style=style)
        yield table
        if count < len(self.heads):
            yield Text(f"not shown for want of width: {', '.join(self.heads[count:])}; {self.where}", style="dim")


def show_bytes(count: float) -> str:
    """`2.9 GB`, in powers of ten as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def describe_plan(opened: Opened) -> str:
    """One line: what becomes what, how many tensors, how many bytes."""
    plan = opened.plan
    roles = dict.fromkeys(part.role for _, part in plan.matrices())
    edited = {unit.name for unit in plan.units if unit.parts}
    kept = plan.tensor_count - len(edited | set(plan.merged))  # a tensor may be edited in part, and merged in the rest
    merged = f", {len(plan.merged)} merged" if plan.merged else ""
    return (
        f"{name_side(opened.base)} -> {name_side(opened.ft)}   {len(edited)} of {plan.tensor_count} tensors to edit "
        f"({', '.join(roles)}){merged}, {kept} kept   "
        f"{show_bytes(plan.bytes_read)} to read, {show_bytes(plan.bytes_written)} to write{_list_notices(opened)}"
    )


def describe_survey(opened: Opened) -> str:
    """One line: what is held against what, how many tensors, how many bytes."""
    plan = opened.plan
    roles = dict.fromkeys(part.role for _, part in plan.matrices())
    looked = len({unit.name for unit in plan.units if unit.parts})
    return (
        f"{name_side(opened.base)} -> {name_side(opened.ft)}   {looked} of {plan.tensor_count} tensors to look at "
        f"({', '.join(roles)})   {show_bytes(plan.bytes_read)} to read{_list_notices(opened)}"
    )


def _list_notices(opened: Opened) -> str:
    """A line for each notice of a pair, to follow the first line."""
    return "".join(f"\nwarning: {printable(notice, 2000)}" for notice in opened.notices)


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


def name_side(side: Checkpoint) -> str:
    return printable(side.source.rstrip("/").rpartition("/")[2] or side.source)


def make_plan_table(opened: Opened) -> Columns:
    """The plan of `--dry-run`: a row for each role and shape, then what is kept and why."""
    # What is kept has its reason in the place of a shape.
    heads = ("role", "matrices", "shape", "dtype", "read", "write")
    table = Columns(*heads, texts=(2,), where="--json has them")
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


def make_closing_table(manifest: Manifest) -> Columns:
    """A row for each role: how many matrices, and the medians (the worst, for errors) of what was measured."""
    measured = ("energy kept", "||edit||/||delta||", "lost to rounding", "1-objective", "warnings")
    table = Columns("role", "matrices", "rank", "k", *measured, where="the manifest has them")
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


def describe_kept(records: Sequence[KeptRecord]) -> list[str]:
    """How many selected tensors stayed as they were, by reason."""
    counts = Counter(kept.reason for kept in records)
    return [f"kept {count}: {printable(reason)}" for reason, count in counts.items()]


def make_survey_tables(sheet: Sheet) -> list[Columns]:
    """Medians for each role, and for each layer."""
    columns = SURVEY_COLUMNS if sheet.kind == "survey" else EDIT_COLUMNS
    keys, tables = list(columns), []
    for first, summary in (("role", summarise_roles(sheet, keys)), ("layer", summarise_places(sheet, keys))):
        table = Columns(first, "matrices", *columns.values(), where="--csv has them")
        for name, count, medians in summary:
            table.add_row(name, str(count), *(_show_median(medians[key]) for key in keys))
        tables.append(table)
    return tables


def _show_median(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def describe_notices(sheet: Sheet) -> list[str]:
    """The warnings of a sheet, each with the option that answers it."""
    lines = []
    for notice in sheet.warnings:
        answer = f" Answer: {notice.option}" if notice.option else ""
        lines.append(f"warning: {notice.count} of {len(sheet.rows)}: {printable(notice.text, 400)}{answer}")
    return lines


def make_sweep_tables(outcome: Outcome) -> list[Columns]:
    """The heat map of K and beta where both were varied, and a row for each model, best first."""
    tables = []
    values = [t.score.scored.value for t in outcome.trials if t.candidate and t.score]
    for heat in list_heat_maps(outcome):
        if len(heat.rows) > 1 and len(heat.columns) > 1:
            table = Columns(heat.title, *(f"beta {beta}" for beta in heat.columns), where="--csv has them")
            for name, scores in zip(heat.rows, heat.cells, strict=True):
                table.add_row(name, *(_shade_cell(value, values, outcome.minimize) for value in scores))
            tables.append(table)
    header, rows = list_rows(outcome)
    table = Columns(*header, where="--csv has them")
    for trial, row in zip(outcome.trials, rows, strict=True):
        best = outcome.best is not None and trial.key == outcome.best.key
        style = "red" if trial.failed else "bold" if best else "dim" if trial.candidate is None else None
        table.add_row(*row, style=style)
    return [*tables, table]


def _shade_cell(value: float | None, values: Sequence[float], minimize: bool) -> Text:
    if value is None:
        return Text("-")
    level = round(5 * shade(value, values, minimize))
    return Text(f" {show_number(value)} ", style=SHADES[level])


def make_batch_table(results: list[dict[str, Any]]) -> Columns:
    """A row for each job of a batch."""
    heads = ("job", "status", "matrices", "seconds", "out or error")
    table = Columns(*heads, texts=(0, 4), lefts=(0, 1, 4), where="--json has them")
    for result in results:
        good = result["status"] == "done"
        last = result["out"] if good else result["error"]
        table.add_row(
            result["name"],
            result["status"],
            str(result.get("matrices", "-")),
            f"{result['seconds']:.1f}",
            last,
            style=None if good else "dim" if result["status"] == "not run" else "red",
        )
    return table
