"""Rows of a report, one for each matrix, made from a survey or from a manifest. No torch."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.choices import ROLES
from pome.config.extraction import read_spec
from pome.errors import SpecError, VerificationError, printable
from pome.inspection.records import Matrix, Survey, find_place, sort_places
from pome.inspection.suggest import Notice, Suggestion
from pome.manifest import Manifest, TensorRecord, spread_indices
from pome.reports.edit_warnings import group_warnings
from pome.reports.quantities import EDITED, MATCHED, SURVEYED, WEIGHED, Quantity

# The numbers that a record of each method has beside those of every record.
METHOD_KEYS = {
    "equalize": {"k", "energy_kept", "alpha", "cut_gap", "sigma_max"},
    "equivalence": {"spectral_drift", "distance"},
}
POINTS, FEW_POINTS, MANY = 96, 24, 4000  # points kept of a spectrum; with more matrices than MANY, the few


@dataclass(frozen=True)
class Row:
    """One matrix.

    points: (index from 1, singular value of the delta), by index. floor: largest singular value of storage rounding.
    after: (k, alpha) of the edit; of a survey, those of an edit with defaults; None where the edit has the singular
    values of the base, which `points` then are. power: the edit makes alpha s^power of a
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
    after: tuple[int, float] | None
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
        return sorted(present, key=order_role)


def make_sheet(survey: Survey, warnings: Iterable[Notice], suggestion: Suggestion) -> Sheet:
    """The sheet of a pair looked at."""
    count = FEW_POINTS if len(survey.matrices) > MANY else POINTS
    rows = _sort_rows(_make_row(matrix, count) for matrix in survey.matrices)
    kept = tuple((record.name, record.reason) for record in survey.kept)
    quantities = SURVEYED + (WEIGHED if any(matrix.weights for matrix in survey.matrices) else ())
    return Sheet("survey", survey.base, survey.fine_tuned, quantities, rows, kept, tuple(warnings), suggestion)


def _make_row(matrix: Matrix, count: int) -> Row:
    plain = (q.key for q in SURVEYED if hasattr(matrix, q.key))
    values: dict[str, float | None] = {key: getattr(matrix, key) for key in plain}
    values["departure"] = _estimate_departure(matrix)
    values["effective_share"] = matrix.effective_rank / min(matrix.shape)
    values |= {f"energy_{K[2:].ljust(2, '0')}": share for K, share in matrix.energy.items()}
    values |= {f"k_{rule}": k for rule, k in matrix.k.items()}
    values |= {f"alpha_{scale}": alpha for scale, alpha in matrix.alpha.items()}
    values |= {f"edit_{scale}": ratio for scale, ratio in matrix.edit_ratio.items() if scale != "frobenius"}
    if matrix.weights:
        found = dataclasses.asdict(matrix.weights)
        for name in ("spectral_drift", "hyperspherical_energy"):
            values |= {f"{name}_{key}": value for key, value in found[name].items()}
        values |= {key: found[key] for key in ("rows", "zero_rows", "identical_pairs")}
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
        spec = read_spec(manifest.spec)
    except SpecError as error:
        raise VerificationError(f"{MANIFEST_NAME}: spec: {error}; give an output of pome") from None
    rows = _sort_rows(_make_edited_row(record, spec.resolve(record.name).power) for record in manifest.tensors)
    kept = tuple((record.name, record.reason) for record in manifest.kept)
    sides = manifest.base.source, manifest.fine_tuned.source
    quantities = EDITED + (MATCHED if any(row.after is None for row in rows) else ())
    return Sheet("edit", *sides, quantities, rows, kept, tuple(group_warnings(manifest.tensors)), None)


def _make_edited_row(record: TensorRecord, power: float) -> Row:
    """Raises VerificationError for a record that pome did not write: a manifest may come from anybody."""
    values: dict[str, Any] = {q.key: getattr(record, q.key) for q in (*EDITED, *MATCHED) if hasattr(record, q.key)}
    most = min(record.shape) if record.rank is None else record.rank
    points = dict(record.spectrum)
    try:
        values["edit_ratio"] = record.edit_norm / record.delta_norm
        good = set(record.role.split("+")) <= set(ROLES) and record.delta_norm > 0 and most <= min(record.shape)
        good &= all(1 <= i <= most and math.isfinite(s) for i, s in record.spectrum)
        values["cut_gap"], after = None, None
        if record.method == "equalize":
            cut: Any = record  # none of its numbers is None
            values["cut_gap"], after = 1.0 - cut.sigma_next / cut.sigma_k, (cut.k, cut.alpha)
            good &= min(cut.sigma_max, cut.sigma_k) > 0 and 1 <= cut.k <= most
            points |= {1: cut.sigma_max, cut.k: cut.sigma_k} | ({cut.k + 1: cut.sigma_next} if cut.k < most else {})
        named = {"delta_norm", "edit_ratio", "departure", "rounding", "noise_floor"}
        named |= METHOD_KEYS[record.method]
        good &= all(map(math.isfinite, (*(values[key] for key in named), *record.shape)))
    except (TypeError, KeyError, ArithmeticError):  # a norm of zero, what no float holds, none, an unknown method
        good = False
    if not good:
        said = f"the record of {printable(record.name)} is not one that pome writes"
        raise VerificationError(f"{MANIFEST_NAME}: {said}; give an output of pome")
    place, name, part, floor = find_place(record.name), record.name, record.part, record.noise_floor
    return Row(name, part, record.role, place, record.shape, values, sorted(points.items()), floor, after, power)


def order_role(role: str) -> tuple[int, str]:
    """The place of a role in tables; a matrix of an extracted adapter may have several, as in `gate+up`."""
    return ROLES.index(role.partition("+")[0]), role


def _sort_rows(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Layer by layer, and in each by role: files hold layer 10 before layer 2."""
    made = list(rows)
    order = {place: i for i, place in enumerate(sort_places([row.place for row in made]))}
    return tuple(sorted(made, key=lambda row: (order[row.place], order_role(row.role))))


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
