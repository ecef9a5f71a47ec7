"""Rows of a report, one for each matrix, made from a survey or from a manifest. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.choices import ROLES
from pome.errors import VerificationError, printable
from pome.inspection.records import Matrix, Survey, find_place, sort_places
from pome.inspection.suggest import Notice, Suggestion
from pome.manifest import Manifest, TensorRecord
from pome.reports.quantities import EDITED, SURVEYED, Quantity

POINTS, FEW_POINTS, MANY = 96, 24, 4000  # points kept of a spectrum; with more matrices than MANY, the few


@dataclass(frozen=True)
class Row:
    """One matrix.

    points: (index from 1, singular value of the delta), by index. floor: largest singular value of storage rounding.
    k: what each rank rule would keep, by the rule's name. after: (k, alpha) of an edit.
    """

    name: str
    part: str | None
    role: str
    place: str
    shape: tuple[int, int]
    values: dict[str, float | None]
    points: list[tuple[int, float]]
    floor: float
    k: dict[str, int]
    after: tuple[int, float] | None = None

    @property
    def title(self) -> str:
        return f"{self.name} ({self.part})" if self.part else self.name


@dataclass(frozen=True)
class Sheet:
    """What a survey found or an edit did, ready to be shown: every row has a value for every quantity, or None."""

    kind: str  # "survey" or "edit"
    base: str
    fine_tuned: str
    quantities: tuple[Quantity, ...]
    rows: tuple[Row, ...]
    kept: tuple[tuple[str, str], ...]  # (tensor, reason)
    warnings: tuple[Notice, ...]
    suggestion: Suggestion | None
    notes: tuple[str, ...] = ()

    @property
    def places(self) -> list[str]:
        return sort_places([row.place for row in self.rows])

    @property
    def roles(self) -> list[str]:
        present = {row.role for row in self.rows}
        return [role for role in ROLES if role in present]


def make_sheet(survey: Survey, warnings: Iterable[Notice], suggestion: Suggestion) -> Sheet:
    """The sheet of a pair looked at."""
    count = FEW_POINTS if len(survey.matrices) > MANY else POINTS
    rows = _sort_rows(_make_row(matrix, count) for matrix in survey.matrices)
    kept = tuple((record.name, record.reason) for record in survey.kept)
    return Sheet("survey", survey.base, survey.fine_tuned, SURVEYED, rows, kept, tuple(warnings), suggestion)


def _make_row(matrix: Matrix, count: int) -> Row:
    plain = (q.key for q in SURVEYED if hasattr(matrix, q.key))
    values: dict[str, float | None] = {key: getattr(matrix, key) for key in plain}
    values["effective_share"] = matrix.effective_rank / min(matrix.shape)
    values |= {f"energy_{K[2:].ljust(2, '0')}": share for K, share in matrix.energy.items()}
    values |= {f"k_{rule}": k for rule, k in matrix.k.items()}
    values |= {f"alpha_{scale}": alpha for scale, alpha in matrix.alpha.items()}
    values |= {f"edit_{scale}": ratio for scale, ratio in matrix.edit_ratio.items() if scale != "frobenius"}
    points = [(i, matrix.sigma[i - 1]) for i in spread_indices(len(matrix.sigma), count)]
    return Row(
        matrix.name, matrix.part, matrix.role, matrix.place, matrix.shape, values, points, matrix.noise_floor, matrix.k
    )


def make_edit_sheet(manifest: Manifest) -> Sheet:
    """The sheet of an output, from its manifest: before and after."""
    rows = _sort_rows(_make_edited_row(record) for record in manifest.tensors)
    kept = tuple((record.name, record.reason) for record in manifest.kept)
    found: dict[str, int] = {}
    for record in manifest.tensors:
        for text in record.warnings:
            found[text] = found.get(text, 0) + 1
    warnings = tuple(Notice(text, "", count) for text, count in found.items())
    note = (
        "A manifest holds three points of each spectrum: the largest singular value and the two at the cut. "
        "Run pome inspect on the two checkpoints for all of them."
    )
    sides = manifest.base.source, manifest.fine_tuned.source
    return Sheet("edit", *sides, EDITED, rows, kept, warnings, None, (note,))


def _make_edited_row(record: TensorRecord) -> Row:
    """Raises VerificationError for a record that pome did not write: a manifest may come from anybody."""
    values = {q.key: getattr(record, q.key) for q in EDITED if hasattr(record, q.key)}
    try:
        values["edit_ratio"] = record.edit_norm / record.delta_norm
        values["cut_gap"] = 1.0 - record.sigma_next / record.sigma_k
        good = all(map(math.isfinite, (*values.values(), *record.shape)))
        good &= min(record.delta_norm, record.sigma_max, record.sigma_k) > 0
        good &= record.role in ROLES and 1 <= record.k <= min(record.shape)
    except (TypeError, ArithmeticError):  # a norm of zero, a number that no float holds, a side that is none
        good = False
    if not good:
        said = f"the record of {printable(record.name)} is not one that pome writes"
        raise VerificationError(f"{MANIFEST_NAME}: {said}; give an output of pome")
    points = {1: record.sigma_max, record.k: record.sigma_k}
    if record.k < min(record.shape):
        points[record.k + 1] = record.sigma_next
    place, after = find_place(record.name), (record.k, record.alpha)
    name, part, floor = record.name, record.part, record.noise_floor
    k, shape = {"kept": record.k}, record.shape
    return Row(name, part, record.role, place, shape, values, list(points.items()), floor, k, after)


def _sort_rows(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Layer by layer, and in each by role: files hold layer 10 before layer 2."""
    made = list(rows)
    order = {place: i for i, place in enumerate(sort_places([row.place for row in made]))}
    return tuple(sorted(made, key=lambda row: (order[row.place], ROLES.index(row.role))))


def spread_indices(n: int, count: int) -> list[int]:
    """At most `count` whole numbers from 1 to n, both included, dense at the start as a logarithmic axis shows them."""
    if n <= count:
        return list(range(1, n + 1))
    return sorted({round(n ** (i / (count - 1))) for i in range(count)})


def summarise_roles(sheet: Sheet, keys: Sequence[str]) -> list[tuple[str, int, dict[str, float]]]:
    """(role, number of matrices, median of each quantity) in the order of the roles."""
    return [(role, *_summarise([row for row in sheet.rows if row.role == role], keys)) for role in sheet.roles]


def summarise_places(sheet: Sheet, keys: Sequence[str]) -> list[tuple[str, int, dict[str, float]]]:
    """The same for each layer."""
    by_place: dict[str, list[Row]] = {place: [] for place in sheet.places}
    for row in sheet.rows:
        by_place[row.place].append(row)
    return [(place, *_summarise(rows, keys)) for place, rows in by_place.items()]


def _summarise(rows: Sequence[Row], keys: Sequence[str]) -> tuple[int, dict[str, float]]:
    medians = {}
    for key in keys:
        known = [value for row in rows if (value := row.values.get(key)) is not None]
        medians[key] = statistics.median(known) if known else math.nan
    return len(rows), medians
