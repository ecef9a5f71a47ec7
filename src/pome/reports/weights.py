"""Drift and energy of weights, for screens and pages: a row for each role and weight, what is left out. No torch."""

from __future__ import annotations

import statistics

from pome.reports.quantities import WEIGHTS
from pome.reports.sheet import Sheet

HEADS = ("role", "weight", "drift", "least", "most", "energy", "least", "most")
MEANING = (
    "Weights: the median of a role, with the least and the most. Drift is the change of the singular values beside "
    "BASE's norm. Energy is hyperspherical: the mean over pairs of rows of 1 / the distance of their directions, near "
    "0.707 for random directions in many dimensions, and more for rows that cluster. The edits are that of the options "
    "given and that of --method equivalence, before they are rounded."
)


def summarise_weights(sheet: Sheet) -> list[tuple[str, ...]]:
    """A row under HEADS for each role and each of its weights; none where weights were not measured."""
    rows = [row for row in sheet.rows if "rows" in row.values]
    return [
        (
            role,
            name,
            *_spread([row.values.get(f"spectral_drift_{key}") for row in rows if row.role == role], 3),
            *_spread([row.values[f"hyperspherical_energy_{key}"] for row in rows if row.role == role], 5),
        )
        for role in (sheet.roles if rows else ())
        for key, name in WEIGHTS.items()
    ]


def _spread(found: list[float | None], digits: int) -> tuple[str, str, str]:
    """Median, least and most of what is known."""
    known = [value for value in found if value is not None]
    if not known:
        return "-", "-", "-"
    median, least, most = (f"{value:.{digits}g}" for value in (statistics.median(known), min(known), max(known)))
    return median, least, most


def describe_weights(sheet: Sheet) -> list[str]:
    """What the numbers mean, and what the energy is not taken over; nothing where weights were not measured."""
    rows = [row for row in sheet.rows if "rows" in row.values]
    lines = [MEANING] if rows else []
    sampled = [row for row in rows if (row.values["rows"] or 0) < row.shape[0]]
    if sampled:
        most = max(row.values["rows"] or 0 for row in sampled)
        lines.append(f"Energy from a seeded sample of {most} rows: {len(sampled)} of {len(rows)} matrices have more.")
    zero, same = (sum(int(row.values[key] or 0) for row in rows) for key in ("zero_rows", "identical_pairs"))
    if zero or same:
        lines.append(f"Left out of the energy, of all weights: {zero} rows of zeros, {same} pairs of one direction.")
    return lines
