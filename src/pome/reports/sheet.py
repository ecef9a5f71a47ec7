"""Rows of a report, one for each matrix, made from a survey or from a manifest. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.choices import ROLES
from pome.config.spec import EditSpec
from pome.errors import SpecError, VerificationError, printable
from pome.inspection.records import Matrix, Survey, find_place, sort_places
from pome.inspection.suggest import Notice, Suggestion
from pome.manifest import Manifest, TensorRecord, spread_indices
from pome.reports.edit_warnings import group_warnings
from pome.reports.quantities import EDITED, SURVEYED, Quantity

POINTS, FEW_POINTS, MANY = 96, 24, 4000  # points kept of a spectrum; with more matrices than MANY, the few


@dataclass(frozen=True)
class Row:
    """One matrix.

    points: (index from 1, singular value of the delta), by index. floor: largest singular value of storage rounding.
    after: (k, alpha) of the edit; of a survey, those of an edit with defaults. power: the edit makes alpha s^power of a
    singular value s that it keeps.
    """

    name: str
    part: str | None
    role: str
    place: str
    shape: tuple[int, int]
    values: dict[str, float | None]
    points: list[tuple[int, float]]
    floor: float
    after: tuple[int, float]
    power: float = 0.0

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
    values["departure"] = _estimate_departure(matrix)
    values["effective_share"] = matrix.effective_rank / min(matrix.shape)
    values |= {f"energy_{K[2:].ljust(2, '0')}": share for K, share in matrix.energy.items()}
    values |= {f"k_{rule}": k for rule, k in matrix.k.items()}
    values |= {f"alpha_{scale}": alpha for scale, alpha in matrix.alpha.items()}
    values |= {f"edit_{scale}": ratio for scale, ratio in matrix.edit_ratio.items() if scale != "frobenius"}
    points = [(i, matrix.sigma[i - 1]) for i in spread_indices(len(matrix.sigma), count)]
    after = (matrix.k["ratio"], matrix.alpha["frobenius"])
    name, floor = matrix.name, matrix.noise_floor
    return Row(name, matrix.part, matrix.role, matrix.place, matrix.shape, values, points, floor, after)


def _estimate_departure(matrix: Matrix) -> float:
    """norm(edit - D) / norm(D) of an edit with defaults, which has the norm of D: sqrt(2 - 2 <edit, D> / norm(D)^2)."""
    k = matrix.k["ratio"]
    cosine = sum(matrix.sigma[:k]) / (math.sqrt(k) * matrix.delta_norm)
    return math.sqrt(max(0.0, 2.0 - 2.0 * cosine))


def make_edit_sheet(manifest: Manifest) -> Sheet:
    """The sheet of an output, from its manifest: before and after. Raises VerificationError."""
    try:
        spec = EditSpec.from_mapping(manifest.spec)
    except SpecError as error:
        raise VerificationError(f"{MANIFEST_NAME}: spec: {error}; give an output of pome") from None
    rows = _sort_rows(_make_edited_row(record, spec.resolve(record.name).power) for record in manifest.tensors)
    kept = tuple((record.name, record.reason) for record in manifest.kept)
    sides = manifest.base.source, manifest.fine_tuned.source
    return Sheet("edit", *sides, EDITED, rows, kept, tuple(group_warnings(manifest.tensors)), None)


def _make_edited_row(record: TensorRecord, power: float) -> Row:
    """Raises VerificationError for a record that pome did not write: a manifest may come from anybody."""
    values = {q.key: getattr(record, q.key) for q in EDITED if hasattr(record, q.key)}
    most = min(record.shape) if record.rank is None else record.rank
    try:
        values["edit_ratio"] = record.edit_norm / record.delta_norm
        values["cut_gap"] = 1.0 - record.sigma_next / record.sigma_k
        good = all(map(math.isfinite, (*({**values, "rank": most}).values(), *record.shape)))
        good &= min(record.delta_norm, record.sigma_max, record.sigma_k) > 0
        good &= record.role in ROLES and 1 <= record.k <= most <= min(record.shape)
        good &= all(1 <= i <= most and math.isfinite(s) for i, s in record.spectrum)
    except (TypeError, ArithmeticError):  # a norm of zero, a number that no float holds, a side that is none
        good = False
    if not good:
        said = f"the record of {printable(record.name)} is not one that pome writes"
        raise VerificationError(f"{MANIFEST_NAME}: {said}; give an output of pome")
    points = {**dict(record.spectrum), 1: record.sigma_max, record.k: record.sigma_k}
    if record.k < most:
        points[record.k + 1] = record.sigma_next
    place, after = find_place(record.name), (record.k, record.alpha)
    name, part, floor = record.name, record.part, record.noise_floor
    return Row(name, part, record.role, place, record.shape, values, sorted(points.items()), floor, after, power)


def _sort_rows(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Layer by layer, and in each by role: files hold layer 10 before layer 2."""
    made = list(rows)
    order = {place: i for i, place in enumerate(sort_places([row.place for row in made]))}
    return tuple(sorted(made, key=lambda row: (order[row.place], ROLES.index(row.role))))


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
